"""What pruning costs in accuracy (`tango evaluate`), and quantized bundles (`tango calibrate`)."""
