"""Linear layers in a lower precision: forms of a graph that write other nodes for them, and nothing else differently.

A linear layer takes one of four formats. In the portable form these are:

- ``w8a8``: 8-bit weights and activations. ``QuantizeLinear`` and ``DequantizeLinear`` precede the product, in the form
  that TensorRT requires: symmetric, with explicit zero points, one scale for the activations and one for each column of
  the weights. At opset 17 both operators take fp32 only, so the product is in fp32 between two casts; a preceding cast
  to fp16 is bypassed. ONNX Runtime's CPU provider fuses all of it into one integer product. TensorRT
  reads stored 8-bit weights from version 10 on. Older versions need them in fp32 and quantize them when they build the
  engine (``Scheme.float_weights``).
- ``fp8``: the same with E4M3, for TensorRT 10 and later; no engine has run it yet. At opset 19 all of it is fp16. The
  weights have one scale: E4M3 keeps its relative precision over 15 octaves, so a column of small weights loses nothing
  beside one of large ones, and kernels for FP8 take no other. They are stored transposed, as those kernels read them.
- ``w4a16`` and ``w8a16``: only weights, in blocks along the columns with a scale each, as ONNX Runtime's
  ``MatMulNBits``, which TensorRT does not support.

In the device form a layer is one operator on the same weights (:mod:`tango_export.graph.operators`). 8-bit activations
are rounded as in the portable form, by what makes the input of a layer where it can (:func:`fused_quantizers`). The
kernel of a decode step reads the weights alone, and its activations are as they are.

Products of two activations (attention) and the constants of pooling and salience stay as they are.

ONNX Runtime's own tools need fp32 weights, all in memory, and changed their 4-bit packing between releases. NVIDIA
ModelOpt needs torch and CUDA; for TensorRT 10 and later it is an alternative.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from onnx import NodeProto, TensorProto

from tango_calibration.quantization.arithmetic import (
    BLOCK,
    FP8,
    INT8,
    Grid,
    fp8_scale,
    quantize_blocks,
    quantize_columns,
    quantize_to_fp8,
    scale_rows,
    scales,
)
from tango_calibration.quantization.ranges import Array
from tango_export.graph import DEVICE, PORTABLE, Form, Graph, GraphBuilder
from tango_export.graph.blocks import CONTRIB, Blocks, blocks_of, blockwise_linear, matmul_nbits
from tango_export.graph.builder import Float, Linear, Read, Weight
from tango_export.graph.device import WIDE_SCALE
from tango_export.graph.operators import FP8_FUNCTIONS, FP8_OPSET
from tango_plugins import op
from tango_runtime.bundle import WeightQuantization

#: w: bits of the weights; a: bits of the activations.
LayerFormat = Literal["w8a8", "w8a16", "w4a16", "fp8"]

#: The widths of an FP8 layer are multiples of it (tango/fp8.h).
_FP8_MULTIPLE = 16

_GRIDS: dict[LayerFormat, Grid] = {"w8a8": INT8, "fp8": FP8}

#: The operators of the device form that round an activation → the ends of the names of those that write it so.
_QUANTIZERS = {"QuantizeInt8": "Int8", "QuantizeFp8": "Fp8"}

_BLOCK_BITS: dict[LayerFormat, Literal[4, 8]] = {"w4a16": 4, "w8a16": 8}


@dataclass(frozen=True)
class Scheme:
    """How the linear layers of a graph are quantized. Mappings are by the name of the layer.

    Attributes:
        formats: Format of a layer; a layer without one is not quantized.
        ranges: Largest magnitude of 8-bit activations, after smoothing.
        smoothing: Factors [in]: a layer divides its input's channels by them, and multiplies the rows of its weight.
            Powers of two for 8-bit activations, AWQ's scales for weights alone.
        mean_squares: Mean square of each channel of the input [in], after smoothing. It weights errors in the rows of
            4-bit weights.
        block: Weights of a block.
        float_weights: Store INT8 weights in fp32 with a QuantizeLinear of their own, in four times the bytes.
    """

    formats: Mapping[str, LayerFormat]
    ranges: Mapping[str, float] = field(default_factory=dict)
    smoothing: Mapping[str, Array] = field(default_factory=dict)
    mean_squares: Mapping[str, Array] = field(default_factory=dict)
    block: int = BLOCK
    float_weights: bool = False

    def scaled(self, by: Mapping[str, Array]) -> Scheme:
        """The scheme with factors for the inputs of some layers, and their mean squares changed accordingly."""
        mean_squares = {name: m / by[name] ** 2 if name in by else m for name, m in self.mean_squares.items()}
        return replace(self, smoothing=by, mean_squares=mean_squares)

    def portable(self) -> Form:
        """The portable form with the layers in their formats."""
        used = set(self.formats.values())
        opsets = dict(PORTABLE.opsets)
        if "fp8" in used:
            opsets[""] = FP8_OPSET
        if used & _BLOCK_BITS.keys():
            opsets[CONTRIB] = 1
        return replace(self._form(PORTABLE, _write_qdq, _write_matmul_nbits), opsets=opsets)

    def switched(self) -> Form:
        """The portable form with each layer both plain and quantized; an input selects one: :func:`switches`."""
        portable = self.portable()

        def linear(g: GraphBuilder, layer: Linear) -> str:
            if layer.name not in self.formats:
                return PORTABLE.linear(g, layer)
            ways = [(portable, "quantized"), (PORTABLE, "plain")]
            products = [form.linear(g, replace(layer, output=f"{layer.output}.{way}")) for form, way in ways]
            switch = g.input(f"{layer.name}.switch", "int32")
            chosen = g.node("Cast", [switch], f"{layer.name}.is_quantized", to=TensorProto.BOOL)
            return g.node("Where", [chosen, *products], layer.output)

        return replace(portable, linear=linear)

    def device(self) -> Form:
        """The device form on the same weights."""
        form = self._form(DEVICE, _write_8_bits_on_device, _write_blockwise)
        if "fp8" not in self.formats.values():
            return form
        return replace(form, opsets={**form.opsets, "": FP8_OPSET}, functions=FP8_FUNCTIONS)

    def _form(self, base: Form, write_8_bits: _Write, write_blocks: _Write) -> Form:
        def linear(g: GraphBuilder, layer: Linear) -> str:
            form = self.formats.get(layer.name)
            if form is None:
                return base.linear(g, layer)
            return (write_8_bits if form in _GRIDS else write_blocks)(g, layer, form, self)

        return replace(base, linear=linear)


def takes(form: LayerFormat, layer: Linear) -> bool:
    """Whether a layer of these widths can have a format."""
    return form != "fp8" or (layer.fan_in % _FP8_MULTIPLE, layer.fan_out % _FP8_MULTIPLE) == (0, 0)


def switches(layers: Iterable[str], quantized: str) -> dict[str, Array]:
    """The inputs of a :meth:`Scheme.switched` graph that select one quantized layer."""
    return {f"{layer}.switch": np.array(layer == quantized, np.int32) for layer in layers}


def fused_quantizers(graph: Graph) -> Graph:
    """The graph with what makes 8-bit inputs of layers writing them in 8 bits, where nothing else reads them."""
    readers = Counter(value for node in graph.nodes for value in node.input)
    quantizers = {node.input[0]: node for node in graph.nodes if node.op_type in _QUANTIZERS}
    nodes, fused = [], set[str]()
    for node in graph.nodes:
        quantizer = quantizers.get(node.output[0])
        kind = f"{node.op_type}{_QUANTIZERS[quantizer.op_type]}" if quantizer else ""
        if quantizer and readers[node.output[0]] == 1 and kind in FP8_FUNCTIONS:
            fused.add(quantizer.name)
            quantized = NodeProto()
            quantized.CopyFrom(node)
            quantized.op_type, quantized.output[0] = kind, quantizer.output[0]
            quantized.attribute.extend(quantizer.attribute)
            node = quantized
        if node.name not in fused:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


_Write = Callable[[GraphBuilder, Linear, LayerFormat, Scheme], str]


def _write_qdq(g: GraphBuilder, layer: Linear, form: LayerFormat, scheme: Scheme) -> str:
    """QuantizeLinear, DequantizeLinear and a product."""
    grid = _GRIDS[form]
    own: Float = "float32" if layer.wide else g.dtype
    dtype: Float = "float32" if grid is INT8 else own
    # A product of matrices: between operands of different ranks, TensorRT's parser inserts a reshape after the weight's
    # DequantizeLinear.
    narrow, reshaped = dtype != own, layer.tokens is not None
    outputs = [f"{layer.output}.product", *[f"{layer.output}.fp16"] * narrow, *[f"{layer.output}.shaped"] * reshaped]
    outputs[-1] = layer.output
    left = g.unrounded(layer.input, f"{layer.name}.input.fp32") if narrow else layer.input
    left = _smoothed_input(g, layer, left, dtype, scheme)
    if reshaped:
        left = g.reshape(left, f"{layer.name}.input.rows", -1, layer.fan_in)
    # One Q/DQ pair for each layer, even if several take the same input. ONNX Runtime makes the activations unsigned,
    # which its integer product needs, only if a pair has one reader. It would merge equal pairs, so each has its own
    # zero point.
    step = _activation_step(layer, grid, dtype, scheme)
    scaled = [g.constant(step, dtype), g.constant(0, grid.type, f"{layer.name}.input.zero")]
    left = g.node("QuantizeLinear", [left, *scaled], f"{layer.name}.input.{grid.name}")
    left = g.node("DequantizeLinear", [left, *scaled], f"{layer.name}.input.dequantized")
    right = _write_fp8_weight(g, layer, dtype, scheme) if grid is FP8 else _write_int8_weight(g, layer, dtype, scheme)
    product = g.node("MatMul", [left, right], outputs.pop(0))
    if narrow:
        product = g.node("Cast", [product], outputs.pop(0), to=TensorProto.FLOAT16)
    if layer.tokens is not None:
        product = _as_frames(g, layer, layer.tokens, product, outputs.pop(0))
    return product


def _as_frames(g: GraphBuilder, layer: Linear, tokens: int | Literal["any"], product: str, name: str) -> str:
    """Reshapes the product of all rows to frames."""
    if tokens != "any":
        return g.reshape(product, name, -1, tokens, layer.fan_out)
    frames = g.slice(g.node("Shape", [layer.input], f"{layer.name}.input.shape"), f"{layer.name}.frames", axis=0, end=2)
    shape = g.node("Concat", [frames, g.constant([layer.fan_out])], f"{layer.name}.shape", axis=0)
    return g.node("Reshape", [product, shape], name)


def _write_int8_weight(g: GraphBuilder, layer: Linear, dtype: Float, scheme: Scheme) -> str:
    """An INT8 weight and its DequantizeLinear to ``dtype``."""
    name, as_float = layer.weight, scheme.float_weights
    values, steps = _int8_weights(g, layer, dtype, scheme)
    if as_float:
        values = Weight(f"{name}.fp32", values.shape, "float32", {}, lambda read: _smoothed(g, layer, scheme, read))
    # TensorRT 8 requires the zero points, and their type selects the grid.
    zeros = Weight(f"{name}.zero", steps.shape, INT8.type, {}, lambda _: np.zeros(layer.fan_out, INT8.dtype))
    stored, *scaled = map(g.weight, (values, steps, zeros))
    if as_float:
        stored = g.node("QuantizeLinear", [stored, *scaled], f"{name}.{INT8.name}", axis=1)
    return g.node("DequantizeLinear", [stored, *scaled], f"{name}.dequantized", axis=1)


def _write_fp8_weight(g: GraphBuilder, layer: Linear, dtype: Float, scheme: Scheme) -> str:
    """An FP8 weight, its DequantizeLinear to ``dtype``, and its transposition to [in, out]."""
    name, (values, step) = layer.weight, _fp8_weights(g, layer, dtype, scheme)
    zero = g.constant(0, FP8.type, f"{name}.zero")
    dequantized = g.node("DequantizeLinear", [*map(g.weight, (values, step)), zero], f"{name}.dequantized")
    return g.node("Transpose", [dequantized], f"{name}.columns", perm=[1, 0])


def _write_matmul_nbits(g: GraphBuilder, layer: Linear, form: LayerFormat, scheme: Scheme) -> str:
    smoothed = _smoothed_input(g, layer, layer.input, "float32" if layer.wide else g.dtype, scheme)
    return matmul_nbits(g, replace(layer, input=smoothed), _blocks(g, layer, form, scheme))


def _write_8_bits_on_device(g: GraphBuilder, layer: Linear, form: LayerFormat, scheme: Scheme) -> str:
    """A quantizer, once for each input, and a product of 8-bit numbers."""
    grid, is_fp8 = _GRIDS[form], form == "fp8"
    step = _activation_step(layer, grid, "float16" if is_fp8 else "float32", scheme)
    step /= WIDE_SCALE if layer.wide else 1
    quantizer, product = ("QuantizeFp8", "Fp8Linear") if is_fp8 else ("QuantizeInt8", "Int8Linear")
    quantized = f"{layer.input}.{grid.name}"
    if not g.has(quantized):
        g.node(quantizer, [layer.input], quantized, domain=op.DOMAIN, y_scale=step)
    weights = map(g.weight, (_fp8_weights if is_fp8 else _int8_weights)(g, layer, "float32", scheme))
    return g.node(product, [quantized, *weights], layer.output, domain=op.DOMAIN, x_scale=step)


def _write_blockwise(g: GraphBuilder, layer: Linear, form: LayerFormat, scheme: Scheme) -> str:
    return blockwise_linear(g, layer, _blocks(g, layer, form, scheme))


def _activation_step(layer: Linear, grid: Grid, dtype: Float, scheme: Scheme) -> float:
    return float(scales(np.array(scheme.ranges[layer.name]), grid, dtype))


def _int8_weights(g: GraphBuilder, layer: Linear, dtype: Float, scheme: Scheme) -> tuple[Weight, Weight]:
    """Values [in, out] with a scale for each column [out]."""
    values, steps = _made_once(lambda read: quantize_columns(_smoothed(g, layer, scheme, read), dtype))
    scale, shape = f"{layer.weight}.scale", (layer.fan_in, layer.fan_out)
    layout = WeightQuantization(8, 0, scale)
    stored = Weight(f"{layer.weight}.{INT8.name}", shape, INT8.type, {}, values, layout)
    return stored, Weight(scale, shape[1:], dtype, {}, steps)


def _fp8_weights(g: GraphBuilder, layer: Linear, stored: Float, scheme: Scheme) -> tuple[Weight, Weight]:
    """Values [out, in] with one scale [], which fp16 holds, and which is stored in some type."""

    def step(read: Read) -> Array:
        return fp8_scale(_smoothed(g, layer, scheme, read), np.float16)

    def values(read: Read) -> Array:
        return quantize_to_fp8(_smoothed(g, layer, scheme, read), step(read))

    scale, shape = f"{layer.weight}.scale", (layer.fan_out, layer.fan_in)
    layout = WeightQuantization(8, 0, scale)
    quantized = Weight(f"{layer.weight}.{FP8.name}", shape, FP8.type, {}, values, layout)
    return quantized, Weight(scale, (), stored, {}, lambda read: step(read).astype(stored))


def _blocks(g: GraphBuilder, layer: Linear, form: LayerFormat, scheme: Scheme) -> Blocks:
    bits, mean_squares = _BLOCK_BITS[form], scheme.mean_squares.get(layer.name)
    made = _made_once(lambda read: quantize_blocks(_smoothed(g, layer, scheme, read), bits, mean_squares, scheme.block))
    return blocks_of(g, layer, bits, scheme.block, *made)


def _made_once(make: Callable[[Read], tuple[Array, Array]]) -> tuple[Callable[[Read], Array], Callable[[Read], Array]]:
    """Readers of the values and of the scales that ``make`` returns; the first keeps the scales for the second."""
    kept: list[Array] = []

    def values(read: Read) -> Array:
        found, steps = make(read)
        kept[:] = [steps]
        return found

    return values, lambda read: kept.pop() if kept else make(read)[1]


def _smoothed_input(g: GraphBuilder, layer: Linear, x: str, dtype: Float, scheme: Scheme) -> str:
    """The input of a layer with its channels divided by the scheme's factors."""
    if layer.name not in scheme.smoothing:
        return x
    factors = 1 / scheme.smoothing[layer.name]
    smoothing = g.weight(Weight(f"{layer.name}.smoothing", factors.shape, dtype, {}, lambda _: factors))
    return g.node("Mul", [x, smoothing], f"{layer.name}.input.smoothed")


def _smoothed(g: GraphBuilder, layer: Linear, scheme: Scheme, read: Read) -> Array:
    """The weight of a layer, times its input's smoothing factors."""
    values, factors = g.weights[layer.weight].values(read), scheme.smoothing.get(layer.name)
    return values if factors is None else scale_rows(values, factors)
