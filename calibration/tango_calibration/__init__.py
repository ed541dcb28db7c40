"""What a choice costs in accuracy, `tango evaluate`, and quantised bundles, `tango calibrate`."""
