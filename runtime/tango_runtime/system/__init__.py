"""This machine: its GPU, its libraries, and what is missing."""
