"""Checkpoint → bundle of ONNX graphs."""
