"""TensorRT-RTX under the name of TensorRT, whose newest API it has: strongly typed networks, as TensorRT 10 and 11."""

import tensorrt_rtx_bindings

globals().update({name: value for name, value in vars(tensorrt_rtx_bindings).items() if not name.startswith("__")})
__version__ = "11.0.0"
