"""Pieces of a sequence → its embeddings on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tango_plugins.device_array import DeviceArray
from tango_runtime.backends.cuda.device import HostPool, Pool, Stream, rows
from tango_runtime.backends.cuda.runner import GraphRunner, Run

#: Bytes of pinned memory for token ids or times: enough for 8,192 of them.
_SMALL = 1 << 16


@dataclass(frozen=True)
class TokenIds:
    """Token ids [N] that are embedded where they are needed: the text takes no memory of its own."""

    ids: NDArray[np.int64]


#: A part of a sequence: embeddings [N, D] on the device, token ids, or embeddings on the host.
Piece = DeviceArray | TokenIds | NDArray[Any]


class Embedder:
    """Lays out the pieces of a sequence contiguously.

    Args:
        graphs: Runs the embedding graph.
        stream: Its stream.
        pool: Gives the memory.
        hidden_size: D.
        dtype: Element type of the embeddings.
    """

    def __init__(self, graphs: GraphRunner, stream: Stream, pool: Pool, hidden_size: int, dtype: str) -> None:
        self._graphs, self._stream, self._pool = graphs, stream, pool
        self._hidden_size, self._dtype = hidden_size, dtype
        self.ids_dtype = graphs.dtype("embed", "ids")
        self._pinned = HostPool(_SMALL)
        self._bound: tuple[dict[str, DeviceArray], Run] | None = None

    def __call__(self, pieces: Sequence[Piece]) -> DeviceArray:
        """All pieces, [N, D]; they last until the next call."""
        lengths = [len(piece.ids) if isinstance(piece, TokenIds) else piece.shape[0] for piece in pieces]
        whole = self._pool.take("embeddings", (sum(lengths), self._hidden_size), self._dtype)
        begin = 0
        for piece, length in zip(pieces, lengths, strict=True):
            self._put(piece, rows(whole, begin, begin + length))
            begin += length
        return whole

    def embed(self, ids: DeviceArray, embeddings: DeviceArray) -> None:
        """Runs the embedding graph; it is bound anew only where the tensors differ from those of the last run."""
        tensors = {"ids": ids, "embeddings": embeddings}
        if self._bound is None or self._bound[0] != tensors:
            self._bound = tensors, self._graphs.bind("embed", tensors)
        self._bound[1]()

    def upload(self, array: NDArray[Any], to: DeviceArray) -> None:
        """Copies a small array to the device through pinned memory: from other memory, a copy may wait."""
        staged = self._pinned.take(to.shape, to.dtype)
        staged[:] = array
        self._stream.upload(staged, to)

    def _put(self, piece: Piece, to: DeviceArray) -> None:
        if isinstance(piece, DeviceArray):
            self._stream.copy(piece, to)
        elif isinstance(piece, TokenIds):
            self._put_ids(piece.ids, to)
        else:  # embeddings on the host, as an evaluation's baselines make them
            self._stream.upload(piece, to)

    def _put_ids(self, ids: NDArray[np.int64], to: DeviceArray) -> None:
        most = self._graphs.tokens_at_once
        for begin in range(0, len(ids), most):
            part = ids[begin : begin + most]
            on_device = self._pool.take("ids", part.shape, self.ids_dtype)
            embeddings = self._pool.take("words", (len(part), self._hidden_size), self._dtype)
            self.upload(part, on_device)
            self.embed(on_device, embeddings)
            self._stream.copy(embeddings, rows(to, begin, begin + len(part)))
