"""What a video becomes: frames of one size, in steps that the vision graph takes as one, each a grid of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from tango_plugins import PruneParams, TangoError
from tango_plugins.device_array import DeviceArray
from tango_runtime.bundle import Manifest, PixelBudget, VideoSpec, VisionSpec
from tango_runtime.video.open import sample
from tango_runtime.video.source import Clock, FrameStream, Sampling, Source

#: Aspect ratio above which no frame is taken (qwen-vl-utils, vision_process.py).
_MAX_ASPECT = 200


@dataclass(frozen=True)
class ClipShape:
    """The shape of a video on its way to tokens.

    Attributes:
        frames: Frames, F.
        size: (height, width) of each in pixels.
        frames_per_step: Consecutive frames that the vision graph takes as one step; the last is repeated where they do
            not come out even.
        grid: (rows, columns) of the tokens of one step.
    """

    frames: int
    size: tuple[int, int]
    frames_per_step: int
    grid: tuple[int, int]

    @classmethod
    def of(cls, manifest: Manifest, frames: int, size: tuple[int, int] | None = None) -> ClipShape:
        """The shape of so many frames of a size; by default the bundle's own size."""
        video = manifest.video
        size = size or video.size
        grid = manifest.params.grid
        if video.budget is not None:
            grid = size[0] // video.budget.factor, size[1] // video.budget.factor
        return cls(frames, size, video.frames_per_step, grid)

    @property
    def steps(self) -> int:
        """Steps of frames, T."""
        return -(-self.frames // self.frames_per_step)

    @property
    def step_tokens(self) -> int:
        """Tokens of one step, L."""
        return self.grid[0] * self.grid[1]

    @property
    def total(self) -> int:
        """Tokens of the video, T·L."""
        return self.steps * self.step_tokens

    @property
    def missing(self) -> int:
        """Frames that the last step lacks."""
        return self.steps * self.frames_per_step - self.frames

    @overload
    def as_steps(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]: ...
    @overload
    def as_steps(self, frames: NDArray[np.uint8] | DeviceArray) -> NDArray[np.uint8] | DeviceArray: ...
    def as_steps(self, frames: NDArray[np.uint8] | DeviceArray) -> NDArray[np.uint8] | DeviceArray:
        """Frames [F, H, W, 3] as the vision graph takes them; on the host, unless none is missing.

        Returns:
            [T, frames_per_step, H, W, 3]; the frames themselves where a step is a frame.
        """
        if self.frames_per_step == 1:
            return frames
        shape = (self.steps, self.frames_per_step, *frames.shape[1:])
        if isinstance(frames, DeviceArray):
            return replace(frames, shape=shape)
        if self.missing:
            frames = np.concatenate((frames, np.repeat(frames[-1:], self.missing, 0)))
        return frames.reshape(shape)

    def step_seconds(self, seconds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Times of the frames [F] → of the steps [T], fp32.

        F times are stretched over T places, ends kept, as in the code of Tango's authors: not the mean of each step.
        """
        if self.frames_per_step == 1:
            return seconds
        places = np.linspace(0, len(seconds) - 1, self.steps)
        return np.asarray(np.interp(places, np.arange(len(seconds)), seconds.astype(np.float64)), np.float32)

    def seconds_per_step(self, clock: Clock) -> float:
        """Seconds from one step to the next; of a source of unknown duration, as the sampled frames say."""
        duration, gaps = clock.duration, max(self.frames - 1, 1)
        if duration is None:
            duration = float(clock.seconds[-1] - clock.seconds[0]) * (gaps + 1) / gaps
        return duration * self.frames_per_step / self.frames

    def rows(self, *, row_ends: bool) -> int:
        """Positions that all tokens take in a prompt, with an end of each grid row if ``row_ends``."""
        return self.total + (self.steps * self.grid[0] if row_ends else 0)


@dataclass(frozen=True)
class FrameOptions:
    """How a video is sampled: keywords of :meth:`tango_runtime.VideoLLM.session`.

    Attributes:
        frames: Frames sampled uniformly, F; None takes the bundle's number.
        frame_size: (height, width) in pixels of the frames, for a bundle that takes any size; None takes what the
            video's aspect ratio gives within the bundle's budget of pixels.
        max_pixels: Maximum number of pixels of a frame, in place of the budget's.
        fps: Frames a second of a folder, an array or a live stream.
        sampling: ``keyframes`` takes the keyframe of a video file that is nearest to each frame.
    """

    frames: int | None = None
    frame_size: tuple[int, int] | None = None
    max_pixels: int | None = None
    fps: float | None = None
    sampling: Sampling = "exact"


def open_clip(
    manifest: Manifest, source: Source, options: FrameOptions, fixed: tuple[int, int] | None = None
) -> tuple[FrameStream, ClipShape]:
    """Opens a video, samples it as a bundle does, and says what its frames become; no chosen frame is decoded yet.

    Args:
        manifest: The bundle's.
        source: The video; see :func:`tango_runtime.video.sample`.
        options: How it is sampled.
        fixed: The only size (height, width) that the backend's graphs take.

    Raises:
        TangoError: The source cannot be read or is shorter, or its frames cannot have that size.
    """
    video = manifest.video
    frames = video.frames if options.frames is None else options.frames
    stream = sample(source, frames, fps=options.fps, rounding=video.sampling, sampling=options.sampling)
    found = stream.frame_size if video.budget else None
    size = choose_size(video, frames, found, asked=options.frame_size, max_pixels=options.max_pixels, fixed=fixed)
    return stream, ClipShape.of(manifest, frames, size)


def choose_size(
    video: VideoSpec,
    frames: int,
    source: tuple[int, int] | None,
    *,
    asked: tuple[int, int] | None = None,
    max_pixels: int | None = None,
    fixed: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """The size that the frames of a video get, (height, width).

    Args:
        video: How a video becomes frames.
        frames: How many.
        source: The size of the source's frames; None where unknown.
        asked: The caller's own.
        max_pixels: The caller's own most pixels of a frame.
        fixed: The only one that the backend's graphs take.

    Raises:
        TangoError: ``asked`` or ``max_pixels`` do not suit the bundle or the backend, or the size is unknown.
    """
    if asked is not None and max_pixels is not None:
        raise TangoError("a frame size and most pixels of a frame were given", "give one of them")
    only = video.size if video.budget is None else fixed
    if only is not None:
        if max_pixels is not None or asked not in (None, only):
            raise TangoError(
                f"frames must be {only[0]}x{only[1]}"
                + (", as the engines were built" if video.budget else ", as the bundle takes them"),
                "give neither a frame size nor a maximum number of pixels"
                + (", or build engines for another: tango build --frame" if video.budget else ""),
            )
        return only
    assert video.budget is not None
    if asked is not None:
        return check_size(video.budget, asked)
    if source is None:
        raise TangoError("the source does not say how large its frames are", "give the size of the frames")
    factor, (least, most) = video.budget.factor, pixels_of(video.budget, frames, max_pixels)
    size = size_within(factor, least, most, *source)
    if max_pixels is not None and size[0] * size[1] > most:  # enlarged to the least, and rounded up beyond the most
        return _filling(factor, most, *source)
    return size


def at_size(
    video: VideoSpec, vision: VisionSpec, params: PruneParams, size: tuple[int, int]
) -> tuple[VideoSpec, VisionSpec, PruneParams]:
    """What a bundle says of its frames, with another default size.

    Raises:
        TangoError: Its frames do not have that size.
    """
    rows, columns = choose_size(video, video.frames, None, asked=size)
    if video.budget is None:
        return video, vision, params
    grid = rows // video.budget.factor, columns // video.budget.factor
    tokens = grid[0] * grid[1]
    patches = vision.patches * tokens // video.tokens_per_frame
    return replace(video, size=size, tokens_per_frame=tokens), replace(vision, patches=patches), params.on(grid)


def with_max_pixels(video: VideoSpec, max_pixels: int) -> VideoSpec:
    """The same with frames of at most so many pixels.

    Raises:
        TangoError: All frames have one size.
    """
    if video.budget is None:
        raise TangoError(f"all frames are {video.size[0]}x{video.size[1]}", "leave --max-pixels out")
    least = video.budget.min_pixels if max_pixels >= video.budget.min_pixels else 1
    return replace(video, budget=replace(video.budget, min_pixels=least, max_pixels=max_pixels))


def default_size(video: VideoSpec) -> tuple[int, int]:
    """The default size, or one of about its aspect ratio that is within the budget of the default number of frames."""
    if video.budget is None:
        return video.size
    return size_within(video.budget.factor, *pixels_of(video.budget, video.frames), *video.size)


def check_size(budget: PixelBudget, size: tuple[int, int]) -> tuple[int, int]:
    """Refuses a size that is not made of whole tokens."""
    if any(edge < budget.factor or edge % budget.factor for edge in size):
        nearest = (max(round(edge / budget.factor), 1) * budget.factor for edge in size)
        raise TangoError(
            f"the frame size is {size[0]}x{size[1]}, not made of multiples of {budget.factor}",
            f"the nearest is {'x'.join(map(str, nearest))}",
        )
    return size


def pixels_of(budget: PixelBudget, frames: int, max_pixels: int | None = None) -> tuple[float, float]:
    """Least and most pixels of one of so many frames: what they share, but no less than a little more than the least.

    A caller's ``max_pixels`` counts where it is less. Below the least, it leaves none.
    """
    least = budget.min_pixels
    most = max(min(budget.max_pixels, budget.total_pixels / frames * 2), math.floor(1.05 * least))
    if max_pixels is None:
        return least, most
    return least if max_pixels >= least else 1, min(most, max_pixels)


def size_within(factor: int, least: float, most: float, height: int, width: int) -> tuple[int, int]:
    """Multiples of ``factor`` with nearly the same aspect, whose area is within the bounds as far as that goes.

    It is qwen-vl-utils' ``smart_resize``.

    Raises:
        TangoError: One edge is more than 200 times as long as the other.
    """
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise TangoError(f"frames of {width}x{height} are too narrow", f"give an aspect ratio of at most {_MAX_ASPECT}")
    h, w = (max(factor, round(edge / factor) * factor) for edge in (height, width))
    if h * w > most:
        return _filling(factor, most, height, width)
    if h * w < least:
        scale = math.sqrt(least / (height * width))
        h, w = (math.ceil(edge * scale / factor) * factor for edge in (height, width))
    return h, w


def _filling(factor: int, most: float, height: int, width: int) -> tuple[int, int]:
    """The largest multiples of ``factor`` with nearly the same aspect whose area is at most so much."""
    scale = math.sqrt(height * width / most)
    h, w = (max(factor, math.floor(edge / scale / factor) * factor) for edge in (height, width))
    return h, w
