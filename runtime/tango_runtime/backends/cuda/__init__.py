"""Backends on an NVIDIA GPU: ONNX Runtime's CUDA provider and TensorRT."""
