"""Rows to be gathered, on a GPU or in the emulator."""

from __future__ import annotations

import torch

#: Rows after the last that must stay as they are.
GUARD = 2


def row_tensors(dtype, width, device="cpu"):
    """Rows, a filler, an order with row ends in it, and memory for the result that is too long."""
    generator = torch.Generator().manual_seed(width)
    rows, filler = (torch.randn(n, width, generator=generator).to(dtype) for n in (40, 1))
    order = torch.randint(-1, 40, (90,), generator=generator, dtype=torch.int32)
    order[[0, 17, 89]] = -1
    gathered = torch.full((90 + GUARD, width), 7.0, dtype=dtype)
    return tuple(tensor.to(device) for tensor in (rows, filler, order, gathered))


def gather(library, rows, filler, order, gathered, stream=None):
    addresses = rows.data_ptr(), filler.data_ptr(), order.data_ptr()
    row_bytes = rows.shape[1] * rows.element_size()
    return library.tango_rows_gather_enqueue(*addresses, len(order), row_bytes, gathered.data_ptr(), stream)


def assert_gathered(rows, filler, order, gathered):
    expected = torch.where(order[:, None] < 0, filler, rows[order.long()])
    assert torch.equal(gathered[: len(order)], expected)
    assert (gathered[len(order) :] == 7.0).all()
