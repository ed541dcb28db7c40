"""Rewrites the linear layers of a graph in a lower precision; everything else stays as it is.

A linear layer takes one of four formats:

- ``w8a8``: 8-bit weights and activations. ``QuantizeLinear`` and ``DequantizeLinear`` precede the product, in the form
  that TensorRT requires: symmetric, with explicit zero points, one scale for the activations and one for each column of
  the weights. At opset 17 both operators take fp32 only, so the product is in fp32 between two casts; a cast that just
  narrowed the activations is bypassed. ONNX Runtime's CPU provider fuses all of it into one integer product. TensorRT
  reads stored 8-bit weights from version 10 on. Older versions need them in fp32 and quantize them when they build the
  engine (``Scheme.float_weights``).
- ``fp8``: the same with E4M3, for TensorRT 10 and later; no engine has run it yet. At opset 19 all of it is fp16.
- ``w4a16`` and ``w8a16``: only weights, in blocks along the columns with a scale each, as ONNX Runtime's
  ``MatMulNBits``, which TensorRT does not support.

Products of two activations (attention) and the constants of pooling and salience stay as they are.

ONNX Runtime's own tools need fp32 weights, all in memory, and changed their 4-bit packing between releases. NVIDIA
ModelOpt needs torch and CUDA; for TensorRT 10 and later it is an alternative.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from tango_calibration.quantization.arithmetic import BLOCK, FP8, INT8, Grid, quantize_blocks, quantize_columns, scales
from tango_calibration.quantization.layers import GraphWeights, LinearLayer, linear_layers
from tango_calibration.quantization.ranges import Array
from tango_plugins import TangoError
from tango_runtime.bundle import WEIGHT_ALIGNMENT

#: w: bits of the weights; a: bits of the activations.
LayerFormat = Literal["w8a8", "w8a16", "w4a16", "fp8"]

#: The opset of fp8: the first whose QuantizeLinear supports it. The parser of TensorRT 10.0 reads up to 20.
FP8_OPSET = 19

#: MatMulNBits' ``accuracy_level`` 4: activations are rounded to 8 bits before the product, each block with its own
#: scale. That adds 0.7 % of noise where 4-bit weights add 10 %. For one token it is 3 times as fast as the fp32 product
#: with 4-bit weights, and 70 times with 8-bit weights.
ACCURACY_LEVEL = 4

_GRIDS: dict[LayerFormat, Grid] = {"w8a8": INT8, "fp8": FP8}
_CONTRIB = "com.microsoft"

#: Tensors of fewer bytes are stored in the graph file.
_MIN_EXTERNAL_BYTES = 1024


@dataclass(frozen=True)
class Scheme:
    """How a graph is quantized.

    Attributes:
        formats: Format of each layer, by name; other layers stay as they are.
        ranges: Largest magnitude of 8-bit activations after smoothing, by input.
        smoothing: Powers of two [in] by input: its channels are divided by them, the rows of its layers multiplied.
        mean_squares: Mean square of each channel [in], by input: the weight of an error in a row of 4-bit weights.
        float_weights: Store INT8 weights in fp32 with a QuantizeLinear of their own, in four times the bytes.
    """

    formats: Mapping[str, LayerFormat]
    ranges: Mapping[str, float] = field(default_factory=dict)
    smoothing: Mapping[str, Array] = field(default_factory=dict)
    mean_squares: Mapping[str, Array] = field(default_factory=dict)
    float_weights: bool = False


def write_quantized(file: Path, model: ModelProto, weights: GraphWeights, scheme: Scheme) -> None:
    """Quantizes a graph into a file, with its weights beside it in ``<file>.data``."""
    with file.with_name(f"{file.name}.data").open("wb") as data:
        new = quantize(model, weights, scheme, data)
    onnx.save(new, file)
    onnx.checker.check_model(str(file))


def quantize(model: ModelProto, weights: GraphWeights, scheme: Scheme, data: BinaryIO | None = None) -> ModelProto:
    """Returns a graph whose layers have the formats of a scheme. One or two weights are in memory at a time.

    Args:
        model: The graph, without its external data.
        weights: Its initializers.
        scheme: The formats.
        data: External data file of the new graph. Without one, new tensors are stored in the graph and others stay in
            the file of the old graph.

    Raises:
        TangoError: The scheme names a layer that the graph does not have.
    """
    layers = linear_layers(model)
    chosen = {layer.output: layer for layer in layers if layer.name in scheme.formats}
    if missing := set(scheme.formats) - {layer.name for layer in chosen.values()}:
        raise TangoError(f"the graph has no linear layer {min(missing)}", "calibrate the bundle that was observed")
    smoothed = _SmoothedWeights(weights, layers, scheme.smoothing)
    replaced = {layer.weight for layer in chosen.values()}
    new = ModelProto()
    new.CopyFrom(model)
    del new.graph.node[:], new.graph.initializer[:]
    builder = _GraphBuilder(new.graph, data)
    for proto in model.graph.initializer:
        if proto.name in replaced:
            continue
        if data or proto.name in smoothed.changed:
            builder.tensor(proto.name, smoothed[proto.name])
        else:
            new.graph.initializer.append(proto)
    types = _TensorTypes(model)
    for node in model.graph.node:
        layer = chosen.get(node.output[0])
        if layer is None:
            new.graph.node.append(node)
        elif (form := scheme.formats[layer.name]) in _GRIDS:
            _write_qdq(builder, layer, smoothed[layer.weight], scheme, _GRIDS[form], types)
        else:
            _write_blocks(builder, layer, smoothed[layer.weight], scheme, 4 if form == "w4a16" else 8)
    if {"w4a16", "w8a16"} & set(scheme.formats.values()):
        new.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    if "fp8" in scheme.formats.values():
        _raise_opset(new)
    return new


def _raise_opset(model: ModelProto) -> None:
    """Raises a graph to ``FP8_OPSET``, where of its operators only reductions differ: their axes are an input."""
    for node in model.graph.node:
        axes = next((a for a in node.attribute if a.name == "axes"), None)
        if node.op_type.startswith("Reduce") and axes is not None:
            values = numpy_helper.from_array(np.array(axes.ints, np.int64), f"{node.output[0]}.axes")
            model.graph.initializer.append(values)
            node.input.append(values.name)
            node.attribute.remove(axes)
    model.ir_version = max(model.ir_version, 9)
    next(opset for opset in model.opset_import if not opset.domain).version = FP8_OPSET


class _SmoothedWeights:
    """Weights with smoothing folded in: a layer's rows grow by the factor by which its input's channels shrink."""

    def __init__(self, weights: GraphWeights, layers: list[LinearLayer], smoothing: Mapping[str, Array]) -> None:
        self._weights = weights
        self._rows = {layer.weight: smoothing[layer.input] for layer in layers if layer.input in smoothing}
        self._columns = {layer.gain: smoothing[layer.input] for layer in layers if layer.input in smoothing}
        self.changed: set[str] = {*self._rows, *(name for name in self._columns if name)}

    def __getitem__(self, name: str) -> Array:
        values = self._weights[name]
        if name in self._rows:
            values = values * self._rows[name][:, None].astype(values.dtype)
        if name in self._columns:
            values = values / self._columns[name].astype(values.dtype)
        return values


class _TensorTypes:
    """Types and shapes of a graph's tensors."""

    def __init__(self, model: ModelProto) -> None:
        inferred = onnx.shape_inference.infer_shapes(model).graph
        tensors = (*inferred.value_info, *inferred.input, *inferred.output)
        self._types = {tensor.name: tensor.type.tensor_type for tensor in tensors}
        self._cast_inputs = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}

    def fp32_source(self, name: str) -> str | None:
        """The fp32 tensor that a Cast narrowed to this one."""
        source = self._cast_inputs.get(name, "")
        return source if source in self._types and self._types[source].elem_type == TensorProto.FLOAT else None

    def inner_dims(self, name: str) -> list[int]:
        """Dimensions of a tensor except the first and the last; empty if one of them is unknown."""
        dims = [axis.dim_value for axis in self._types[name].shape.dim[1:-1]] if name in self._types else []
        return dims if all(dims) else []


