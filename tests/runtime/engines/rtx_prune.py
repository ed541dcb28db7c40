"""Builds prune.onnx with TensorRT-RTX, whose Python networks take no plugins: its parser does.

python rtx_prune.py prune.onnx libtango_tensorrt.so ENGINE
"""

from __future__ import annotations

import sys
from pathlib import Path

import tensorrt_rtx_bindings as trt

from tango_runtime.engines.functions import without_functions

FRAMES = 1, 4, 8


def main() -> None:
    model, plugins, engine = map(Path, sys.argv[1:])
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    if trt.get_plugin_registry().load_library(str(plugins)) is None:
        sys.exit("the plugins cannot be loaded")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(without_functions(model.read_bytes())):
        sys.exit("\n".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        _, *rest = tensor.shape
        profile.set_shape(tensor.name, *((frames, *rest) for frames in FRAMES))
    config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    if built is None:
        sys.exit("no engine was built")
    engine.write_bytes(built)


if __name__ == "__main__":
    main()
