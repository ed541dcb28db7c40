"""`tango export` and `tango validate`."""
