"""`tango bench`: time of stages, of the first token and of a cold start on this machine."""
