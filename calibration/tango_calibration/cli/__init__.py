"""`tango calibrate` and `tango evaluate`."""
