"""The forms of a graph: from each kind of layer to the function that writes its nodes."""

from __future__ import annotations

from dataclasses import replace

from tango_export.graph import device, device_patches, patches, portable
from tango_export.graph.builder import Form
from tango_export.graph.operators import FUNCTIONS

#: Standard ONNX.
PORTABLE = Form(
    opsets={"": 17},
    functions={},
    linear=portable.linear,
    add_bias=portable.add_bias,
    layer_norm=portable.layer_norm,
    rms_norm=portable.rms_norm,
    wide_rms_norm=portable.wide_rms_norm,
    gelu=portable.gelu,
    gelu_tanh=portable.gelu_tanh,
    swiglu=portable.swiglu,
    attention=portable.attention,
    patch_pixels=patches.patch_pixels,
    patch_grid=patches.patch_grid,
    patch_query_key=patches.patch_query_key,
    patch_attention=patches.patch_attention,
    constant_matmul=portable.constant_matmul,
    start_decoder=portable.start_decoder,
    cached_attention=portable.cached_attention,
    last_position=portable.last_position,
)

#: The portable form for TensorRT: what differs is what it fuses only if it is written so.
TENSORRT = replace(PORTABLE, attention=portable.attention_in_one_kernel)

#: Standard ONNX, and the CUDA library's operators.
DEVICE = Form(
    opsets=device.OPSETS,
    functions=FUNCTIONS,
    linear=device.linear,
    add_bias=device.add_bias,
    layer_norm=device.layer_norm,
    rms_norm=device.rms_norm,
    wide_rms_norm=device.wide_rms_norm,
    gelu=device.gelu,
    gelu_tanh=device.gelu_tanh,
    swiglu=device.swiglu,
    attention=device.attention,
    patch_pixels=device_patches.patch_pixels,
    patch_grid=device_patches.patch_grid,
    patch_query_key=device_patches.patch_query_key,
    patch_attention=device_patches.patch_attention,
    constant_matmul=device.constant_matmul,
    start_decoder=device.start_decoder,
    cached_attention=device.cached_attention,
    last_position=device.last_position,
)
