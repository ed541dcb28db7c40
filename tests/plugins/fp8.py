"""FP8 for the tests of the CUDA library: random products, and the same in fp64."""

from __future__ import annotations

import ctypes

import torch
from torch.nn.functional import gelu

from tango_plugins import native_library, structs

#: FP8 as the library has it.
E4M3 = torch.float8_e4m3fn
#: The dtype's number in the C interface.
TANGO_FP8 = 2
#: Error of a sum, relative to the sum of magnitudes: of fp32, and of tensor cores. With fast accumulation these keep
#: some 14 bits of a sum each time they add 32 products to it.
FP32_SUMS, TENSOR_CORE_SUMS = 2**-17, 2**-10
#: rows, inputs, outputs.
SHAPES = [(1, 16, 16), (3, 64, 48), (70, 144, 32)]


def rounded(x, scale):
    """x / scale in FP8, as the library rounds it: saturated, NaN as it is."""
    return (x.float() * torch.tensor(1.0).div(torch.tensor(scale))).clamp(-448, 448).to(E4M3)


def check_every_number(library, scale, device="cuda"):
    """Quantizes every fp16 number, and compares the bits with torch's."""
    x = torch.arange(1 << 16).to(torch.uint16).view(torch.float16).to(device)
    y = torch.empty(x.shape, dtype=E4M3, device=device)
    assert (
        library.tango_quantize_enqueue(0, x.data_ptr(), x.numel(), TANGO_FP8, scale, y.data_ptr(), queue(device)) == 0
    )
    is_number = ~x.isnan()
    assert torch.equal(bits(y)[is_number], bits(rounded(x, scale))[is_number])
    assert y.float()[~is_number].isnan().all()


def assert_rounded(found, wide, scale):
    """FP8 is the fp32 result, rounded; where that lies in the middle of two, either."""
    assert (bits(found) == bits(rounded(wide, scale))).float().mean() > 0.99
    most = 448 * scale
    torch.testing.assert_close(found.float() * scale, wide.clamp(-most, most), rtol=0.07, atol=scale / 500)


def check_norm(rows, wide, dtype=E4M3, number=TANGO_FP8, compare=assert_rounded):
    """Compares a norm in a quantized type with the same one in fp32: it has the same sum, and that result rounded."""
    scale = 0.01
    rows.tensors["y"] = torch.empty(rows.size, dtype=dtype, device=rows.device)
    assert (wide.enqueue(), rows.enqueue(y_dtype=number, y_scale=scale)) == (0, 0), rows.library.tango_last_error()
    assert torch.equal(wide.tensors["sum"], rows.tensors["sum"])
    compare(rows.tensors["y"], wide.tensors["y"], scale)


def bits(tensor):
    """FP8 as bytes."""
    return tensor.view(torch.uint8)


def queue(device):
    """The stream that a call takes."""
    return torch.cuda.current_stream().cuda_stream if device == "cuda" else None


class Fp8Product:
    """A product; y is poisoned, and has a row more that nobody may write.

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
        x, weight = (
            torch.randn(shape, generator=generator, device=device) for shape in ((rows, inputs), (outputs, inputs))
        )
        weight[0] *= 1e-3  # beside columns of this size it still has its three bits
        self.x_scale, step = 0.01, float(weight.abs().max() / 448)
        self.x, self.weight = rounded(x, self.x_scale), rounded(weight, step)
        self.weight_scale = torch.tensor([step], device=device)
        self.y = torch.full((rows + 1, outputs), torch.nan, dtype=torch.half, device=device)
        self.shape = structs.TangoLinearShape(rows, inputs, outputs)

    def enqueue(self, x_scale=None, function="tango_fp8_linear_enqueue", **changed):
        """Runs it with another scale, by another function, or with other fields of its tensors; returns the status."""
        pointers = {name: getattr(self, name).data_ptr() for name in ("x", "weight", "weight_scale", "y")} | changed
        given = structs.TangoFp8LinearTensors(**pointers)
        scale = self.x_scale if x_scale is None else x_scale
        call = getattr(self.library, function)
        return call(ctypes.byref(self.shape), ctypes.byref(given), scale, queue(self.device))

    def check(self, sums):
        """Compares it with fp64, to fp16's rounding and an error of sums, and that it ends where it should."""
        assert self.enqueue() == 0, self.library.tango_last_error()
        wanted, size = self.wanted(self.x_scale)
        error = (self.y[:-1].double() - wanted).abs()
        assert (error <= 2**-11 * 1.02 * wanted.abs() + sums * size + 3e-8).all(), (error / size).max()
        assert self.y[-1].isnan().all()

    def check_gelu(self, sums):
        """The same for the product that GELU follows: FP8 rounds once, and a GPU's tanh is an approximation."""
        x_scale, y_scale = self.x_scale * self.shape.inputs**-0.5, 0.02  # u is about 1
        generator = torch.Generator(self.device).manual_seed(0)
        bias = torch.randn(self.shape.outputs, generator=generator, device=self.device).half()
        factor = torch.tensor([1 / y_scale], device=self.device)
        y = self.y.to(E4M3)
        pointers = {"bias": bias.data_ptr(), "y_factor": factor.data_ptr(), "y": y.data_ptr()}
        assert self.enqueue(x_scale, "tango_fp8_linear_gelu_enqueue", **pointers) == 0, self.library.tango_last_error()
        product, size = self.wanted(x_scale)
        u = product + bias.double()
        wanted = gelu(u, approximate="tanh").clamp(-448 * y_scale, 448 * y_scale)
        error = (y[:-1].double() * y_scale - wanted).abs()
        assert (error <= wanted.abs() / 16 + y_scale / 2**10 + 1.2 * sums * size + 2**-11 * u.abs()).all(), error.max()
        assert (bits(y[:-1]) == bits(rounded(wanted, y_scale))).float().mean() > 0.9
        assert y[-1].isnan().all()

    def wanted(self, x_scale):
        """The product in fp64, and the sum of magnitudes."""
        scale = x_scale * self.weight_scale.double()
        x, weight = self.x.double(), self.weight.double().T
        return x @ weight * scale, x.abs() @ weight.abs() * scale
