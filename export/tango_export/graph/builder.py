"""Writes a graph node by node.

A layer function takes a :class:`GraphBuilder` and the names of its input values, and returns the name of its result.
A node and its first output share one name, which a viewer shows: ``layers.0.self_attn.q_proj``. A weight has the name
of its layer and ``.weight`` or ``.bias``. Weights are only declared here: their values are read when a file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tango_runtime.bundle import DType, GraphName, TensorSpec, WeightQuantization

Array = NDArray[Any]

#: Type of the activations and of the linear layers' weights.
Float = Literal["float16", "float32"]

#: Type of a stored weight.
WeightDType = Literal[Float, "int8", "uint8", "float8_e4m3fn"]

#: Tokens of a frame, a number or any; None where a tensor has no axis of frames.
Tokens = int | Literal["any"] | None

#: Reads a tensor of the checkpoint by its canonical name, in the dtype that it is stored in.
Read = Callable[[str], Array]


@dataclass(frozen=True)
class Weight:
    """A weight of a graph.

    Attributes:
        name: Its name in the graph.
        shape: Its shape in the graph.
        dtype: Its type in the graph.
        tensors: The tensors of the checkpoint that it is made of, by canonical name, with their shapes.
        values: Reads and combines them, in any floating-point type.
        quantization: How its elements become numbers, where they are not the numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: WeightDType
    tensors: Mapping[str, tuple[int, ...]]
    values: Callable[[Read], Array]
    quantization: WeightQuantization | None = None

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Biased:
    """A value whose bias is still to be added: what comes next may add it, or do without.

    Attributes:
        name: Name of the value with its bias.
        value: The value without.
        bias: The weight to add, None if there is none.
        wide: fp16 may not hold the value. It is what the form makes of it, which is for a norm of an fp32 stream to
            read; the bias is fp32.
    """

    name: str
    value: str
    bias: str | None
    wide: bool = False


@dataclass(frozen=True)
class Addition:
    """A sum with the residual stream that is still to be computed, so that a norm may compute it too.

    Attributes:
        name: Name of the sum.
        residual: The residual stream.
        branch: What is added to it.
    """

    name: str
    residual: str
    branch: Biased


@dataclass(frozen=True)
class Linear:
    """The product of a linear layer: activations by a stored matrix, without the bias.

    Attributes:
        name: Name of the layer.
        input: The activations, [..., in].
        output: Name of the product, [..., out].
        fan_in: Width of the input.
        fan_out: Width of the product.
        tokens: Tokens of a frame, where the input is [F, tokens, in]; None where it is [T, in].
        wide: fp16 may not hold input and product, which are what the form makes of them; the matrix is as all others.
        gain: Weights whose last axis scales the channels of ``input``, and nothing else. Dividing them by some factors
            and multiplying the rows of every layer that takes this input by the same changes no result.
    """

    name: str
    input: str
    output: str
    fan_in: int
    fan_out: int
    tokens: Tokens = None
    wide: bool = False
    gain: tuple[str, ...] = ()

    @property
    def weight(self) -> str:
        """Name of the matrix, [in, out]."""
        return f"{self.name}.weight"


