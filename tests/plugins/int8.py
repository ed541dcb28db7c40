"""INT8 for the tests of the CUDA library: what it rounds, and products of random integers with their exact sums."""

from __future__ import annotations

from functools import partial

import torch

from tango_plugins import native_library, structs
from tango_plugins.matrix import Matrix
from tests.plugins import fp8
from tests.plugins.fp8 import queue
from tests.plugins.matrices import device_array

#: The dtype's number in the C interface.
TANGO_INT8 = 3
#: rows, inputs, outputs: tails of every tile, one row, rows that are multiples of 16 bytes and others, and more than 8
#: blocks of rows, which go through the columns in groups.
SHAPES = [
    (1, 32, 8),
    (1, 16, 16),
    (3, 64, 128),
    (70, 48, 32),
    (130, 208, 144),
    (17, 100, 72),
    (70, 48, 33),
    (130, 136, 144),
    (65, 19, 130),
    (2, 1, 1),
    (580, 16, 130),
]


def rounded(x, scale):
    """x / scale in INT8 as ONNX's QuantizeLinear has it; NaN is 0."""
    step = torch.tensor(scale, dtype=torch.float32, device=x.device)  # by a number, torch multiplies by its inverse
    return (x.float() / step).round().clamp(-128, 127).nan_to_num(0).to(torch.int8)


def assert_rounded(found, wide, scale):
    """INT8 is the fp32 result, rounded; where that lies in the middle of two, either."""
    off = (found.int() - rounded(wide, scale).int()).abs()
    assert off.max() <= 1
    assert (off == 0).float().mean() > 0.999


def check_every_number(library, scale, device="cuda"):
    """Quantizes every fp16 number."""
    x = torch.arange(1 << 16).to(torch.uint16).view(torch.float16).to(device)
    y = torch.empty(x.shape, dtype=torch.int8, device=device)
    arguments = x.data_ptr(), x.numel(), TANGO_INT8, scale, y.data_ptr(), queue(device)
    assert library.tango_quantize_enqueue(0, *arguments) == 0
    assert torch.equal(y, rounded(x, scale))


#: As :func:`tests.plugins.fp8.check_norm`.
check_norm = partial(fp8.check_norm, dtype=torch.int8, number=TANGO_INT8, compare=assert_rounded)


class Int8Product:
    """A product of integers over the whole range; y is poisoned, and has a row more that nobody may write.

    Args:
        rows: Of x.
        inputs: Its width.
        outputs: Width of the product.
        path: The CUDA library; None takes the installed one.
        device: Device of all tensors.
    """

    def __init__(self, rows, inputs, outputs, path=None, device="cuda"):
        generator = torch.Generator(device).manual_seed(rows)
        self.library, self.device = native_library.load(path), device
        self.x, self.weight = (
            torch.randint(-128, 128, shape, generator=generator, device=device, dtype=torch.int8)
            for shape in ((rows, inputs), (inputs, outputs))
        )
        self.scales = torch.rand(outputs, generator=generator, device=device) * 1e-4 + 1e-6
        self.x_scale = 0.0123
        self.y = torch.full((rows + 1, outputs), torch.nan, dtype=torch.half, device=device)
        self.shape = structs.TangoLinearShape(rows, inputs, outputs)
        given = Matrix(device_array(self.weight), device_array(self.scales), bits=8)
        self.matrix = given.struct("weight", inputs, outputs)

    def enqueue(self, **changed):
        """Runs it, with some other arguments; returns the status."""
        given = {"shape": self.shape, "matrix": self.matrix, "x": self.x.data_ptr(), "x_scale": self.x_scale}
        given |= {"y": self.y.data_ptr()} | changed
        return self.library.tango_int8_linear_enqueue(*given.values(), queue(self.device))

    def wanted(self):
        """Sums of fp64, which are exact, rounded as the header says."""
        sums = self.x.double() @ self.weight.double()
        return (sums.float() * (torch.tensor(self.x_scale, device=self.device) * self.scales)).half()

    def check(self):
        """Compares all bits, and that it ends where it should."""
        assert self.enqueue() == 0, self.library.tango_last_error()
        assert torch.equal(self.y[:-1], self.wanted())
        assert self.y[-1].isnan().all()
