"""Precision goes into a graph: its linear layers are rewritten, everything else stays as it is.

A linear layer is a product whose right side is a stored matrix. It takes one of four forms:

- ``w8a8``: 8-bit weights and activations. ``QuantizeLinear`` and ``DequantizeLinear`` stand before the product, in the
  form that TensorRT asks for: symmetric, zero points written out, one scale for the activations and one for each column
  of the weights. At opset 17 both take fp32 alone, so the product stands in fp32 between two casts; a cast that
  narrowed the activations just before is passed by. ONNX Runtime's CPU engine makes one integer product of it.
  TensorRT takes stored 8-bit weights from version 10 on; before, it wants them in fp32 and quantises them itself when
  it builds the engine (``Scheme.float_weights``).
- ``fp8``: the same with E4M3, for TensorRT 10 and later; it has not run on an engine. At opset 19 all of it is fp16.
- ``w4a16`` and ``w8a16``: weights only, in blocks along the columns with a scale each, as ONNX Runtime's own
  ``MatMulNBits``; TensorRT does not know it.

Products of two activations (attention) and the constants of pooling and salience are left alone.

ONNX Runtime's tools are not used here: they want the weights in fp32 and all of them in memory, quantise fp16 graphs
only after a conversion, and moved their 4-bit packing between releases. What they would do is a screenful.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tango_plugins import TangoError
from tango_runtime.bundle import WEIGHT_ALIGNMENT

Array = NDArray[Any]

#: W: bits of the weights; a: bits of the activations.
Form = Literal["w8a8", "w8a16", "w4a16", "fp8"]

#: The opset of fp8: the first whose QuantizeLinear has it. The parser of TensorRT 10.0 reads up to 20.
FP8_OPSET = 19

#: Weights of a column that share a scale.
BLOCK = 32

#: MatMulNBits' ``accuracy_level`` 4: the activations of a block are rounded to 8 bits before the product, each block
#: with a scale of its own. That adds 0.7 % of noise where 4-bit weights make 10 %, and is 3 times as fast for one token
#: as the product in fp32, with 8-bit weights 70 times.
ACCURACY_LEVEL = 4

#: Scales tried for a block of 4-bit weights, relative to the one that its largest weight asks for.
_TRIED = (1.0, 1.14, 1.07, 0.95, 0.9, 0.85, 0.8)

_CONTRIB = "com.microsoft"
#: The smallest normal number of fp16: no scale may be zero.
_TINY = 2.0**-14


@dataclass(frozen=True)
class Grid:
    """The values that 8 bits can hold, before they are scaled.

    Attributes:
        name: Suffix of the tensors that hold them.
        dtype: Their type in the graph.
        largest: The largest of them; the smallest is its negative.
    """

    name: str
    dtype: Any
    largest: float


INT8 = Grid("int8", np.dtype(np.int8), 127)
FP8 = Grid("fp8", helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN), 448)
_GRIDS: dict[Form, Grid] = {"w8a8": INT8, "fp8": FP8}

#: Tensors below so many bytes stay in the graph's own file.
_SMALL = 1024


@dataclass(frozen=True)
class Linear:
    """A linear layer of a graph.

    Attributes:
        name: Name of its weight, less ``.weight``.
        weight: Its initializer, [in, out].
        input: The activations that it takes, [..., in].
        output: What it gives, [..., out].
        gain: The initializer whose last axis scales the channels of ``input`` and nothing else, None if there is none:
            a norm's weight, or that of the linear layer whose output is multiplied into ``input``.
    """

    name: str
    weight: str
    input: str
    output: str
    gain: str | None


@dataclass(frozen=True)
class Scheme:
    """How a graph is to be quantised.

    Attributes:
        forms: Layers by name; the others stay.
        peaks: By input: the largest magnitude that 8-bit activations hold, after smoothing.
        smoothing: By input: what its channels are divided by, and its layers' rows multiplied with, powers of two [in].
        energies: By input: mean square of each channel [in], the weight of an error in a row of 4-bit weights.
        float_weights: Whether INT8 weights stay in fp32 behind a QuantizeLinear of their own: four times the bytes.
    """

    forms: Mapping[str, Form]
    peaks: Mapping[str, float] = field(default_factory=dict)
    smoothing: Mapping[str, Array] = field(default_factory=dict)
    energies: Mapping[str, Array] = field(default_factory=dict)
    float_weights: bool = False


class Store(Protocol):
    """Where the tensors of a new graph go."""

    def add(self, name: str, values: Array) -> TensorProto:
        """Takes a new tensor."""

    def keep(self, proto: TensorProto, weights: Weights) -> TensorProto:
        """Takes a tensor of the old graph as it is."""


# Reading


def read_graph(file: Path) -> ModelProto:
    """A graph without its external data."""
    return onnx.load(file, load_external_data=False)


class Weights:
    """The initializers of a graph, mapped from the disk.

    Args:
        model: The graph.
        folder: Where its external data lies.
    """

    def __init__(self, model: ModelProto, folder: Path) -> None:
        self._protos = {proto.name: proto for proto in model.graph.initializer}
        self._folder = folder

    def __contains__(self, name: str) -> bool:
        return name in self._protos

    def __getitem__(self, name: str) -> Array:
        proto = self._protos[name]
        if proto.data_location != TensorProto.EXTERNAL:
            return np.asarray(numpy_helper.to_array(proto))
        entry = {e.key: e.value for e in proto.external_data}
        shape, dtype = tuple(proto.dims), helper.tensor_dtype_to_np_dtype(proto.data_type)
        if 0 in shape:
            return np.zeros(shape, dtype)
        file = self._folder / entry["location"]
        return np.memmap(file, dtype, "r", int(entry.get("offset", 0)), shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._protos[name].dims)


def linears(model: ModelProto) -> list[Linear]:
    """The linear layers of a graph in its order: products with a stored matrix whose name ends in ``.weight``.

    Matrices that the graph has in fp32 although it is in fp16 (the salience's probe) have been kept there on purpose;
    they are not named so.
    """
    weights = Weights(model, Path())
    nodes = {output: node for node in model.graph.node for output in node.output}
    users: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def is_linear(node: NodeProto) -> bool:
        right = node.input[1] if node.op_type == "MatMul" else ""
        return right in weights and len(weights.shape(right)) == 2 and right.endswith(".weight")

    def gain(name: str) -> str | None:
        """Follows the activations back, as long as nothing else reads them, to what scales their channels."""
        if not all(map(is_linear, users[name])):
            return None
        node = nodes.get(name)
        if node is not None and node.op_type == "Cast":
            node = _only(nodes.get(node.input[0]), users)
        if node is None or node.op_type != "Mul":
            return None
        for factor in node.input:
            if factor in weights and len(weights.shape(factor)) == 1:
                return str(factor)
            before = _only(nodes.get(factor), users)
            if before is not None and is_linear(before):
                return str(before.input[1])
        return None

    return [
        Linear(n.input[1].removesuffix(".weight"), n.input[1], n.input[0], n.output[0], gain(n.input[0]))
        for n in model.graph.node
        if is_linear(n)
    ]


def _only(node: NodeProto | None, users: Mapping[str, list[NodeProto]]) -> NodeProto | None:
    """A node whose output is read once."""
    return node if node is not None and len(users[node.output[0]]) == 1 else None


# Writing


class Embedded:
    """Keeps new tensors in the graph, and leaves old ones where they are: for graphs that are never saved."""

    def add(self, name: str, values: Array) -> TensorProto:
        """Takes a new tensor."""
        return numpy_helper.from_array(np.asarray(values, order="C"), name)

    def keep(self, proto: TensorProto, weights: Weights) -> TensorProto:
        """Leaves an old one."""
        return proto


class DataFile:
    """Writes tensors one by one to an external data file.

    Args:
        file: The file; the graph must lie beside it.
    """

    def __init__(self, file: Path) -> None:
        self._name = file.name
        self._stream = file.open("wb")

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(self, name: str, values: Array) -> TensorProto:
        """Takes a new tensor."""
        values = np.asarray(values, order="C")  # a scalar stays one
        if values.nbytes < _SMALL:
            return numpy_helper.from_array(values, name)
        proto = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
        proto.data_location = TensorProto.EXTERNAL
        self._stream.seek(-self._stream.tell() % WEIGHT_ALIGNMENT, io.SEEK_CUR)
        place = (("location", self._name), ("offset", self._stream.tell()), ("length", values.nbytes))
        for key, value in place:
            proto.external_data.add(key=key, value=str(value))
        self._stream.write(values.view(np.uint8).data)  # a buffer of NumPy's knows no fp8
        return proto

    def keep(self, proto: TensorProto, weights: Weights) -> TensorProto:
        """Copies an old one."""
        return self.add(proto.name, weights[proto.name])


def quantize(model: ModelProto, weights: Weights, scheme: Scheme, store: Store) -> ModelProto:
    """A graph whose layers have the forms that a scheme says. It holds a tensor or two at a time.

    Args:
        model: The graph, without its external data.
        weights: Its initializers.
        scheme: What to do.
        store: Where the new graph's tensors go.

    Raises:
        TangoError: The scheme names a layer that is not there.
    """
    layers = linears(model)
    chosen = {layer.output: layer for layer in layers if layer.name in scheme.forms}
    if missing := set(scheme.forms) - {layer.name for layer in chosen.values()}:
        raise TangoError(f"the graph has no linear layer {min(missing)}", "calibrate the bundle that was observed")
    smoothed = _Smoothed(weights, layers, scheme.smoothing)
    replaced = {layer.weight for layer in chosen.values()}
    new = ModelProto()
    new.CopyFrom(model)
    del new.graph.node[:], new.graph.initializer[:]
    for proto in model.graph.initializer:
        if proto.name in smoothed.touched - replaced:
            new.graph.initializer.append(store.add(proto.name, smoothed[proto.name]))
        elif proto.name not in replaced:
            new.graph.initializer.append(store.keep(proto, weights))
    writer = _Writer(new, store, scheme, _Types(model))
    for node in model.graph.node:
        layer = chosen.get(node.output[0])
        if layer is None:
            new.graph.node.append(node)
        else:
            writer.write(layer, smoothed[layer.weight])
    if "w4a16" in scheme.forms.values() or "w8a16" in scheme.forms.values():
        new.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    if "fp8" in scheme.forms.values():
        _to_fp8_opset(new)
    return new


def _to_fp8_opset(model: ModelProto) -> None:
    """Of the operators in a bundle's graphs only reductions are written otherwise there: their axes are an input."""
    for node in model.graph.node:
        axes = next((a for a in node.attribute if a.name == "axes"), None)
        if node.op_type.startswith("Reduce") and axes is not None:
            values = numpy_helper.from_array(np.array(axes.ints, np.int64), f"{node.output[0]}.axes")
            model.graph.initializer.append(values)
            node.input.append(values.name)
            node.attribute.remove(axes)
    model.ir_version = max(model.ir_version, 9)
    next(opset for opset in model.opset_import if not opset.domain).version = FP8_OPSET


def written(file: Path, weights: Weights, scheme: Scheme, model: ModelProto) -> None:
    """Quantises a graph into a file, its weights beside it in ``<file>.data``."""
    with DataFile(file.with_name(f"{file.name}.data")) as store:
        new = quantize(model, weights, scheme, store)
    onnx.save(new, file)
    onnx.checker.check_model(str(file))


class _Smoothed:
    """Weights with the smoothing folded in: a layer's rows grow by what its input's channels shrink by."""

    def __init__(self, weights: Weights, layers: list[Linear], smoothing: Mapping[str, Array]) -> None:
        self._weights = weights
        self._rows = {layer.weight: smoothing[layer.input] for layer in layers if layer.input in smoothing}
        self._columns = {layer.gain: smoothing[layer.input] for layer in layers if layer.input in smoothing}
        self.touched: set[str] = {*self._rows, *(name for name in self._columns if name)}

    def __getitem__(self, name: str) -> Array:
        values = self._weights[name]
        if name in self._rows:
            values = values * self._rows[name][:, None].astype(values.dtype)
        if name in self._columns:
            values = values / self._columns[name].astype(values.dtype)
        return values


class _Types:
    """Types and shapes of a graph's tensors."""

    def __init__(self, model: ModelProto) -> None:
        inferred = onnx.shape_inference.infer_shapes(model).graph
        tensors = (*inferred.value_info, *inferred.input, *inferred.output)
        self._types = {tensor.name: tensor.type.tensor_type for tensor in tensors}
        self._cast = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}

    def wide(self, name: str) -> str | None:
        """The fp32 tensor that was narrowed to this one."""
        before = self._cast.get(name, "")
        return before if before in self._types and self._types[before].elem_type == TensorProto.FLOAT else None

    def inner(self, name: str) -> list[int]:
        """A tensor's dimensions but the first and the last; none where one of them is not known."""
        inner = [axis.dim_value for axis in self._types[name].shape.dim[1:-1]] if name in self._types else []
        return inner if all(inner) else []


