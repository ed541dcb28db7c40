"""What calibration measures of each clip, in as many workers as there are; the cache keeps it as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import NoReturn, TypeVar

from tango_calibration.data.dataset import Video
from tango_calibration.parallel import map_in_parallel, threads_of
from tango_calibration.quantization import replay
from tango_calibration.quantization.cache import ObservationCache
from tango_calibration.quantization.capture import Capture, capture
from tango_calibration.quantization.clips import load_clip
from tango_calibration.quantization.ranges import Array, ChannelStats
from tango_calibration.quantization.stored import StoredGraph
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
        cache: Where observations are kept.
        max_new_tokens: Most tokens of an answer.
        jobs: Number of processes; 1 works in this one.
        ray: Address of a Ray cluster that works in their place, or ``local``.
    """

    def __init__(
        self, bundle: Bundle, cache: ObservationCache, max_new_tokens: int, jobs: int = 1, ray: str | None = None
    ) -> None:
        self._folder, self._cache, self._max_new_tokens = bundle.path.absolute(), cache, max_new_tokens
        self._jobs, self._ray, self._threads = jobs, ray, threads_of(jobs, ray)

    def captures(self, videos: Sequence[Video]) -> list[Capture]:
        """What the pipeline computes for each clip.

        Raises:
            TangoError: A clip cannot be read or is too long, or the cache is damaged.
        """
        return self._each(
            "capture",
            partial(_Capturer, self._folder, self._max_new_tokens, self._threads),
            videos,
            holds=lambda video: self._cache.holds(video, "capture"),
            cached=self._cache.capture,
        )

    def channel_stats(self, name: GraphName, videos: Sequence[Video], captures: Sequence[Capture]) -> ChannelStats:
        """Statistics of the inputs of a graph's linear layers, over all clips.

        Raises:
            TangoError: As of :meth:`captures`.
        """
        each = self._each(
            f"{name} activations",
            partial(_ActivationMeter, self._folder, name, self._threads),
            list(zip(videos, captures, strict=True)),
            holds=lambda item: self._cache.holds(item[0], f"channels {name}"),
            cached=lambda item, make: self._cache.channel_stats(item[0], name, make),
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
        """Observes what the cache does not hold, and reads the rest."""
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

    def __init__(self, bundle: Path, max_new_tokens: int, threads: int) -> None:
        self._bundle, self._max_new_tokens = Bundle.load(bundle), max_new_tokens
        self._backend = select(self._bundle, "ort-cpu", threads=threads)
        self._prompt = Prompt.of(self._bundle)

    def __call__(self, video: Video) -> Capture:
        return capture(self._bundle, self._backend, self._prompt, video, self._max_new_tokens)


class _ActivationMeter:
    """Runs one graph on clips, and looks at what its linear layers take."""

    def __init__(self, bundle: Path, name: GraphName, threads: int) -> None:
        self._bundle, self._name = Bundle.load(bundle), name
        stored = StoredGraph(self._bundle, name)
        self._session = replay.open_graph(stored, more=stored.linear_inputs, threads=threads)

    def __call__(self, item: tuple[Video, Capture]) -> ChannelStats:
        return reduce(ChannelStats.merge, map(ChannelStats.of, self._inputs(*item)))

    def _inputs(self, video: Video, taken: Capture) -> Iterator[list[Array]]:
        """Yields the inputs of the layers, for each pass over a clip."""
        if self._name == "vision":
            frames = load_clip(self._bundle, video).steps
            return (outputs[2:] for outputs in replay.run_vision(self._session, frames))
        specs = self._bundle.manifest.graphs["decoder"].inputs
        return (outputs[1:] for outputs in replay.run_decoder(self._session, specs, taken.decoder_input))


def _held() -> NoReturn:
    raise AssertionError("the cache holds it")
