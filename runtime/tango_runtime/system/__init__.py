"""This machine: its GPU, and the packages that are installed."""
