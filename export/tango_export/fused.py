"""Graphs for ONNX Runtime on a GPU: norms, attention and activations as that engine's own operators or as ours.

A graph that was written is read again and rewritten module by module. The exporter names every node by the path of the
module that it comes from, so a module's nodes are found by name and replaced as a whole; what an operator wants to know
(heads, eps), the module says. Weights stay where they are, in the plain graph's data file. Only what an operator wants
in another form is written anew: norms' weights in the graph's dtype, the bias behind attention, the rotary angles.

Our operators are the CUDA library's (operators.cpp of the plugins). A graph also says what each computes,
as a function of ONNX, so that it runs where that library is not: on a CPU, where `tango validate` compares it.

All take their weights as inputs: the runtime brings them to the device, faster than an engine would, and has them there
once, where ONNX Runtime reads them and the kernel that decodes does, too. The embedding is the plain one but for that.

What the plain graph computes in fp32 stays there, inside the operators: scores and softmax (flash attention has fp32
accumulators), the sums of the norms (in every kernel since microsoft/onnxruntime#28682, before that in the strict mode
that the runtime asks for), and the rotation. New in fp16 are the rotated query, its cosines and sines, and the norms'
weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from onnx import FunctionProto, NodeProto, external_data_helper, helper, numpy_helper
from torch import Tensor, nn

from tango_export.graphs import OPSET, Graph, value_info
from tango_export.modules import qwen2, siglip
from tango_export.modules.layers import LayerNorm, Linear, RMSNorm
from tango_export.modules.projector import Projector
from tango_plugins import TangoError, decoder, op
from tango_runtime.bundle import DType, GraphSpec, TensorSpec, WeightSpec

#: The domain of ONNX Runtime's own operators (docs/ContribOperators.md in its repository), and that of ours.
_DOMAIN, _OURS = "com.microsoft", op.DOMAIN

_KINDS = {torch.float16: onnx.TensorProto.FLOAT16, torch.float32: onnx.TensorProto.FLOAT}

#: How long the sequence is after this pass, as GroupQueryAttention wants it told: on the device the last position, for
#: each sequence; on the host a bound of the length, which says how the work is divided and whether the cache is empty.
_LAST = TensorSpec("seqlens_k", "int32", (1,))
_BOUND = TensorSpec("total_sequence_length", "int32", (1,))


def write_fused_graph(graph: Graph, folder: Path, context: int) -> GraphSpec:
    """Writes a graph's form for ONNX Runtime on a GPU, beside the plain graph.

    The vision graph keeps its tensors. The decoder appends to its cache in place: ``past`` and ``present`` are the same
    memory, of fixed capacity P, and what lies behind the sequence does not count.

    Args:
        graph: What the plain graph was written of.
        folder: Where it was written to.
        context: Most positions of the decoder.

    Returns:
        The graph's entry in bundle.json: the plain graph with its fused form, and where the weights lie that this takes
        as inputs.
    """
    draft = _Draft(onnx.load(folder / graph.spec.file, load_external_data=False), graph)
    for path, module in graph.module.named_modules():
        if isinstance(module, qwen2.Rotary):
            _tabulate_angles(draft, path, context)
        elif fuse := _FUSIONS.get(type(module)):
            fuse(draft, path, module)
    for product in [node for node in draft.nodes if node.op_type == "MatMul" and draft.is_weight(node.input[0])]:
        _repeat_constant(draft, product)
    for total in [node for node in draft.nodes if node.op_type == "Add"]:
        _fuse_bias(draft, total)
    spec, weights = replace(graph.spec, file=f"{graph.name}.fused.onnx", runtimes=("onnxruntime",)), draft.stored()
    if isinstance(graph.module, qwen2.Decoder):
        spec = _hold_cache(draft, spec)
    spec = draft.take(weights, spec)
    onnx.save(draft.model(spec), folder / spec.file)  # onnx's checker does not know these operators
    return replace(graph.spec, device=spec, weights=weights)


def is_fusible(graph: Graph) -> bool:
    """Whether ONNX Runtime's operators, and the kernel that decodes, take a graph: the latter has limits for widths."""
    if not isinstance(graph.module, qwen2.Decoder):
        return True
    modules = list(graph.module.modules())
    attention = next(module for module in modules if isinstance(module, qwen2.SelfAttention))
    matrices = [size for module in modules if isinstance(module, Linear) for size in module.weight.shape]
    queries = attention.heads // attention.kv_heads * attention.head_dim
    fits = attention.head_dim <= decoder.MAX_HEAD_DIM and queries <= decoder.MAX_GROUP_WIDTH
    return fits and all(width % decoder.DIM_MULTIPLE == 0 for width in (attention.head_dim, *matrices))


