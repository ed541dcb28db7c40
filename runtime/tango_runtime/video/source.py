"""The contract of everything that gives frames: times first, pixels when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_runtime.util.numbers import is_integer

if TYPE_CHECKING:
    from tango_runtime.video.yuv import YuvFrame

_T = TypeVar("_T")

#: On the host, or an array on a GPU with ``__cuda_array_interface__`` or ``__dlpack__``, for a backend that takes it.
Frame: TypeAlias = NDArray[np.uint8]
TimedFrame: TypeAlias = tuple[float, Frame]

#: How the indices ``linspace(0, n - 1, F)`` become integers: LLaVA takes the floor; Qwen rounds, halves to even.
Rounding = Literal["floor", "nearest"]

#: Which frames of a video are taken: evenly those of every n-th index, or the keyframe nearest to each of them in time.
Sampling = Literal["exact", "keyframes"]


@dataclass(frozen=True, eq=False)
class Sampled:
    """The frames that sampling chose.

    Attributes:
        indices: int64 [F], index of each frame among the n frames of the source, ascending. Only keyframes may repeat.
        seconds: float64 [F], time of each frame since the first frame of the source.
        rounding: How the indices were rounded.
        wanted: float64 [F], times of the frames that exact sampling takes, where these are keyframes near them.
    """

    indices: NDArray[np.int64]
    seconds: NDArray[np.float64]
    rounding: Rounding
    wanted: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        """Number of frames, F."""
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class Clock:
    """When the sampled frames of a video are, and how long it is.

    Attributes:
        seconds: float64 [F], time of each frame since the first frame of the source.
        duration: Seconds from the first frame to the end of the last; None where unknown.
    """

    seconds: NDArray[np.float64]
    duration: float | None


class FrameSource(Protocol):
    """A finite sequence of frames whose times are known before their pixels.

    A camera has no end, so it is not a source by itself: :meth:`tango_runtime.VideoLLM.live` reads it.
    """

    @property
    def name(self) -> str:
        """What messages call the source."""

    @property
    def duration(self) -> float | None:
        """Seconds from the first frame to the end of the last; None where unknown."""

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the first frame as it is read, rotation applied; None where unknown."""

    def sample(self, count: int, *, rounding: Rounding = "floor") -> Sampled:
        """Chooses the frames ``linspace(0, n - 1, count)`` of n.

        Raises:
            TangoError: The source has fewer frames, or ``count`` is below 1.
        """

    def sample_at(self, fps: float) -> Sampled:
        """Chooses the first frame of every 1 / fps seconds since the first.

        Raises:
            TangoError: The source has no frames.
        """

    def read(self, chosen: Sampled) -> Iterator[TimedFrame]:
        """Decodes the chosen frames, one at a time → (seconds, uint8 RGB [H, W, 3]).

        Nobody else writes to the arrays. Their seconds are those of ``chosen``, unless decoding shows that a damaged
        file has other frames than it announced: the seconds given here are then the right ones.

        Raises:
            TangoError: A frame cannot be read; raised when it is reached.
        """


