"""The backend on a GPU, whatever runs the graphs: features, kept tokens and caches stay there.

The host sends frames, their times and the embeddings of words, whose table it maps from its file. It reads the number
of kept tokens (unless the budget is exact), their places (if rows have ends) and, for each token, eight bytes (greedy)
or its logits. What a report shows of the pruning is read only on request.

Pruning is the CUDA library, called directly on the same stream. The bundle's prune.onnx as an engine gives the same
bits, but neither which tokens were merged nor the segments, and only at the ratio that it was built for: it is there
for programs without Python, as embed.onnx is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tango_plugins import PruneParams, native_library, op
from tango_plugins.device_array import DeviceArray
from tango_plugins.pruner import CudaPruner, Dtype
from tango_plugins.row_ends import row_order
from tango_plugins.thinning import Thinning
from tango_runtime.backends.base import PrunedTokens, Trace
from tango_runtime.backends.cuda.decoder import Decoder, SequenceDecoder
from tango_runtime.backends.cuda.device import Event, Pool, Stream, TransferStats, rows
from tango_runtime.backends.cuda.embedder import Embedder, Piece, TokenIds, word_table
from tango_runtime.backends.cuda.feature_ring import DeviceFeatureRing
from tango_runtime.backends.cuda.frames import FrameLoader
from tango_runtime.backends.cuda.kv_cache import KVCache
from tango_runtime.backends.cuda.logits import DeviceLogits
from tango_runtime.backends.cuda.row_ends import enqueue_gather
from tango_runtime.backends.cuda.runner import GraphRunner
from tango_runtime.backends.cuda.thinning_decoder import ThinningDecoder
from tango_runtime.backends.rotary import TEXT, RotaryIds
from tango_runtime.bundle import Bundle
from tango_runtime.sizing import memory
from tango_runtime.util.console import OnProgress
from tango_runtime.video.batch import FrameBatch
from tango_runtime.video.source import TimedFrame


class CudaBackend:
    """A bundle's graphs on a GPU.

    Args:
        bundle: The bundle.
        graphs: Runs its graphs.
        stream: The stream that they run on.
        nvdec: Whether the GPU decodes video files, where it can.

    Attributes:
        description: The backend, in one line.
        fallback_reason: Why ``auto`` took no faster backend, empty where this one was asked for by name.
        frame_size: (height, width) of the only frames that the graphs were built for; None for any.

    Raises:
        TangoError: The device has not enough memory.
    """

    def __init__(self, bundle: Bundle, graphs: GraphRunner, stream: Stream, *, nvdec: bool = False) -> None:
        self.description, self.fallback_reason = graphs.description, ""
        self._graphs, self._stream, self._pool = graphs, stream, Pool()
        self._load_frames = FrameLoader(stream, self._pool, nvdec=nvdec)
        self._manifest = bundle.manifest
        self.frame_size = graphs.frame_size
        self._embedder = Embedder(word_table(bundle), stream, self._pool)
        self._pruner = functools.cache(CudaPruner)
        made: type[Decoder | ThinningDecoder] = ThinningDecoder if bundle.manifest.decoder.inner else Decoder
        self._decoder: SequenceDecoder = made(bundle.manifest, graphs, self._embedder, stream, self._pool)

    @property
    def sequences(self) -> int:
        """Sequences of one decode step, at most."""
        return self._decoder.sequences

    def batch(self, sequences: int) -> None:
        """Lets decode steps have up to ``sequences`` sequences, or as many as the decoder can."""
        self._decoder.batch(sequences)

    @property
    def traffic(self) -> TransferStats:
        """Copies between host and device so far."""
        return self._stream.traffic

    def load_frames(self, timed: Iterable[TimedFrame], count: int, size: tuple[int, int]) -> FrameBatch:
        """Reads ``count`` frames of any size → frames of a size (H, W): in pinned memory, or resized on the GPU."""
        return self._load_frames(timed, count, size)

    def vision(
        self, frames: NDArray[np.uint8] | DeviceArray, on_progress: OnProgress
    ) -> tuple[DeviceArray, DeviceArray]:
        """Steps of frames [F, ...] → features [F, L, D] and salience [F, L]; ``on_progress`` gets the number done."""
        F, (height, width) = frames.shape[0], frames.shape[-3:-1]
        manifest, D = self._manifest, self._manifest.decoder.hidden_size
        L = manifest.video.step_tokens((height, width))
        video = frames if isinstance(frames, DeviceArray) else self._upload_frames(frames)
        features = self._pool.take("features", (F, L, D), manifest.dtype)
        salience = self._pool.take("salience", (F, L), np.float32)
        on_progress(0)
        most = self._graphs.steps_at_once or F
        if manifest.video.budget is not None:  # a step may be large: as many as fit a memory that does not grow with it
            item, fused = np.dtype(manifest.dtype).itemsize, self._graphs.fuses_vision
            most = min(most, memory.vision_steps_at_once(manifest, L, item, fused=fused))
        for begin in range(0, F, most):
            end = min(begin + most, F)
            named = {"frames": video, "features": features, "salience": salience}
            self._graphs.bind("vision", {name: rows(tensor, begin, end) for name, tensor in named.items()})()
            on_progress(end - begin)
        return features, salience

    def _upload_frames(self, frames: NDArray[np.uint8]) -> DeviceArray:
        video = self._pool.take("frames", frames.shape, np.uint8)
        self._stream.upload(frames, video)
        return video

    def new_ring(self, steps: int) -> DeviceFeatureRing:
        """An empty ring for ``steps`` steps of frames, on the device."""
        return DeviceFeatureRing(steps, self._stream, self._pool)

    def prune(
        self, features: DeviceArray, salience: DeviceArray, seconds: NDArray[np.float32], params: PruneParams
    ) -> PrunedTokens:
        """Features, salience and frame times in seconds → the tokens that are kept."""
        F, L, D = features.shape
        pruner = self._pruner(params, F, D, cast(Dtype, features.dtype))
        K, take = pruner.capacity, self._pool.take
        times = take("seconds", (F,), np.float32)
        self._embedder.upload(seconds, times)
        found: dict[str, Any] = {
            "tokens": take("tokens", (K, D), features.dtype),
            "indices": take("indices", (K,), np.int32),
            "count": take("count", (1,), np.int32),
            "merged": take("merged", (K,), np.uint8),
            "segments": take("segments", (F, 2), np.int32),
        }
        workspace = take("workspace", (pruner.workspace_bytes,), np.uint8)
        pruner.enqueue(features, salience, times, **found, workspace=workspace, stream=self._stream.handle)
        if params.budget == "exact":  # nothing waits: the prefill is on its way while the tower still computes
            count = op.exact_count(F, L, params)
        else:
            count = int(self._stream.download(found["count"])[0])
        tokens, indices = (rows(found[name], 0, count) for name in ("tokens", "indices"))
        return PrunedTokens(tokens, indices, count, lambda: self._trace(found, count))

    def flatten(self, features: DeviceArray) -> DeviceArray:
        """[F, L, D] → [F·L, D]."""
        F, L, D = features.shape
        return replace(features, shape=(F * L, D))

    def with_row_ends(self, kept: PrunedTokens, columns: int, end: int) -> tuple[DeviceArray, int]:
        """Kept tokens with a row end after each grid row that keeps one; the host reads where they are."""
        order = row_order(self.to_host(kept.indices), columns)
        on_device = self._pool.take("row order", order.shape, np.int32)
        self._embedder.upload(order, on_device)
        whole = self._pool.take("rows of the video", (len(order), kept.tokens.shape[1]), kept.tokens.dtype)
        enqueue_gather(kept.tokens, self._embedder([self.embed(np.array([end]))]), on_device, whole, self._stream)
        return whole, len(order)

    def embed(self, ids: NDArray[np.int64]) -> TokenIds:
        """[N] → embeddings [N, D], made when they are used."""
        return TokenIds(ids)

    def new_cache(self, capacity: int, rotary: RotaryIds = TEXT) -> KVCache:
        """An empty sequence with room for ``capacity`` positions."""
        cache: KVCache = self._decoder.new_cache(capacity, rotary)
        return cache

    def reserve(self, cache: KVCache, positions: int) -> None:
        """Makes room for ``positions`` positions in all."""
        self._decoder.reserve(cache, positions)

    def extend(self, cache: KVCache, pieces: Sequence[Piece], thinning: Thinning | None = None) -> DeviceLogits:
        """Appends embeddings, [N, D] in all → logits of the last position."""
        return self._decoder.extend(cache, pieces, thinning)

    def decode(self, cache: KVCache, token: int) -> DeviceLogits:
        """Appends one token → logits of its position."""
        return self._decoder.decode(cache, token)

    def decode_together(self, steps: Sequence[tuple[KVCache, int]]) -> list[DeviceLogits]:
        """Appends one token to each of some sequences → logits of each."""
        return self._decoder.decode_together(steps)

    def fork(self, cache: KVCache, length: int, capacity: int) -> KVCache:
        """Another sequence that begins with the first ``length`` positions of a sequence."""
        found: KVCache = self._decoder.fork(cache, length, capacity)
        return found

    def rewind(self, cache: KVCache, length: int) -> None:
        """Forgets everything after the first ``length`` positions."""
        cache.rewind(length)

    def to_host(self, tensor: Piece) -> NDArray[Any]:
        """A copy of a tensor on the host."""
        if isinstance(tensor, DeviceArray):
            return self._stream.download(tensor)
        if isinstance(tensor, TokenIds):
            return self._stream.download(self._embedder([tensor]))
        return np.asarray(tensor)

    def record_event(self) -> Event:
        """The moment when all work given to the stream so far is done."""
        return Event(self._stream)

    def _trace(self, found: dict[str, DeviceArray], count: int) -> Trace:
        host = {name: self._stream.download(found[name]) for name in ("indices", "merged", "segments")}
        segments = host["segments"]
        return Trace(host["indices"][:count], host["merged"][:count].astype(bool), segments[segments[:, 0] >= 0])


def open_stream() -> Stream:
    """A stream, once it is certain that there are a GPU and the CUDA library, which all stages need.

    Raises:
        TangoError: One of them is missing.
    """
    stream = Stream()
    native_library.load()
    return stream
