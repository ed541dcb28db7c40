"""Products of fp16 matrices for the tests of the CUDA library, and the same in fp64."""

from __future__ import annotations

import ctypes

import torch
from torch.nn.functional import gelu

from tango_plugins import native_library, structs

#: The functions: of a product, and of one that a bias and GELU follow.
LINEAR, LINEAR_GELU = "tango_fp16_linear_enqueue", "tango_fp16_linear_gelu_enqueue"
#: rows, inputs, outputs: one of each, tails of every tile, and rows that are no multiple of 16 bytes.
SHAPES = [(1, 1, 1), (1, 32, 8), (3, 64, 128), (17, 100, 72), (70, 48, 33), (65, 21, 130), (5, 7, 3)]
#: The same with widths that a GELU takes.
GELU_SHAPES = [(1, 8, 8), (1, 32, 8), (3, 64, 128), (17, 104, 72), (70, 48, 40), (65, 24, 136)]
#: Error of a sum in fp32, relative to the sum of magnitudes; one in fp16 has 2^-11 after each step.
SUMS = 2**-17


class Fp16Product:
    """A product; y is poisoned, and has a row more that nobody may write.

    Args:
        rows: Of x.
        inputs: Its width.
        outputs: Width of the product.
        path: The CUDA library; None takes the installed one.
        device: Device of all tensors.
        skew: Elements by which each tensor begins after an aligned address.
    """

    def __init__(self, rows, inputs, outputs, path=None, device="cuda", skew=0):
        self.library, self.device = native_library.load(path), device
        generator = torch.Generator(device).manual_seed(rows)

        def random(*size, scale=1.0):
            return skewed(torch.randn(*size, generator=generator, device=device) * scale, skew)

        self.x, self.weight = random(rows, inputs), random(inputs, outputs, scale=inputs**-0.5)
        self.bias = random(outputs)
        self.y = skewed(torch.full((rows + 1, outputs), torch.nan, device=device), skew)
        self.shape = structs.TangoLinearShape(rows, inputs, outputs)

    def enqueue(self, function=LINEAR, **changed):
        """Runs it, with other fields of its tensors; returns the status."""
        tensors = {name: getattr(self, name).data_ptr() for name in ("x", "weight", "y")}
        tensors |= {"bias": self.bias.data_ptr() if function == LINEAR_GELU else None} | changed
        given = structs.TangoFp16LinearTensors(**tensors)
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None
        return getattr(self.library, function)(ctypes.byref(self.shape), ctypes.byref(given), stream)

    def check(self, function=LINEAR):
        """Compares it with fp64, to fp16's rounding, and that it ends where it should; a GPU's tanh is approximate."""
        assert self.enqueue(function) == 0, self.library.tango_last_error()
        x, weight, bias = self.x.double(), self.weight.double(), self.bias.double() * (function == LINEAR_GELU)
        u, size = x @ weight + bias, x.abs() @ weight.abs() + bias.abs()
        wanted, tanh = (gelu(u, approximate="tanh"), 2**-11) if function == LINEAR_GELU else (u, 0)
        error = (self.y[:-1].double() - wanted).abs()
        allowed = 2**-11 * 1.02 * wanted.abs() + 1.2 * SUMS * size + tanh * u.abs() + 3e-8
        assert (error <= allowed).all(), (error / allowed).max()
        assert self.y[-1].isnan().all()


def skewed(values, skew):
    """A contiguous tensor in fp16 that begins some elements after an address aligned to 256 bytes."""
    memory = torch.empty(values.numel() + 256, dtype=torch.half, device=values.device)
    begin = -memory.data_ptr() % 256 // 2 + skew
    tensor = memory[begin : begin + values.numel()].view(values.shape)
    return tensor.copy_(values)
