"""Products of random rows with quantized matrices, and the same in fp64."""

from __future__ import annotations

import ctypes

import torch

from tango_plugins import native_library, structs
from tests.plugins.matrices import quantized

#: rows, inputs, outputs: tails of every tile, one row, and rows that are no multiple of 16 bytes.
SHAPES = [(1, 32, 8), (3, 64, 128), (17, 100, 72), (70, 48, 33), (130, 136, 144), (65, 20, 130)]
#: rows, inputs, outputs, and outputs of the widest slab: one slab, equal ones, a narrow last one, rows and columns of
#: no multiple of 16 bytes, and more inputs than a warp takes at a time.
SLABS = [(9, 64, 40, 40), (17, 100, 256, 128), (10, 136, 328, 200), (12, 20, 130, 128), (9, 1100, 131, 128)]


class Product:
    """A product; y is poisoned, and has a row more that nobody may write.

    Args:
        rows: Of x.
        inputs: Its width.
        outputs: Width of the product.
        form: Format of the matrix; see tests.plugins.matrices.
        path: The CUDA library; None takes the installed one.
        device: Device of all tensors.
        seed: Seed of all random numbers.
        room: Outputs that the workspace has room for; 0: there is none.
    """

    def __init__(self, rows, inputs, outputs, form, path=None, device="cuda", seed=0, room=0):
        generator = torch.Generator(device).manual_seed(seed)
        self.library, self.device = native_library.load(path), device
        self.x = torch.randn(rows, inputs, generator=generator, device=device).half()
        weight = torch.randn(inputs, outputs, generator=generator, device=device) * inputs**-0.5
        self.form, self.matrix = form, quantized(weight.half(), form)
        self.y = torch.full((rows + 1, outputs), torch.nan, dtype=torch.half, device=device)
        self.shape = structs.TangoLinearShape(rows, inputs, outputs)
        self.struct = self.matrix.given.struct("weight", inputs, outputs)
        self.room = room
        self.workspace = torch.full((-(-room // 8) * 8 * -(-inputs // 8) * 8 + 8,), torch.nan, device=device).half()

    @property
    def workspace_bytes(self):
        """Those of ``room``; eight numbers more are nobody's."""
        return 2 * (self.workspace.numel() - 8)

    def enqueue(self, **changed):
        given = {"shape": self.shape, "matrix": self.struct, "x": self.x.data_ptr(), "y": self.y.data_ptr()}
        given |= {"workspace": self.workspace.data_ptr() if self.room else None}
        given |= {"workspace_bytes": self.workspace_bytes} | changed
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None
        return self.library.tango_linear_enqueue(*given.values(), stream)

    def reference(self):
        """In fp64, with weights rounded to fp16 as the kernel has them: all but INT8 in registers."""
        weight, exact = self.matrix.dequantized, self.form == "int8" and not self.room
        return self.x.double() @ (weight if exact else weight.half()).double()

    def wanted_workspace(self):
        """Bytes that the library would take."""
        size = ctypes.c_size_t()
        assert self.library.tango_linear_workspace(self.shape, ctypes.byref(size)) == 0
        return size.value


def check(product):
    """Compares a product with fp64, to fp16's rounding, and that it ends where it should."""
    assert product.enqueue() == 0, product.library.tango_last_error()
    found, wanted = product.y[:-1].double(), product.reference()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-4)
    assert product.y[-1].isnan().all()
    assert product.workspace[-8:].isnan().all()
