"""What pruning and quantization cost in accuracy."""