@dataclass(frozen=True)
class CacheShape:
    """A decoder's key/value cache, and the attention over it.

    Attributes:
        layers: Layers of the graph.
        heads: Query heads.
        kv_heads: Heads of the cache.
        head_dim: Width of one head.
        context: Most positions.
        rope_theta: Base of the rotary frequencies.
        first: The first layer of the graph. Where it is not 0, layers before it have run: they may have dropped tokens,
            so that a token's rotary position is not its place in the cache.
        sections: Frequencies that turn by each of three axes, where a token has a rotary position on each (time, row,
            column) beside its place in the cache; None where it has one position.
        share: The layer whose last query's attention is an output of the graph, None for none.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rope_theta: float
    first: int = 0
    sections: tuple[int, int, int] | None = None
    share: int | None = None

    @property
    def is_positioned(self) -> bool:
        """Whether rotary positions are an input of the graph, beside the places in the cache."""
        return self.sections is not None or self.first > 0

    @property
    def indices(self) -> range:
        """The layers of the graph."""
        return range(self.first, self.first + self.layers)


@dataclass(frozen=True)
class PatchGrid:
    """The patches of a frame, row by row, as a vision tower of any frame size sees them.

    Attributes:
        rows: Name of their number of rows R, an int64 scalar of the graph.
        columns: Name of their number of columns C.
        window: Edge of an attention window, in patches; windows are cut from the grid's first patch on.
        shared: What all layers share of the grid; only the form that made it reads it.
    """

    rows: str
    columns: str
    window: int
    shared: tuple[str, ...]


#: What all layers of a decoder share about the positions of one pass; only the form that made it reads it.
Positions = tuple[str, ...]


@dataclass(frozen=True)
class Form:
    """How each kind of layer becomes nodes.

    Every function takes the builder first. A name is that of the layer, and of its result. F is the number of frames,
    T the number of tokens of a pass, D the width, R × C a grid of patches.

    Attributes:
        opsets: Version of every operator domain that it uses.
        functions: What its own operators compute, as ONNX functions by operator.
        linear: (g, layer) → the product, under the name that the layer has for it. The matrix is declared already; a
            form that stores it otherwise does not read it, and it is left out.
        add_bias: (g, x [..., D]) → [..., D].
        layer_norm: (g, name, x [..., D], D, eps) → (the norm of x, x).
        rms_norm: The same, without the mean.
        wide_rms_norm: The same, over a residual stream that is fp32 whatever the activations are.
        gelu: (g, name, x) → the same shape; exact.
        gelu_tanh: (g, name, x) → the same shape; the tanh approximation.
        swiglu: (g, name, gate, up, wide) → silu(gate) · up, for a wide product where ``wide`` is set.
        attention: (g, name, query, key and value side by side [F, T, 3 D], T, heads, head_dim) → [F, T, D].
        patch_pixels: (g, frames uint8 [F, S, H, W, 3], mean, deviation, size) → (R, C, patches [F, R, C, ...]), whose
            pixels are by step, row, column and channel: (pixel / 255 − mean) / deviation, both [3] fp32.
        patch_grid: (g, R, C, window, head_dim) → the grid: prepares what the attention of all layers shares.
        patch_query_key: (g, name, qkv [F, R·C, 3 D], grid, heads, head_dim) → (queries, keys), rotated by row and
            column, [F, R·C, heads, head_dim] fp32 each.
        patch_attention: (g, name, qkv [F, R·C, 3 D], grid, heads, head_dim, windowed) → [F, R·C, D]: attention of the
            patches of a frame, or of a window, with queries and keys rotated.
        constant_matmul: (g, name, weight [M, T], x [F, T, D]) → [F, M, D].
        start_decoder: (g, D, cache) → (embeddings [T, D], positions): declares the inputs of a decoder.
        cached_attention: (g, name, layer, qkv [T, ...], positions, cache, last) → [T, D], of the last position alone
            where ``last`` is set; declares the rows of the cache as outputs, and in front of them what the last query
            gives each position, the mean over heads, where the cache asks for it of this layer.
        last_position: (g, name, x [T, D], D) → [1, D].
    """

    opsets: Mapping[str, int]
    functions: Mapping[str, Any]
    linear: Callable[[GraphBuilder, Linear], str]
    add_bias: Callable[[GraphBuilder, Biased], str]
    layer_norm: Callable[[GraphBuilder, str, str | Addition, int, float], tuple[str, str]]
    rms_norm: Callable[[GraphBuilder, str, str | Addition, int, float], tuple[str, str]]
    wide_rms_norm: Callable[[GraphBuilder, str, str | Addition, int, float], tuple[str, str]]
    gelu: Callable[[GraphBuilder, str, Biased], str]
    gelu_tanh: Callable[[GraphBuilder, str, Biased], str]
    swiglu: Callable[[GraphBuilder, str, Biased, Biased, bool], str]
    attention: Callable[[GraphBuilder, str, Biased, int, int, int], str]
    patch_pixels: Callable[[GraphBuilder, str, str, str, int], tuple[str, str, str]]
    patch_grid: Callable[[GraphBuilder, str, str, int, int], PatchGrid]
    patch_query_key: Callable[[GraphBuilder, str, Biased, PatchGrid, int, int], tuple[str, str]]
    patch_attention: Callable[[GraphBuilder, str, Biased, PatchGrid, int, int, bool], str]
    constant_matmul: Callable[[GraphBuilder, str, str, str], str]
    start_decoder: Callable[[GraphBuilder, int, CacheShape], tuple[str, Positions]]
    cached_attention: Callable[[GraphBuilder, str, int, Biased, Positions, CacheShape, bool], str]
    last_position: Callable[[GraphBuilder, str, str, int], str]


@dataclass(frozen=True)
class Definition:
    """A graph of a model, as layers.

    Attributes:
        name: Its name in the bundle.
        write: Declares inputs and outputs and writes the layers between them.
        sources: Prefix of a weight's name in the graph → its canonical prefix in the checkpoint; the first match wins.
        no_device_form: Why the device cannot run its layers, None where it can.
    """

    name: GraphName
    write: Callable[[GraphBuilder], None]
    sources: Mapping[str, str]
    no_device_form: str | None = None


@dataclass(frozen=True)
class Graph:
    """A graph in one form, complete but for the values of its weights.

    Attributes:
        name: Its name in the bundle.
        form: How each kind of layer became nodes.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
        nodes: Its nodes, in order.
        constants: Numbers that the nodes read.
        weights: Weights that the nodes read.
        linears: Its linear layers, in order.
    """

    name: GraphName
    form: Form
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: tuple[NodeProto, ...]
    constants: tuple[TensorProto, ...]
    weights: tuple[Weight, ...]
    linears: tuple[Linear, ...] = ()


def build(definition: Definition, form: Form, dtype: Float, stored: Collection[str] = ()) -> Graph:
    """Writes the nodes of a graph; reads no weights.

    Args:
        definition: The layers.
        form: How each kind of layer becomes nodes.
        dtype: Type of the activations and of the linear layers' weights.
        stored: Weights that are to be read as they are, under their names in the graph: those of a bundle. All others
            are made of tensors of the checkpoint.
    """
    g = GraphBuilder(definition.name, form, dtype, definition.sources, stored)
    definition.write(g)
    return g.finish()


class GraphBuilder:
    """A graph while it is written.

    Attributes:
        name: Name of the graph.
        form: How each kind of layer becomes nodes.
        dtype: Type of the activations and of the linear layers' weights.
        weights: The weights declared so far, by name.
    """

    def __init__(
        self, name: GraphName, form: Form, dtype: Float, sources: Mapping[str, str], stored: Collection[str] = ()
    ) -> None:
        self.name, self.form, self.dtype = name, form, dtype
        self.weights: dict[str, Weight] = {}
        self._sources, self._stored = sources, stored
        self._linears: list[Linear] = []
        self._products: set[int] = set()  # indices of the nodes of linear layers
        self._gains: dict[str, tuple[str, ...]] = {}
        self._inputs: list[TensorSpec] = []
        self._outputs: list[TensorSpec] = []
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._renamed: dict[str, str] = {}
        self._unrounded: dict[str, str] = {}
        self._values = {""}  # an optional input that is left out has no name

    def has(self, value: str) -> bool:
        """Whether there is a value of this name already."""
        return value in self._values

    def input(self, name: str, dtype: DType, *shape: int | str) -> str:
        """Declares an input; returns its name."""
        self._inputs.append(TensorSpec(name, dtype, shape))
        return self._new(name)

    def output(self, value: str, name: str, dtype: DType, *shape: int | str, first: bool = False) -> None:
        """Makes a value an output under another name, after the other outputs or before them."""
        self._renamed[value] = name
        self._outputs.insert(0 if first else len(self._outputs), TensorSpec(name, dtype, shape))

    def node(
        self, op: str, inputs: Sequence[str], name: str, *more: str, domain: str = "", **attributes: object
    ) -> str:
        """Adds a node; returns the name of its first output.

        Args:
            op: The operator.
            inputs: Values, constants and weights; an empty name leaves an optional input out.
            name: Name of the node and of its first output.
            more: Names of the other outputs, empty for those that are left out.
            domain: The operator's domain.
            attributes: The operator's attributes.
        """
        assert self._values.issuperset(inputs), f"{name}: {set(inputs) - self._values} are not there yet"
        for output in (name, *filter(None, more)):
            self._new(output)
        self._nodes.append(helper.make_node(op, inputs, [name, *more], name, domain=domain, **attributes))
        return name

    def constant(self, values: float | Sequence[int], dtype: DType = "int64", name: str = "") -> str:
        """A constant: integers [n], or a scalar. Its name is its value, where it has none of its own."""
        array = np.array(values, dtype)
        name = name or (f"{dtype}({','.join(map(str, array.flat))})" if array.ndim else f"{dtype} {array}")
        if name not in self._constants:
            self._constants[self._new(name)] = numpy_helper.from_array(array, name)
        return name

    def weight(self, weight: Weight) -> str:
        """Declares a weight, once; returns its name."""
        name = weight.name
        if name in self._stored:
            weight = replace(weight, tensors={name: weight.shape}, values=lambda read: read(name))
        if name not in self.weights:
            self.weights[self._new(name)] = weight
        return name

    def parameter(self, name: str, *shape: int, dtype: Float | None = None) -> str:
        """Declares a weight that is one tensor of the checkpoint as it is stored."""
        tensor = self.source(name)
        return self.weight(Weight(name, shape, dtype or self.dtype, {tensor: shape}, lambda read: read(tensor)))

    def linear(self, layer: Linear) -> str:
        """Writes the product of a linear layer as the form has it; returns its name."""
        self._linears.append(replace(layer, gain=self._gains.get(layer.input, ())))
        begin = len(self._nodes)
        product = self.form.linear(self, layer)
        self._products.update(range(begin, len(self._nodes)))
        return product

    def scaled_by(self, value: str, *weights: str) -> None:
        """Declares that the last axis of these weights scales the channels of a value, and of nothing else."""
        self._gains[value] = weights

    def source(self, name: str) -> str:
        """The canonical name of a tensor that has this name in the graph."""
        for prefix, canonical in self._sources.items():
            if name.startswith(prefix):
                return canonical + name.removeprefix(prefix)
        return name

    def widen(self, x: str, name: str) -> str:
        """An activation in fp32."""
        return x if self.dtype == "float32" else self.node("Cast", [x], name, to=TensorProto.FLOAT)

    def narrow(self, x: str, name: str) -> str:
        """An fp32 value in the type of the activations."""
        if self.dtype == "float16":
            self._unrounded[name] = x
            return self.node("Cast", [x], name, to=TensorProto.FLOAT16)
        self._renamed[x] = name
        return x

    def unrounded(self, x: str, name: str) -> str:
        """An activation in fp32: the value that :meth:`narrow` made it of, or else what :meth:`widen` makes of it."""
        return self._unrounded.get(x) or self.widen(x, name)

    def mean(self, x: str, name: str, *axes: int, keepdims: int) -> str:
        """The mean along some axes, which from opset 18 on are an input."""
        if self.form.opsets[""] < 18:
            return self.node("ReduceMean", [x], name, axes=axes, keepdims=keepdims)
        return self.node("ReduceMean", [x, self.constant(axes)], name, keepdims=keepdims)

    def slice(self, x: str, name: str, *, axis: int, begin: int = 0, end: int = np.iinfo(np.int32).max) -> str:
        """Part of a value along one axis."""
        return self.node("Slice", [x, *(self.constant([number]) for number in (begin, end, axis, 1))], name)

    def reshape(self, x: str, name: str, *shape: int) -> str:
        """A value in another shape, at most one size of which is −1."""
        return self.node("Reshape", [x, self.constant(shape)], name)

    def finish(self) -> Graph:
        """The graph; weights that no node reads are left out."""
        for node in self._nodes:
            node.input[:] = [self._renamed.get(value, value) for value in node.input]
            node.output[:] = [self._renamed.get(value, value) for value in node.output]
        read = {value for node in self._nodes for value in node.input}
        weights = tuple(weight for name, weight in self.weights.items() if name in read)
        tensors = tuple(self._inputs), tuple(self._outputs)
        nodes, constants = tuple(self._nodes), tuple(self._constants.values())
        return Graph(self.name, self.form, *tensors, nodes, constants, weights, self._finished_linears())

    def _finished_linears(self) -> tuple[Linear, ...]:
        """The linear layers; what another node reads, too, cannot be scaled for them."""
        others = {value for i, node in enumerate(self._nodes) if i not in self._products for value in node.input}
        named = [replace(layer, input=self._renamed.get(layer.input, layer.input)) for layer in self._linears]
        return tuple(replace(layer, gain=() if layer.input in others else layer.gain) for layer in named)

    def _new(self, name: str) -> str:
        assert name not in self._values, f"two values are called {name}"
        self._values.add(name)
        return name
