"""Prompts to be thinned, on a GPU or in the emulator, and the reference."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from tango_plugins.structs import TangoThinShape, TangoThinTensors
from tango_plugins.thinning import Thinning, thin

DTYPES = (torch.float16, torch.float32)
#: Of the largest value: fp32 sums, and fp16 rounded once.
TOLERANCES = {torch.float16: 2**-10, torch.float32: 1e-6}
#: Rows of the prompt, the first of the video, how many, how many stay, width.
CASES = [
    (90, 7, 70, 35, 72),
    (150, 0, 150, 75, 33),
    (40, 10, 20, 20, 16),
    (40, 10, 20, 0, 16),
    (9, 4, 0, 0, 8),
    (70, 3, 66, 1, 8),
    (300, 20, 270, 81, 40),
]


class Prompt:
    """A prompt on a device, with poisoned outputs that are too long."""

    def __init__(self, rows, begin, count, kept, width, dtype, device="cpu", equal=False):
        generator = torch.Generator().manual_seed(rows + width)
        x = torch.randn(rows, width, generator=generator)
        if equal:  # rows and shares repeat: all ties
            x, share = x[torch.arange(rows) % 5], torch.full((rows,), 0.25)
        else:
            share = torch.rand(rows, generator=generator)
        self.thinning, self.shape = Thinning(begin, count, kept), (rows, begin, count, kept, width, DTYPES.index(dtype))
        self.stays = rows - count + kept
        self.x, self.share = x.to(dtype).to(device), share.to(device)
        self.thinned = torch.full((self.stays + 2, width), 7.0, dtype=dtype, device=device)
        self.stay = torch.full((self.stays + 2,), -7, dtype=torch.int32, device=device)

    def enqueue(self, library, stream=None):
        """Status of the call, with a workspace full of garbage."""
        shape, size = TangoThinShape(*self.shape), ctypes.c_size_t()
        assert library.tango_thin_workspace(ctypes.byref(shape), ctypes.byref(size)) == 0
        memory = torch.full((size.value + 256,), 255, dtype=torch.uint8, device=self.x.device)
        address = -(-memory.data_ptr() // 256) * 256
        tensors = TangoThinTensors(*(t.data_ptr() for t in (self.x, self.share, self.thinned, self.stay)))
        self.workspace = memory
        return library.tango_thin_enqueue(ctypes.byref(shape), ctypes.byref(tensors), address, size.value, stream)

    def check(self):
        """The reference's rows, in their order; nothing after them is written."""
        rows, stay = thin(self.x.double().cpu().numpy(), self.share.cpu().numpy(), self.thinning)
        np.testing.assert_array_equal(self.stay.cpu()[: self.stays], stay)
        found = self.thinned.cpu()[: self.stays].double().numpy()
        np.testing.assert_allclose(found, rows, rtol=0, atol=TOLERANCES[self.x.dtype] * np.abs(rows).max())
        assert (self.thinned[self.stays :] == 7.0).all()
        assert (self.stay[self.stays :] == -7).all()
