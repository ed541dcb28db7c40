"""Random matrices in the formats of tango/linear.h, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tango_plugins.device_array import DeviceArray
from tango_plugins.matrix import Matrix

#: Formats by name: bits, block (0: a scale for each output), and whether there are zero points. Of those that end in
#: INTERLEAVED, blocks are in the order of tango_interleave_enqueue.
FORMATS = {
    "int8": (8, 0, False),
    "int4-32": (4, 32, False),
    "int4-64": (4, 64, False),
    "int4-128": (4, 128, False),
    "int4-32-zeros": (4, 32, True),
    "int4-128-zeros": (4, 128, True),
    "int8-32": (8, 32, False),
    "int8-128-zeros": (8, 128, True),
    "int4-32-zeros-interleaved": (4, 32, True),
    "int4-128-interleaved": (4, 128, False),
    "int8-32-interleaved": (8, 32, False),
}
INTERLEAVED = "-interleaved"


@dataclass
class Quantized:
    """A matrix as tensors.

    Attributes:
        given: It as the library takes it.
        dequantized: [in, out], exact: fp16 as it is, fp32 where there are scales.
        tensors: What keeps the memory.
    """

    given: Matrix
    dequantized: torch.Tensor
    tensors: tuple[torch.Tensor, ...]


def quantized(weight, form):
    """A matrix [in, out] in a format, or fp16, or fp8; rounded without care, since any numbers will do."""
    if form == "fp16":
        return Quantized(Matrix(device_array(weight)), weight, (weight,))
    if form == "fp8":
        scale = (weight.float().abs().max() / 448).half()
        values = (weight.float().T / scale.float()).clamp(-448, 448).contiguous().to(torch.float8_e4m3fn)
        given = Matrix(device_array(values), device_array(scale), bits=8)
        return Quantized(given, (values.float() * scale.float()).T.contiguous(), (values, scale))
    bits, group, has_zeros = FORMATS[form]
    wide = weight.float()
    if not group:
        scales = wide.abs().amax(0) / 127
        values = (wide / scales).round().to(torch.int8)
        given = Matrix(device_array(values), device_array(scales), bits=8)
        return Quantized(given, values.float() * scales, (values, scales))
    inputs, outputs = wide.shape
    blocks = -(-inputs // group)
    padded = torch.nn.functional.pad(wide.T, (0, blocks * group - inputs)).reshape(outputs, blocks, group)
    middle, top = 1 << (bits - 1), (1 << bits) - 1
    if has_zeros:
        low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
        scales = ((high - low) / top).half()
        zeros = (-low / scales.float()).round().clamp(0, top)
    else:
        scales = (padded.abs().amax(-1) / (middle - 0.5)).half()
        zeros = torch.full_like(scales.float(), middle)
    values = (padded / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top)
    values[::3, :, 0], values[1::3, :, 1] = 0, top  # the whole range occurs
    exact = ((values - zeros[..., None]) * scales.float()[..., None]).reshape(outputs, -1)[:, :inputs].T.contiguous()
    if blocks * group > inputs:  # what fills up a block does not count, whatever it is
        values.reshape(outputs, -1)[:, inputs:] = top
    stored = pack(values, bits)
    stored, scales = interleaved(stored, scales) if form.endswith(INTERLEAVED) else (stored, scales.contiguous())
    tensors = [stored, scales] + ([pack(zeros, bits)] if has_zeros else [])
    given = Matrix(*map(device_array, tensors), bits=bits, group=group, interleaved=form.endswith(INTERLEAVED))
    return Quantized(given, exact, tuple(tensors))


def interleaved(values, scales):
    """Of 16 outputs each, pieces of 64 bytes [output, piece] as [piece, output], and scales [output, block] as [block,
    output]; where that does not go, both as they are."""
    outputs, blocks, size = values.shape
    if outputs % 16 or blocks * size % 64:
        return values, scales.contiguous()
    order = [
        tensor.reshape(outputs // 16, 16, -1, width).transpose(1, 2) for tensor, width in ((values, 64), (scales, 1))
    ]
    return tuple(new.reshape(old.shape).contiguous() for new, old in zip(order, (values, scales), strict=True))


def pack(values, bits):
    """Unsigned elements along the last axis as bytes, the first of two in the low half."""
    values = values.to(torch.uint8)
    if bits == 8:
        return values.contiguous()
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return (values[..., ::2] | values[..., 1::2] << 4).contiguous()


def device_array(tensor):
    assert tensor.is_contiguous()
    return DeviceArray(tensor.data_ptr(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
