"""The bundle: a folder of ONNX graphs with a bundle.json that describes them."""

from tango_runtime.bundle.bundle import *  # noqa
