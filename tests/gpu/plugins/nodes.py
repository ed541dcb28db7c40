"""A node of each operator: random inputs, attributes, outputs, and the C function that fills the outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from tango_plugins import PruneParams, native_library, op
from tests.plugins import attentions, fp16, frame_patches, linears, norms, patch_rotations, vision_attentions
from tests.plugins.norms import HALF, SINGLE
from tests.plugins.videos import video

#: Rows of every input that has a length of its own; no other length is the same.
ROWS = 37


@dataclass
class Node:
    """A node of a graph.

    Attributes:
        inputs: Tensors by name, in order.
        outputs: The same. One that has an input's memory is that tensor.
        call: Enqueues the C function on the current stream; returns its status.
        attributes: The operator's.
    """

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    call: Callable[[], int]
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def in_place(self) -> dict[str, str]:
        """The input whose memory an output has, by the output's name."""
        owners = {tensor.data_ptr(): name for name, tensor in self.inputs.items()}
        return {name: owners[t.data_ptr()] for name, t in self.outputs.items() if t.data_ptr() in owners}


def elementwise(function, *before, parts=("x", "bias"), after=(), by_size=False, device="cuda", **attributes):
    """A C function of rows [ROWS, 1152] in fp16, and of what belongs to a row, each of which has a bias in its name."""
    generator = torch.Generator(device).manual_seed(0)
    inputs = {
        name: torch.randn(*((1152,) if "bias" in name else (ROWS, 1152)), generator=generator, device=device).half()
        for name in parts
    }
    y = torch.empty(ROWS, 1152, dtype=torch.half, device=device)
    sizes = (y.numel(),) if by_size else y.shape

    def call():
        addresses = [tensor.data_ptr() for tensor in inputs.values()]
        stream = torch.cuda.current_stream().cuda_stream
        return getattr(native_library.load(), function)(0, *before, *addresses, *sizes, *after, y.data_ptr(), stream)

    return Node(inputs, {"y": y}, call, attributes)


def norm(kind, types, without=(), device="cuda", **attributes):
    found = norms.Rows(kind, ROWS, 1152, types, without, device=device)
    inputs = {name: tensor for name, tensor in found.tensors.items() if name not in ("sum", "y")}
    outputs = {name: found.tensors[name] for name in ("y", "sum") if name in found.tensors}
    return Node(inputs, outputs, found.enqueue, {"epsilon": norms.EPSILON, **attributes})


def vision(shape, device="cuda"):
    found = vision_attentions.Vision(shape, device=device)
    return _of_patches(found, {"qkv": found.tensors["query"], "bias": found.bias}, shape.frames, shape.tokens)


def windows(shape, device="cuda"):
    found = vision_attentions.Vision(shape, device=device, rotates=True)
    inputs = {"qkv": found.tensors["query"], "bias": found.bias}
    inputs |= {name: found.tensors[name] for name in ("cosines", "sines")}
    return _of_patches(found, inputs, shape.frames, shape.rows, shape.columns, window=shape.window)


def frames(shape, device="cuda"):
    whole = vision_attentions.Vision(shape, device=device, rotates=True)
    found = vision_attentions.rotated_apart(whole)
    inputs = {name: found.tensors[name] for name in ("query", "key")}
    inputs |= {"qkv": whole.tensors["query"], "bias": whole.bias}
    return _of_patches(found, inputs, shape.frames, shape.tokens)


def _of_patches(found, inputs, *lengths, **attributes):
    """A node whose rows have the lengths as axes; a packed tensor begins with the queries."""
    inputs = {name: x.view(*lengths, -1) if name in ("query", "key", "qkv") else x for name, x in inputs.items()}
    outputs = {"y": found.tensors["attn_out"].view(*lengths, -1)}
    return Node(inputs, outputs, found.enqueue, {"num_heads": found.shape.heads, **attributes})


def rotation(dtype, device="cuda"):
    shape = patch_rotations.Shape(3, ROWS, 4, 80)
    found = patch_rotations.Rotation(shape, device=device)
    outputs = found.outputs(dtype)
    return Node(found.tensors, outputs, partial(found.enqueue, dtype, **outputs), {"num_heads": shape.heads})


def patches(device="cuda"):
    found = frame_patches.Patches(frame_patches.Shape(3, 2, 28, 42, 14), device=device)
    inputs = {name: found.tensors[name] for name in ("pixels", "mean", "deviation")}
    return Node(inputs, {"patches": found.tensors["patches"]}, found.enqueue, {"size": found.shape.size})


def product(form, device="cuda"):
    found = linears.Product(ROWS, 256, 320, form, device=device)
    tensors = dict(zip(("weight", "scales", "zeros"), found.matrix.tensors, strict=False))
    bits = {"bits": found.matrix.given.bits} if found.matrix.given.group else {}
    return Node({"x": found.x, **tensors}, {"y": found.y[:-1]}, found.enqueue, bits)