class _Draft:
    """The nodes of a graph while they are replaced.

    Args:
        model: The plain graph.
        graph: What it was written of.
    """

    def __init__(self, model: onnx.ModelProto, graph: Graph) -> None:
        self.nodes = list(model.graph.node)
        self.graph = graph
        linear = (module for module in graph.module.modules() if isinstance(module, Linear))
        self.dtype = next((module.weight.dtype for module in linear), torch.float32)  # an embedding has none
        self._parameters = dict(graph.module.named_parameters())
        self._plain = model
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}

    def inside(self, path: str) -> list[NodeProto]:
        """Nodes of a module and of the modules in it."""
        return [node for node in self.nodes if f"{node.name}/".startswith(f"{_scope(path)}/")]

    def own(self, path: str) -> list[NodeProto]:
        """Nodes of a module without those of the modules in it."""
        return [node for node in self.nodes if node.name.rpartition("/")[0] == _scope(path)]

    def replace(self, old: Iterable[NodeProto], *new: NodeProto) -> None:
        """Puts nodes in the place of others."""
        gone = {node.output[0] for node in old}
        self.nodes = [node for node in self.nodes if node.output[0] not in gone] + list(new)

    def rename(self, old: str, new: str, nodes: Iterable[NodeProto]) -> None:
        """Has nodes take another tensor."""
        for node in nodes:
            node.input[:] = [new if name == old else name for name in node.input]

    def sum(self, tensor: str) -> NodeProto | None:
        """The node that makes a tensor, if that is an addition."""
        return next((node for node in self.nodes if tensor in node.output and node.op_type == "Add"), None)

    def passed(self, nodes: Sequence[NodeProto]) -> tuple[str, str]:
        """The one tensor that goes into some nodes, and the one that comes out."""
        made = {name for node in nodes for name in node.output}
        used = {name for node in self.nodes if node.output[0] not in made for name in node.input}
        (taken,) = {name for node in nodes for name in node.input} - made - set(self._initializers)
        (given,) = made & used
        return taken, given

    def product(self, path: str) -> NodeProto:
        """The matrix product of a linear layer."""
        (product,) = (node for node in self.own(path) if node.op_type == "MatMul")
        return product

    def result(self, path: str) -> str:
        """What a linear layer gives."""
        return str(self.own(path)[-1].output[0])

    def without_bias(self, path: str) -> str:
        """Takes the bias out of a linear layer; what is left of it."""
        self.replace(node for node in self.own(path) if node.op_type == "Add")
        return self.result(path)

    def weight(self, name: str) -> str:
        """A weight in the graph's dtype: the plain graph's own, where that has it already."""
        return name if self._parameters[name].dtype == self.dtype else self.anew(name, self.graph.weights[name]())

    def anew(self, name: str, values: Tensor) -> str:
        """A weight with other values than the plain graph's, in the graph's dtype."""
        fitted = values.to(self.dtype)
        if not fitted.isfinite().all():
            raise TangoError(f"{name} has values that {self.dtype} does not hold", "export with --dtype fp32")
        return self.constant(f"{name}.fused", fitted)

    def constant(self, name: str, values: Tensor) -> str:
        """A constant that is kept in the graph itself."""
        self._initializers[name] = numpy_helper.from_array(values.numpy(), name)
        return name

    def shape(self, weight: str) -> list[int]:
        """The shape of a weight."""
        return list(self._initializers[weight].dims)

    def is_bias(self, tensor: str) -> bool:
        """Whether a tensor is a row of weights in the graph's dtype."""
        found = self._initializers.get(tensor)
        return found is not None and found.data_type == _KINDS[self.dtype] and len(found.dims) == 1 < found.dims[0]

    def is_weight(self, tensor: str) -> bool:
        """Whether a tensor is a weight or another constant."""
        return tensor in self._initializers

    def stored(self) -> dict[str, WeightSpec]:
        """Where the weights lie in the plain graph's data file."""
        found = {}
        for tensor in filter(external_data_helper.uses_external_data, self._plain.graph.initializer):
            dtype = cast("DType", helper.tensor_dtype_to_np_dtype(tensor.data_type).name)
            offset = external_data_helper.ExternalDataInfo(tensor).offset or 0
            found[tensor.name] = WeightSpec(dtype, tuple(tensor.dims), offset)
        return found

    def take(self, weights: Mapping[str, WeightSpec], spec: GraphSpec) -> GraphSpec:
        """Has the graph take the weights that it uses as inputs, behind those that it has."""
        used = {name for node in self._needed(spec) for name in node.input}
        taken = [
            TensorSpec(name, cast("DType", each.dtype), each.shape) for name, each in weights.items() if name in used
        ]
        for tensor in taken:
            del self._initializers[tensor.name]
        return replace(spec, inputs=(*spec.inputs, *taken))

    def model(self, spec: GraphSpec) -> onnx.ModelProto:
        """The graph as it is now, without what nothing uses any more."""
        nodes = self._needed(spec)
        used = {name for node in nodes for name in node.input}
        initializers = [tensor for name, tensor in self._initializers.items() if name in used]
        inputs, outputs = (list(map(value_info, tensors)) for tensors in (spec.inputs, spec.outputs))
        graph = helper.make_graph(nodes, self.graph.name, inputs, outputs, initializers)
        return helper.make_model(
            graph,
            opset_imports=[*self._plain.opset_import, *_OPSETS],
            functions=[MEANINGS[name] for name in sorted({node.op_type for node in nodes if node.domain == _OURS})],
            ir_version=self._plain.ir_version,
            producer_name="tango-edge",
        )

    def _needed(self, spec: GraphSpec) -> list[NodeProto]:
        """The nodes that the outputs depend on, each behind those that it depends on."""
        makers = {name: node for node in self.nodes for name in node.output if name}  # what is left out has no name
        ordered: dict[str, NodeProto] = {}
        waiting = [makers[tensor.name] for tensor in spec.outputs]
        while waiting:
            node = waiting[-1]
            missing = [makers[name] for name in node.input if name in makers and makers[name].output[0] not in ordered]
            if missing:
                waiting += missing
            else:
                ordered.setdefault(waiting.pop().output[0], node)
        return list(ordered.values())