class FrameStream(Iterator[TimedFrame]):
    """The sampled frames of a source, decoded one at a time; when they are is known before."""

    def __init__(self, source: FrameSource, chosen: Sampled) -> None:
        self._source, self._frames, self._wanted = source, source.read(chosen), chosen.wanted
        self._seconds, self._read, self._chosen = chosen.seconds.astype(np.float64), 0, chosen

    def decode_on(self, device: int, decoders: int | None = None) -> Iterator[tuple[int, YuvFrame]] | None:
        """The frames as a GPU decodes them, in place of what iterating gives: (which of them, frame) in any order.

        At most ``decoders`` work at a time; None takes what is fastest for one file. None is returned where the source
        does not know how. What was given is not to be used where it ends with an error.

        Raises:
            HardwareError: The GPU does not decode the source; iterating does.
            TangoError: As iterating.
        """
        decode = getattr(self._source, "decode_on", None)
        return decode(self._chosen, device, decoders) if decode else None

    def each(self, use: Callable[[Frame], _T]) -> Iterator[tuple[float, _T]]:
        """What `use` makes of each frame, in order of time, in place of what iterating gives.

        A file's decoders call it as they decode, on threads of their own, so that no frame has to be kept until all are
        known to be the right ones; what it makes is.

        Raises:
            TangoError: As iterating.
        """
        read = getattr(self._source, "read_each", None)
        made = read(self._chosen, use) if read else ((seconds, use(rgb)) for seconds, rgb in self._frames)
        return map(self._note, made)

    def __next__(self) -> TimedFrame:
        return self._note(next(self._frames))

    def _note(self, timed: tuple[float, _T]) -> tuple[float, _T]:
        self._seconds[self._read] = timed[0]
        self._read += 1
        return timed

    @property
    def name(self) -> str:
        """What messages call the source."""
        return self._source.name

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the source's first frame, as it is read; None where unknown."""
        return self._source.frame_size

    @property
    def off(self) -> NDArray[np.float64] | None:
        """float64 [F], seconds by which each keyframe is after the frame of exact sampling; None where that is used."""
        return None if self._wanted is None else self._seconds - self._wanted

    @property
    def clock(self) -> Clock:
        """The times that were announced, and those of the frames that were read already."""
        return Clock(self._seconds.copy(), self._source.duration)


Source: TypeAlias = str | Path | NDArray[np.uint8] | Iterable[TimedFrame] | FrameSource


def choose(seconds: NDArray[np.float64], count: int, rounding: Rounding, name: str) -> Sampled:
    """Chooses `count` frames of a source whose frames all have known times.

    The indices for ``floor`` are those of the LLaVA-OneVision evaluation (LLaVA-NeXT, ``np.linspace(0, n - 1, F,
    dtype=int)``), those for ``nearest`` the ones of qwen-vl-utils in float64.

    Args:
        seconds: [n], time of each frame since the first.
        count: Number of frames.
        rounding: How indices are rounded.
        name: What messages call the source.

    Raises:
        TangoError: There are fewer frames than `count`, or `count` is below 1.
    """
    n = len(seconds)
    check_count(count)
    if n == 0:
        raise TangoError(f"{name} has no frames", "give a source with at least one frame")
    if n < count:
        frames = "1 frame" if n == 1 else f"{n} frames"
        raise TangoError(f"{name} has {frames}, {count} were asked for", f"ask for at most {n}")
    even = np.linspace(0, n - 1, count)
    indices = (np.floor(even) if rounding == "floor" else np.rint(even)).astype(np.int64)
    return Sampled(indices, seconds[indices], rounding)


def choose_at(seconds: NDArray[np.float64], fps: float, name: str) -> Sampled:
    """Chooses the first frame of every 1 / fps seconds, of a source whose frames all have known times.

    Args:
        seconds: [n], time of each frame since the first.
        fps: Frames a second, above 0; where the source has fewer, all are chosen.
        name: What messages call the source.

    Raises:
        TangoError: There are no frames.
    """
    if not len(seconds):
        raise TangoError(f"{name} has no frames", "give a source with at least one frame")
    slots = np.floor(seconds * fps + 1e-6)  # a time that rounding put just below a slot is in it
    indices = np.flatnonzero(np.diff(slots, prepend=-1) > 0)
    return Sampled(indices, seconds[indices], "floor")


def is_uint8(array: Any) -> bool:
    """Whether an array of whatever library is of this dtype."""
    return str(array.dtype).rpartition(".")[-1] == "uint8"


def check_count(count: int) -> None:
    """Rejects a number of frames below 1."""
    if not is_integer(count) or count < 1:
        raise TangoError(f"{count} frames were asked for", "ask for at least one")


def duration_of(seconds: NDArray[np.float64]) -> float:
    """Seconds from the first frame to the end of the last, which is taken to last as long as the others on average."""
    n = len(seconds)
    return float(seconds[-1]) * n / (n - 1) if n > 1 else 0.0