def linear(function, device="cuda"):
    found = fp16.Fp16Product(ROWS, 256, 320, device=device)
    inputs = {"x": found.x, "weight": found.weight} | ({"bias": found.bias} if function == fp16.LINEAR_GELU else {})
    return Node(inputs, {"y": found.y[:-1]}, partial(found.enqueue, function))


def attention(positioned, device="cuda"):
    shape = attentions.Shape(ROWS, 14, 2, 64, 512)
    found = attentions.Pass(shape, 40, device=device, positioned=positioned)
    held = found.tensors
    inputs = {name: held[name] for name in ("qkv", "bias", "keys", "values", "last", "cosines", "sines")}
    outputs = {"attn_out": held["attn_out"], "present_keys": held["keys"], "present_values": held["values"]}
    heads = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
    return Node(inputs, outputs, found.enqueue, heads)


def shares(device="cuda"):
    shape = attentions.Shape(ROWS, 14, 2, 64, 512)
    found = attentions.Pass(shape, 40, device=device)
    found.tensors["keys"].nan_to_num_()
    y = torch.empty(shape.heads, shape.capacity, device=device)

    def call():
        status, given = found.shares()
        y.copy_(given)
        return status

    inputs = {name: found.tensors[name] for name in ("qkv", "bias", "keys", "last", "cosines", "sines")}
    return Node(inputs, {"shares": y}, call, {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads})


def prune(device="cuda"):
    from tango_plugins.pruner import CudaPruner

    params = PruneParams(grid=(8, 8), retention_ratio=0.2, budget="exact")
    arrays = video(ROWS, params.grid, 128, cuts={9, 20}, dtype=np.float16)
    inputs = {n: torch.from_numpy(array).to(device) for n, array in zip(op.INPUTS, arrays, strict=True)}
    pruner = CudaPruner(params, ROWS, 128)
    kept = pruner.capacity
    outputs = {
        "tokens": torch.empty(kept, 128, dtype=torch.half, device=device),
        "indices": torch.empty(kept, dtype=torch.int32, device=device),
        "count": torch.empty((), dtype=torch.int32, device=device),
    }
    workspace = torch.empty(pruner.workspace_bytes, dtype=torch.uint8, device=device)

    def call():
        stream = torch.cuda.current_stream().cuda_stream
        count = outputs["count"].view(1)
        pruner.enqueue(*inputs.values(), **outputs | {"count": count}, workspace=workspace, stream=stream)
        return 0

    return Node(inputs, outputs, call, {k: v for k, v in op.node_attributes(params).items() if "plugin" not in k})


_GATES = ("gate", "gate_bias", "up", "up_bias")
_TOWER = vision_attentions.Shape(3, 1, 729, 4, 72)
_PATCHES = vision_attentions.Shape(3, 6, 10, 4, 80, 4)
_FRAMES = vision_attentions.Shape(3, 1, 60, 4, 80)

#: What makes a node, by the operator's name.
NODES: dict[str, Callable[..., Node]] = {
    "Bias": partial(elementwise, "tango_bias_enqueue"),
    "BiasGelu": partial(elementwise, "tango_bias_gelu_enqueue", 0),
    "BiasFastGelu": partial(elementwise, "tango_bias_gelu_enqueue", 1),
    "SwiGLU": partial(elementwise, "tango_swiglu_enqueue", parts=("gate", "up"), by_size=True),
    "BiasSwiGLU": partial(elementwise, "tango_bias_swiglu_enqueue", parts=_GATES, after=(0.125,), scale=0.125),
    "LayerNorm": partial(norm, "layer", (HALF, HALF, HALF), ("branch", "bias", "sum")),
    "RMSNorm": partial(norm, "rms", (HALF, HALF, HALF), ("branch", "bias", "beta", "sum")),
    "AddLayerNorm": partial(norm, "layer", (HALF, HALF, HALF)),
    "AddRMSNorm": partial(norm, "rms", (SINGLE, HALF, HALF), ("bias", "beta")),
    "WideRMSNorm": partial(norm, "rms", (SINGLE, SINGLE, HALF), ("branch", "bias", "beta", "sum")),
    "AddWideRMSNorm": partial(norm, "rms", (SINGLE, HALF, HALF), ("beta",), scale=1.0),
    "VisionAttention": partial(vision, _TOWER),
    "Patches": patches,
    "FrameAttention": partial(frames, _FRAMES),
    "WindowAttention": partial(windows, _PATCHES),
    "RotatePatches": partial(rotation, torch.half),
    "RotateQueryKey": partial(rotation, torch.float),
    "Linear": partial(linear, fp16.LINEAR),
    "LinearGelu": partial(linear, fp16.LINEAR_GELU),
    "PerChannelLinear": partial(product, "int8"),
    "BlockwiseLinear": partial(product, "int4-32"),
    "BlockwiseAffineLinear": partial(product, "int4-128-zeros"),
    "CachedAttention": partial(attention, positioned=False),
    "PositionedAttention": partial(attention, positioned=True),
    "AttentionShares": shares,
    op.NAME: prune,
}
