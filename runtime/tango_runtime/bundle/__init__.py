"""The bundle: a folder of ONNX graphs with a bundle.json that says everything about them.

It is the only thing that passes from export and calibration to the runtime.
"""

from tango_runtime.bundle.bundle import Bundle, describe, sha256
from tango_runtime.bundle.manifest import (
    FORMAT,
    GRAPHS,
    MANIFEST,
    WEIGHT_ALIGNMENT,
    DecoderSpec,
    DType,
    FileSpec,
    GraphName,
    GraphSpec,
    Manifest,
    PixelBudget,
    Precision,
    PromptSpec,
    Quantization,
    RotarySpec,
    Runtime,
    Source,
    TensorSpec,
    VideoSpec,
    WeightQuantization,
    WeightSpec,
    write_manifest,
)

__all__ = [
    "FORMAT",
    "GRAPHS",
    "MANIFEST",
    "WEIGHT_ALIGNMENT",
    "Bundle",
    "DType",
    "DecoderSpec",
    "FileSpec",
    "GraphName",
    "GraphSpec",
    "Manifest",
    "PixelBudget",
    "Precision",
    "PromptSpec",
    "Quantization",
    "RotarySpec",
    "Runtime",
    "Source",
    "TensorSpec",
    "VideoSpec",
    "WeightQuantization",
    "WeightSpec",
    "describe",
    "sha256",
    "write_manifest",
]