def _fuse_rms_norm(draft: _Draft, path: str, norm: RMSNorm) -> None:
    _fuse_norm(draft, path, [draft.weight(f"{path}.weight")], "Simplified", norm.eps)


def _fuse_layer_norm(draft: _Draft, path: str, norm: LayerNorm) -> None:
    weights = [draft.weight(f"{path}.{name}") for name in ("weight", "bias")]
    _fuse_norm(draft, path, weights, "", norm.eps)


def _fuse_norm(draft: _Draft, path: str, weights: list[str], kind: str, eps: float) -> None:
    """One node for a norm, and for the residual sum before it and the bias in that, where these are."""
    nodes = draft.inside(path)
    taken, given = draft.passed(nodes)
    residual = draft.sum(taken)
    # A table that is added to each frame is none: SkipLayerNormalization's strict mode, which the runtime asks for,
    # refuses what it would have to broadcast (microsoft/onnxruntime#17896).
    if residual is None or any(map(draft.is_weight, residual.input)):
        op = f"{kind}LayerNormalization"
        draft.replace(nodes, helper.make_node(op, [taken, *weights], [given], f"{_scope(path)}/{op}", epsilon=eps))
        return
    old, branch = residual.input
    bias = []
    if biased := draft.sum(branch):
        branch, *bias = biased.input
    node = _node(path, f"Skip{kind}LayerNormalization", [old, branch, *weights, *bias], given, epsilon=eps)
    node.output.extend(["", "", taken])  # no mean, no deviation, but the sum
    draft.replace([*nodes, residual], node)


def _fuse_attention(draft: _Draft, path: str, module: siglip.SelfAttention) -> None:
    """One node for attention, whose keys and values come without their biases; of the three, only the query's is added.

    score = <q, k + b_k> = <q, k> + <q, b_k>: the last term is the same for every key of a query, and leaves the softmax
    as it is. The softmax's weights sum to 1, so Σ w·(v + b_v) = Σ w·v + b_v, and what the output projection makes of
    b_v is a constant: b_out + b_v·W_out.
    """
    output = f"{path}.out_proj"
    names = f"{path}.v_proj.bias", f"{output}.weight", f"{output}.bias"
    value_bias, weight, bias = (draft.graph.weights[name]().double() for name in names)
    draft.rename(names[2], draft.anew(names[2], bias + value_bias @ weight), draft.own(output))
    taken = [draft.result(f"{path}.q_proj"), *(draft.without_bias(f"{path}.{name}_proj") for name in "kv")]
    given = draft.product(output).input[0]
    draft.replace(draft.own(path), _node(path, "MultiHeadAttention", taken, given, num_heads=module.split[2]))


