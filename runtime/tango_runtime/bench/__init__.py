"""`tango bench`: what a stage, a first token and a start take here."""
