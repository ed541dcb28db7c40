"""Pieces of a sequence → its embeddings on the device."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_plugins.decoder import MAX_SEQUENCES, Words
from tango_plugins.device_array import DeviceArray
from tango_runtime.backends.cuda.device import MAX_UPLOADS, HostPool, Pool, Stream, rows
from tango_runtime.bundle import MANIFEST, Bundle

#: Bytes of pinned memory for rotary positions or times: enough for 8,192 of them.
_SMALL = 1 << 16


@dataclass(frozen=True)
class TokenIds:
    """Token ids [N] that are embedded where they are needed: the text takes no memory of its own."""

    ids: NDArray[np.int64]


#: A part of a sequence: embeddings [N, D] on the device, token ids, or embeddings on the host.
Piece = DeviceArray | TokenIds | NDArray[Any]


def word_table(bundle: Bundle) -> NDArray[Any]:
    """The embedding table [words, D], mapped from its file: a token takes one row of it, a GPU needs no copy.

    Raises:
        TangoError: bundle.json does not say where it is.
    """
    spec = bundle.manifest.graphs["embed"]
    if len(spec.weights or {}) != 1:
        raise TangoError(
            f"{bundle.path / MANIFEST} does not say where the table of embed is", "export the bundle again"
        )
    (place,) = (spec.weights or {}).values()
    with bundle.file(spec.data).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED)  # read from the disk now, and not with each new token
    return np.frombuffer(mapped, place.dtype, math.prod(place.shape), place.offset).reshape(place.shape)


class Embedder:
    """Lays out the pieces of a sequence contiguously.

    Args:
        table: The embedding table [words, D], on the host.
        stream: What copies run on.
        pool: Gives the memory.
    """

    def __init__(self, table: NDArray[Any], stream: Stream, pool: Pool) -> None:
        self._table, self._stream, self._pool = table, stream, pool
        self._pinned = HostPool(_SMALL)
        # Of decode steps. More than are under way at a time, so none is written before it has been read.
        staged = HostPool().take((MAX_UPLOADS + 1, MAX_SEQUENCES, table.shape[1]), table.dtype)
        self._staged = cycle(staged)
        whole = pool.take("step embeddings", staged.shape[1:], table.dtype)
        self._steps = [rows(whole, 0, count) for count in range(MAX_SEQUENCES + 1)]
        self._step_rows = [rows(whole, i, i + 1) for i in range(MAX_SEQUENCES)]

    def __call__(self, pieces: Sequence[Piece]) -> DeviceArray:
        """All pieces, [N, D]; they last until the next call."""
        lengths = [len(piece.ids) if isinstance(piece, TokenIds) else piece.shape[0] for piece in pieces]
        whole = self._pool.take("embeddings", (sum(lengths), self._table.shape[1]), self._table.dtype)
        begin = 0
        for piece, length in zip(pieces, lengths, strict=True):
            self._put(piece, rows(whole, begin, begin + length))
            begin += length
        return whole

    def step(self, tokens: Sequence[int]) -> list[DeviceArray]:
        """The embedding [1, D] of each token of a decode step; they last until the next step."""
        count, staged = len(tokens), next(self._staged)
        for i, token in enumerate(tokens):
            staged[i] = self._table[token]
        self._stream.upload(staged[:count], self._steps[count])
        return self._step_rows[:count]

    def words(self, stop: Sequence[int]) -> Words:
        """What a step that begins on the device's own finding takes an embedding from; ``stop`` ends sequences."""
        row, mail = HostPool().take(self._table.shape[1:], self._table.dtype), HostPool().take((2,), np.uint32)
        return Words(self._table, row, mail, self._step_rows[0], stop)

    def upload(self, array: NDArray[Any], to: DeviceArray) -> None:
        """Copies a small array to the device through pinned memory: from other memory, a copy may wait."""
        staged = self._pinned.take(to.shape, to.dtype)
        staged[:] = array
        self._stream.upload(staged, to)

    def _put(self, piece: Piece, to: DeviceArray) -> None:
        if isinstance(piece, DeviceArray):
            self._stream.copy(piece, to)
        elif isinstance(piece, TokenIds):
            self.upload(self._table[piece.ids], to)
        else:  # embeddings on the host, as an evaluation's baselines make them
            self._stream.upload(piece, to)