class _Writer:
    """Writes layers in their forms into a graph."""

    def __init__(self, model: ModelProto, store: Store, scheme: Scheme, types: _Types) -> None:
        self._graph, self._store, self._scheme, self._types = model.graph, store, scheme, types

    def write(self, layer: Linear, weight: Array) -> None:
        form = self._scheme.forms[layer.name]
        if form in _GRIDS:
            self._write_qdq(layer, weight, _GRIDS[form])
        else:
            self._write_blocks(layer, weight, 4 if form == "w4a16" else 8)

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._graph.node.append(helper.make_node(kind, inputs, [output], f"{output}/{kind}", **attributes))
        return output

    def _tensor(self, name: str, values: Array) -> str:
        self._graph.initializer.append(self._store.add(name, values))
        return name

    def _write_qdq(self, layer: Linear, weight: Array, grid: Grid) -> None:
        dtype = np.dtype(np.float32) if grid is INT8 else weight.dtype
        narrow, left = dtype != weight.dtype, layer.input
        inner = self._types.inner(left)
        if narrow:
            left = self._types.wide(left) or self._cast(left, f"{layer.name}.input.fp32", TensorProto.FLOAT)
        if inner:
            # Rows of one matrix: where ranks differ, TensorRT's parser puts a reshape between weight and product.
            left = self._reshape(left, [-1, weight.shape[0]], f"{layer.name}.input.rows")
        # A pair for each layer, though several take the same input: ONNX Runtime, which makes the activations of a pair
        # unsigned to have an integer product, does so only where nobody else reads them.
        step = scales(np.array(self._scheme.peaks[layer.input]), grid, dtype)
        scaled = self._scaled(f"{layer.name}.input", step, grid)
        left = self._node("QuantizeLinear", [left, *scaled], f"{layer.name}.input.{grid.name}")
        left = self._node("DequantizeLinear", [left, *scaled], f"{layer.name}.input.dequantized")
        product = self._node("MatMul", [left, self._weight(layer, weight, grid, dtype)], f"{layer.output}.product")
        if narrow:
            product = self._cast(product, f"{layer.output}.fp16", TensorProto.FLOAT16)
        if inner:
            self._reshape(product, [-1, *inner, weight.shape[1]], f"{layer.output}.shaped")
        self._graph.node[-1].output[0] = layer.output

    def _weight(self, layer: Linear, weight: Array, grid: Grid, dtype: Any) -> str:
        """A weight as it is stored, and what makes it a matrix of ``dtype`` again; the one place that decides."""
        values, steps = columns(weight, grid, dtype)
        scaled = self._scaled(layer.weight, steps, grid)
        if grid is INT8 and self._scheme.float_weights:
            stored = self._tensor(f"{layer.weight}.fp32", weight.astype(np.float32))
            stored = self._node("QuantizeLinear", [stored, *scaled], f"{layer.weight}.{grid.name}", axis=1)
        else:
            stored = self._tensor(f"{layer.weight}.{grid.name}", values)
        return self._node("DequantizeLinear", [stored, *scaled], f"{layer.weight}.dequantized", axis=1)

    def _cast(self, name: str, output: str, to: int) -> str:
        return self._node("Cast", [name], output, to=to)

    def _reshape(self, name: str, shape: list[int], output: str) -> str:
        return self._node("Reshape", [name, self._tensor(f"{output}.shape", np.array(shape, np.int64))], output)

    def _scaled(self, name: str, scale: Array, grid: Grid) -> tuple[str, str]:
        """A scale and its zero point, which TensorRT 8 asks for and which says what 8 bits mean."""
        zero = np.zeros(scale.shape, grid.dtype)
        return self._tensor(f"{name}.scale", scale), self._tensor(f"{name}.zero", zero)

    def _write_blocks(self, layer: Linear, weight: Array, bits: int) -> None:
        K, N = weight.shape
        packed, scales = blocks(weight, bits, self._scheme.energies.get(layer.input))
        names = [
            self._tensor(f"{layer.weight}.int{bits}", packed),
            self._tensor(f"{layer.weight}.scale", scales.astype(weight.dtype)),
        ]
        sizes = {"K": K, "N": N, "bits": bits, "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
        self._node("MatMulNBits", [layer.input, *names], layer.output, domain=_CONTRIB, **sizes)


# Arithmetic


def scales(peaks: Array, grid: Grid, dtype: Any) -> Array:
    """What the values of a grid are multiplied with so that the largest is a peak: max|x| / 127 or 448.

    Args:
        peaks: The largest magnitudes, of any shape.
        grid: The values.
        dtype: Type of the scales; none of them is below its smallest normal number.
    """
    steps: Array = np.maximum(np.asarray(peaks, np.float32) / grid.largest, np.finfo(dtype).tiny)
    return steps.astype(dtype)


def columns(weight: Array, grid: Grid = INT8, dtype: Any = np.float32) -> tuple[Array, Array]:
    """8-bit weights with a scale for each column, symmetric.

    Args:
        weight: [in, out].
        grid: What 8 bits mean.
        dtype: Type of the scales.

    Returns:
        (values [in, out], scales [out], all positive).
    """
    values = np.empty(weight.shape, grid.dtype)
    steps = np.empty(weight.shape[1], dtype)
    for part in _parts(weight.shape[1], weight.shape[0]):
        wide = weight[:, part].astype(np.float32)
        steps[part] = scales(np.abs(wide).max(0), grid, dtype)
        wide /= steps[part].astype(np.float32)
        values[:, part] = np.rint(wide) if grid is INT8 else wide  # a cast to fp8 rounds
    return values, steps


def blocks(weight: Array, bits: int, energies: Array | None = None) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Weights of 4 or 8 bits in blocks of ``BLOCK`` along a column, as MatMulNBits takes them.

    A block's weights are (q − 2^(bits−1)) · scale with an unsigned q, so they reach one step further down than up; the
    scale has the sign that gives the largest weight the longer side. With 4 bits, of a few scales the one is taken
    whose squared error, each row weighted with its channel's energy, is the least.

    Args:
        weight: [in, out].
        bits: 4 or 8.
        energies: Mean square of each input channel [in]; all alike by default.

    Returns:
        (values [out, blocks, BLOCK · bits / 8], two 4-bit ones to a byte, the first in the low half;
        scales [out, blocks]). Rows that fill up the last block are zero.
    """
    K, N = weight.shape
    count = -(-K // BLOCK)
    importance = np.ones((count, BLOCK), np.float32)
    if energies is not None:
        importance.reshape(-1)[:K] = energies
    packed = np.empty((N, count, BLOCK * bits // 8), np.uint8)
    scales = np.empty((N, count), np.float32)
    for part in _parts(N, K):
        wide = np.zeros((part.stop - part.start, count * BLOCK), np.float32)
        wide[:, :K] = weight[:, part].T
        values, scales[part] = _fitted(wide.reshape(-1, count, BLOCK), bits, importance)
        packed[part] = values if bits == 8 else values[..., ::2] | (values[..., 1::2] << 4)
    return packed, scales


def _fitted(wide: Array, bits: int, importance: Array) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Blocks [n, blocks, BLOCK] fp32 → unsigned values and scales, the best of those tried."""
    half = 1 << (bits - 1)
    place = np.abs(wide).argmax(-1)[..., None]
    largest = np.take_along_axis(wide, place, -1)[..., 0]
    full = np.where(largest != 0, largest, 1) / -half
    least = np.full(full.shape, np.inf, np.float32)
    best, scales = np.empty(wide.shape, np.uint8), np.empty(full.shape, np.float32)
    for factor in _TRIED if bits == 4 else (1.0,):
        # What is stored is the scale in fp16, so that is what the values are fitted to.
        scale = (full * factor).astype(np.float16).astype(np.float32)
        scale = np.where(scale != 0, scale, np.float32(_TINY))
        steps = np.clip(np.rint(wide / scale[..., None]), -half, half - 1)
        error = ((steps * scale[..., None] - wide) ** 2 * importance).sum(-1)
        better = error < least
        best[better] = (steps[better] + half).astype(np.uint8)
        least[better], scales[better] = error[better], scale[better]
    return best, scales


def _parts(columns: int, rows: int, most: int = 1 << 24) -> Iterator[slice]:
    """Columns in parts of so many weights, so that an fp32 copy of a vocabulary's head is never whole in memory."""
    step = max(most // max(rows, 1), 1)
    for begin in range(0, columns, step):
        yield slice(begin, min(begin + step, columns))


def smoothing(peaks: Array, rows: Array) -> NDArray[np.float32]:
    """SmoothQuant's migration of outliers from activations to weights, Xiao et al. 2023 (arXiv:2211.10438), α = 0.5.

    s = √(max|X_j| / max|W_j|), rounded to a power of two: then nothing that is scaled loses a bit, and a layer that
    stays in fp16 computes what it did. Held within 2^±8, so that fp16 holds what is scaled.

    Args:
        peaks: max|X_j| of each channel [in].
        rows: max|W_j| of each row over all layers that take X [in].

    Returns:
        s [in].
    """
    known = (peaks > 0) & (rows > 0)
    exponents = np.zeros(len(peaks))
    exponents[known] = np.log2(peaks[known] / rows[known]) / 2
    exponents -= np.rint(np.median(exponents))  # a common factor changes nothing
    return np.asarray(np.exp2(np.clip(np.rint(exponents), -8, 8)), np.float32)
