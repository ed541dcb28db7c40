"""Memory and time by arithmetic: the memory model of `tango build`, and `tango plan`: does a model fit a device?

It imports nothing of the engines: they import its memory model, and so does every backend on a GPU, which needs no more
of this package.
"""