def _fuse_grouped_attention(draft: _Draft, path: str, module: qwen2.SelfAttention) -> None:
    used = {name for node in draft.own(path) for name in node.input}
    past = [tensor.name for tensor in draft.graph.inputs if tensor.name in used and tensor.name != "positions"]
    given = draft.product(f"{path}.o_proj").input[0]
    mixed = given if module.last is None else f"{given}.all"
    packed, bias = draft.without_bias(f"{path}.qkv_proj"), f"{path}.qkv_proj.bias"
    taken, heads = [packed, bias, *past, _LAST.name, _BOUND.name, *_ANGLES], (module.heads, module.kv_heads)
    node = _node(path, "CachedAttention", taken, mixed, _OURS, **dict(zip(_HEADS, heads, strict=True)))
    node.output.extend(map(_present, past))
    last = [] if module.last is None else [_take_last(draft, path, mixed, given)]
    draft.replace(draft.own(path), node, *last)


def _fuse_layer(draft: _Draft, path: str, layer: qwen2.DecoderLayer) -> None:
    if layer.last is None:
        return
    nodes = draft.inside(f"{path}.last")
    draft.replace(nodes, _take_last(draft, path, *draft.passed(nodes)))


def _take_last(draft: _Draft, path: str, taken: str, given: str) -> NodeProto:
    """The last position of one sequence, [1, T, ...] → [1, 1, ...]."""
    names, values = ("begin", "end", "axis"), (-1, torch.iinfo(torch.int64).max, 1)
    where = [draft.constant(f"last.{n}", torch.tensor([v])) for n, v in zip(names, values, strict=True)]
    return helper.make_node("Slice", [taken, *where], [given], f"{_scope(path)}/last/Slice")


def _fuse_gelu_mlp(draft: _Draft, path: str, module: siglip.MLP) -> None:
    _fuse_gelu(draft, path, "BiasFastGelu", _OURS, "fc1", draft.product(f"{path}.fc2").input[0])


def _fuse_projector(draft: _Draft, path: str, module: Projector) -> None:
    _fuse_gelu(draft, path, "BiasGelu", _DOMAIN, "linear_1", draft.product(f"{path}.pool").input[1])


def _fuse_gelu(draft: _Draft, path: str, op: str, domain: str, linear: str, given: str) -> None:
    taken = [draft.without_bias(f"{path}.{linear}"), f"{path}.{linear}.bias"]
    draft.replace(draft.own(path), _node(path, op, taken, given, domain))


def _fuse_gated_mlp(draft: _Draft, path: str, module: qwen2.MLP) -> None:
    taken = [draft.product(f"{path}.{name}_proj").output[0] for name in ("gate", "up")]
    draft.replace(draft.own(path), _node(path, "SwiGLU", taken, draft.product(f"{path}.down_proj").input[0], _OURS))


def _fuse_bias(draft: _Draft, total: NodeProto) -> None:
    """One node for the sum of a product and a bias that nothing else took in."""
    bias, others = (list(filter(wanted, total.input)) for wanted in (draft.is_bias, lambda t: not draft.is_weight(t)))
    if len(bias) == len(others) == 1:
        name = f"{total.name.rpartition('/')[0]}/Bias"
        draft.replace([total], helper.make_node("Bias", [*others, *bias], total.output, name, domain=_OURS))


def _repeat_constant(draft: _Draft, product: NodeProto) -> None:
    """Repeats the constant [T, P] before a batch [F, P, C], so that both operands are batches of one length.

    ONNX Runtime strides through such. Through others it goes by lists of addresses, which it keeps in pinned memory
    until a run that waits for its end, or until the session goes, when freeing them aborts the process.
    """
    constant, batch = product.input
    begin = f"{product.name.rpartition('/')[0]}/Expand"
    sides = draft.constant(f"{constant}.sides", torch.tensor(draft.shape(constant)))
    frames, shape, repeated = (f"{begin}/{name}_output_0" for name in ("Shape", "Concat", "Expand"))
    draft.nodes += [
        helper.make_node("Shape", [batch], [frames], f"{begin}/Shape", start=0, end=1),
        helper.make_node("Concat", [frames, sides], [shape], f"{begin}/Concat", axis=0),
        helper.make_node("Expand", [constant, shape], [repeated], f"{begin}/Expand"),
    ]
    product.input[0] = repeated


