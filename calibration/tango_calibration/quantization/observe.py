"""What calibration measures on each clip, in parallel workers; the cache keeps each result as it arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import NoReturn, TypeVar

from tango_calibration.data.dataset import Video
from tango_calibration.parallel import map_in_parallel, threads_of
from tango_calibration.quantization import replay
from tango_calibration.quantization.cache import CAPTURE, ObservationCache, channels_of
from tango_calibration.quantization.capture import Capture, capture
from tango_calibration.quantization.clips import load_clip
from tango_calibration.quantization.ranges import Array, ChannelStats
from tango_calibration.quantization.stored import Part, StoredGraph, graphs_of
from tango_runtime.backends.registry import select
from tango_runtime.bundle import Bundle, GraphName
from tango_runtime.pipeline.prompt import Prompt
from tango_runtime.util.console import progress

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


class Observer:
    """Runs a bundle on clips.

    Args:
        bundle: The bundle.
        cache: Cache of the observations.
        max_new_tokens: Maximum length of an answer.
        jobs: Number of processes; 1 uses this process.
        ray: Address of a Ray cluster to use instead, or ``local``.
        backend: What runs the bundle's graphs: ``ort-cpu`` or ``ort-cuda``.
    """

    def __init__(
        self,
        bundle: Bundle,
        cache: ObservationCache,
        max_new_tokens: int,
        jobs: int = 1,
        ray: str | None = None,
        backend: str = replay.CPU,
    ) -> None:
        self.backend = backend
        self._folder, self._cache, self._max_new_tokens = bundle.path.absolute(), cache, max_new_tokens
        self._jobs, self._ray, self._threads = jobs, ray, threads_of(jobs, ray)

    def captures(self, videos: Sequence[Video]) -> list[Capture]:
        """What the pipeline computes for each clip.

        Raises:
            TangoError: A clip cannot be read or is too long, or the cache is damaged.
        """
        return self._each(
            "capture",
            partial(_Capturer, self._folder, self._max_new_tokens, self._threads, self.backend),
            videos,
            holds=lambda video: self._cache.holds(video, CAPTURE),
            cached=self._cache.capture,
        )

    def channel_stats(self, part: Part, videos: Sequence[Video], captures: Sequence[Capture]) -> ChannelStats:
        """Statistics of the inputs of the linear layers of vision or the decoder, over all clips.

        Raises:
            TangoError: As in :meth:`captures`.
        """
        each = self._each(
            f"{part} activations",
            partial(_ActivationMeter, self._folder, part, self._threads, self.backend),
            list(zip(videos, captures, strict=True)),
            holds=lambda item: self._cache.holds(item[0], channels_of(part)),
            cached=lambda item, make: self._cache.channel_stats(item[0], part, make),
        )
        return reduce(ChannelStats.merge, each)

    def _each(
        self,
        title: str,
        open_worker: Callable[[], Callable[[_Item], _Found]],
        items: Sequence[_Item],
        *,
        holds: Callable[[_Item], bool],
        cached: Callable[[_Item, Callable[[], _Found]], _Found],
    ) -> list[_Found]:
        """Measures the items that the cache does not hold, and reads the others."""
        missing = [item for item in items if not holds(item)]
        if missing:
            with progress(title, len(missing)) as on_progress:

                def keep(item: _Item, made: _Found) -> None:
                    cached(item, lambda: made)
                    on_progress(1)

                map_in_parallel(open_worker, missing, keep, jobs=self._jobs, ray=self._ray)
        return [cached(item, _held) for item in items]


class _Capturer:
    """Runs the pipeline on clips."""

    def __init__(self, bundle: Path, max_new_tokens: int, threads: int, backend: str) -> None:
        self._bundle, self._max_new_tokens = Bundle.load(bundle), max_new_tokens
        self._backend = select(self._bundle, backend, threads=threads)
        self._prompt = Prompt.of(self._bundle)

    def __call__(self, video: Video) -> Capture:
        return capture(self._bundle, self._backend, self._prompt, video, self._max_new_tokens)


class _ActivationMeter:
    """Runs the graphs of a part on clips, and measures the inputs of their linear layers."""

    def __init__(self, bundle: Path, part: Part, threads: int, backend: str) -> None:
        self._bundle, self._part = Bundle.load(bundle), part
        stored = {name: StoredGraph(self._bundle, name) for name in graphs_of(self._bundle.manifest, part)}
        self._sessions = {
            name: replay.open_graph(graph, more=graph.linear_inputs, threads=threads, backend=backend)
            for name, graph in stored.items()
        }

    def __call__(self, item: tuple[Video, Capture]) -> ChannelStats:
        found: dict[GraphName, ChannelStats] = {}
        for graph, inputs in self._inputs(*item):
            stats = ChannelStats.of(inputs)
            found[graph] = found[graph].merge(stats) if graph in found else stats
        return ChannelStats.joined(found[graph] for graph in self._sessions)

    def _inputs(self, video: Video, taken: Capture) -> Iterator[tuple[GraphName, list[Array]]]:
        """Yields a graph and the inputs of its linear layers, for each pass over a clip."""
        if self._part == "vision":
            frames = load_clip(self._bundle, video).steps
            return (("vision", outputs[2:]) for outputs in replay.run_vision(self._sessions["vision"], frames))
        specs = self._bundle.manifest.graphs
        passes = replay.run_decoder(self._sessions, specs, taken.decoder_input)
        return ((graph, outputs[1:]) for graph, outputs in passes)


def _held() -> NoReturn:
    raise AssertionError("the cache holds it")
