"""A video and questions → answers: sessions over the graphs that a backend runs."""