_FUSIONS: dict[type[nn.Module], Callable[[_Draft, str, Any], None]] = {
    RMSNorm: _fuse_rms_norm,
    LayerNorm: _fuse_layer_norm,
    siglip.SelfAttention: _fuse_attention,
    siglip.MLP: _fuse_gelu_mlp,
    Projector: _fuse_projector,
    qwen2.DecoderLayer: _fuse_layer,
    qwen2.SelfAttention: _fuse_grouped_attention,
    qwen2.MLP: _fuse_gated_mlp,
}

_ANGLES = ("rotary.cos", "rotary.sin")
_HEADS = ("num_heads", "kv_num_heads")
_OPSETS = helper.make_opsetid(_DOMAIN, 1), helper.make_opsetid(_OURS, 1)


def _meaning(name: str, taken: Sequence[str], given: Sequence[str], *nodes: NodeProto) -> FunctionProto:
    opsets = [helper.make_opsetid("", OPSET), *_OPSETS]
    attributes = {attribute.ref_attr_name for node in nodes for attribute in node.attribute} - {""}
    return helper.make_function(_OURS, name, taken, given, nodes, opsets, sorted(attributes))


def _attend() -> NodeProto:
    """ONNX Runtime's attention of grouped queries over a cache, with the heads of the function that it stands in."""
    taken = ["biased", "", "", "past_key", "past_value", "last", "total", "cosines", "sines"]
    given = ["mixed", "present_key", "present_value"]
    node = helper.make_node("GroupQueryAttention", taken, given, domain=_DOMAIN, do_rotary=1)
    kind = onnx.AttributeProto.INT
    node.attribute.extend(onnx.AttributeProto(name=name, type=kind, ref_attr_name=name) for name in _HEADS)
    return node


#: What our operators take and compute, where the library that has them is not: in ONNX Runtime's own.
MEANINGS = {
    meaning.name: meaning
    for meaning in (
        _meaning("Bias", ["x", "bias"], ["y"], helper.make_node("Add", ["x", "bias"], ["y"])),
        _meaning(
            "BiasFastGelu", ["x", "bias"], ["y"], helper.make_node("FastGelu", ["x", "bias"], ["y"], domain=_DOMAIN)
        ),
        _meaning(
            "SwiGLU",
            ["gate", "up"],
            ["y"],
            helper.make_node("QuickGelu", ["gate"], ["silu"], domain=_DOMAIN, alpha=1.0),
            helper.make_node("Mul", ["silu", "up"], ["y"]),
        ),
        _meaning(
            "CachedAttention",
            ["packed", "bias", "past_key", "past_value", "last", "total", "cosines", "sines"],
            ["mixed", "present_key", "present_value"],
            helper.make_node("Add", ["packed", "bias"], ["biased"]),
            _attend(),
        ),
    )
}


def _tabulate_angles(draft: _Draft, path: str, context: int) -> None:
    """Cosines and sines of every position, [context, width of a head / 2] each."""
    angles = torch.arange(context).float().unsqueeze(1) * draft.graph.weights[f"{path}.inv_freq"]()
    for name, values in zip(_ANGLES, (angles.cos(), angles.sin()), strict=True):
        draft.constant(name, values.to(draft.dtype))


def _hold_cache(draft: _Draft, spec: GraphSpec) -> GraphSpec:
    """The decoder's tensors where its cache is appended to in place; inside, there is a batch of one sequence."""
    embeddings, _, *past = spec.inputs
    head = draft.product("lm_head")
    last, axis = head.input[0], draft.constant("batch", torch.tensor([0]))
    batched, single = f"{embeddings.name}.batched", f"{last}.single"
    draft.rename(embeddings.name, batched, draft.nodes)
    draft.rename(last, single, [head])
    draft.nodes.append(helper.make_node("Unsqueeze", [embeddings.name, axis], [batched], "/batch/Unsqueeze"))
    draft.nodes.append(helper.make_node("Squeeze", [last, axis], [single], "/batch/Squeeze"))
    held = [replace(tensor, shape=(1, *tensor.shape)) for tensor in past]
    present = [replace(tensor, name=_present(tensor.name)) for tensor in held]
    return replace(spec, inputs=(embeddings, _LAST, _BOUND, *held), outputs=(spec.outputs[0], *present))


def _present(past: str) -> str:
    return past.replace("past", "present", 1)


def _node(
    path: str, op: str, taken: Sequence[str], given: str, domain: str = _DOMAIN, **attributes: float
) -> NodeProto:
    return helper.make_node(op, taken, [given], f"{_scope(path)}/{op}", domain=domain, **attributes)


def _scope(path: str) -> str:
    """What the exporter calls the nodes of a module; a list is not one, its members are."""
    return f"/{re.sub(r'[.](?![0-9])', '/', path)}" if path else ""