class _GraphBuilder:
    """Appends nodes and tensors to a graph; each method returns the name of what it made."""

    def __init__(self, graph: GraphProto, data: BinaryIO | None) -> None:
        self._graph, self._data = graph, data

    def node(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._graph.node.append(helper.make_node(op_type, inputs, [output], f"{output}/{op_type}", **attributes))
        return output

    def tensor(self, name: str, values: Array) -> str:
        values = np.asarray(values, order="C")  # unlike ascontiguousarray, this keeps a scalar a scalar
        if self._data is None or values.nbytes < _MIN_EXTERNAL_BYTES:
            proto = numpy_helper.from_array(values, name)
        else:
            proto = _write_external(self._data, name, values)
        self._graph.initializer.append(proto)
        return name

    def cast(self, name: str, output: str, to: int) -> str:
        return self.node("Cast", [name], output, to=to)

    def reshape(self, name: str, output: str, shape: list[int]) -> str:
        return self.node("Reshape", [name, self.tensor(f"{output}.shape", np.array(shape, np.int64))], output)

    def scale(self, name: str, scale: Array, grid: Grid) -> tuple[str, str]:
        """A scale and its zero point, which TensorRT 8 requires and whose type selects the grid."""
        zero = np.zeros(scale.shape, grid.dtype)
        return self.tensor(f"{name}.scale", scale), self.tensor(f"{name}.zero", zero)


def _write_external(data: BinaryIO, name: str, values: Array) -> TensorProto:
    """Appends a tensor to an external data file."""
    data.seek(-data.tell() % WEIGHT_ALIGNMENT, io.SEEK_CUR)
    proto = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
    proto.data_location = TensorProto.EXTERNAL
    place = {"location": Path(data.name).name, "offset": data.tell(), "length": values.nbytes}
    for key, value in place.items():
        proto.external_data.add(key=key, value=str(value))
    data.write(values.view(np.uint8).data)  # NumPy exports no buffer of fp8
    return proto


def _write_qdq(
    builder: _GraphBuilder, layer: LinearLayer, weight: Array, scheme: Scheme, grid: Grid, types: _TensorTypes
) -> None:
    """Writes a layer as QuantizeLinear, DequantizeLinear and a product."""
    dtype = np.dtype(np.float32) if grid is INT8 else weight.dtype
    narrow, inner, left = dtype != weight.dtype, types.inner_dims(layer.input), layer.input
    outputs = [f"{layer.output}.product", *[f"{layer.output}.fp16"] * narrow, *[f"{layer.output}.shaped"] * bool(inner)]
    outputs[-1] = layer.output
    if narrow:
        left = types.fp32_source(left) or builder.cast(left, f"{layer.name}.input.fp32", TensorProto.FLOAT)
    if inner:
        # A product of matrices: between operands of different ranks, TensorRT's parser inserts a reshape after the
        # weight's DequantizeLinear.
        left = builder.reshape(left, f"{layer.name}.input.rows", [-1, weight.shape[0]])
    # One Q/DQ pair for each layer, even if several take the same input. ONNX Runtime makes the activations unsigned,
    # which its integer product needs, only if a pair has one reader.
    step = scales(np.array(scheme.ranges[layer.input]), grid, dtype)
    scaled = builder.scale(f"{layer.name}.input", step, grid)
    left = builder.node("QuantizeLinear", [left, *scaled], f"{layer.name}.input.{grid.name}")
    left = builder.node("DequantizeLinear", [left, *scaled], f"{layer.name}.input.dequantized")
    right = _write_weight(builder, layer.weight, weight, grid, dtype, as_float=scheme.float_weights and grid is INT8)
    product = builder.node("MatMul", [left, right], outputs.pop(0))
    if narrow:
        product = builder.cast(product, outputs.pop(0), TensorProto.FLOAT16)
    if inner:
        builder.reshape(product, outputs.pop(0), [-1, *inner, weight.shape[1]])


def _write_weight(builder: _GraphBuilder, name: str, weight: Array, grid: Grid, dtype: Any, *, as_float: bool) -> str:
    """Writes an 8-bit weight and its DequantizeLinear to ``dtype``."""
    values, steps = quantize_columns(weight, grid, dtype)
    scaled = builder.scale(name, steps, grid)
    if as_float:
        stored = builder.tensor(f"{name}.fp32", weight.astype(np.float32))
        stored = builder.node("QuantizeLinear", [stored, *scaled], f"{name}.{grid.name}", axis=1)
    else:
        stored = builder.tensor(f"{name}.{grid.name}", values)
    return builder.node("DequantizeLinear", [stored, *scaled], f"{name}.dequantized", axis=1)


def _write_blocks(builder: _GraphBuilder, layer: LinearLayer, weight: Array, scheme: Scheme, bits: int) -> None:
    """Writes a layer as MatMulNBits."""
    K, N = weight.shape
    packed, scales = quantize_blocks(weight, bits, scheme.mean_squares.get(layer.input))
    tensors = [
        builder.tensor(f"{layer.weight}.int{bits}", packed),
        builder.tensor(f"{layer.weight}.scale", scales.astype(weight.dtype)),
    ]
    sizes = {"K": K, "N": N, "bits": bits, "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
    builder.node("MatMulNBits", [layer.input, *tensors], layer.output, domain=_CONTRIB, **sizes)
