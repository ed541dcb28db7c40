"""Frames that the vision graph has seen: what a session prunes and asks about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_plugins.device_array import DeviceArray
from tango_runtime.backends.base import Backend, Tensor
from tango_runtime.pipeline.timer import StageTimer
from tango_runtime.util.console import OnProgress
from tango_runtime.video import Clock, FrameBatch, FrameStream
from tango_runtime.video.decoded import DecodedVideo
from tango_runtime.video.shape import ClipShape


@dataclass(frozen=True)
class VideoRequest:
    """A video, checked and ready to be seen once.

    Attributes:
        timed: Its sampled frames, read to the end, or decoded already.
        shape: What they become.
        on_progress: Called with the number of frames that the vision graph has done.
    """

    timed: FrameStream | DecodedVideo
    shape: ClipShape
    on_progress: OnProgress


@dataclass(frozen=True, eq=False)
class EncodedClip:
    """Frames, and what the vision graph returned for them.

    Attributes:
        shape: Size of the frames, number of steps, and token grid of a step.
        clock: Times of the frames.
        seconds: [F] fp32, the same times as the backend read them.
        aspect: Width over height of the source's frames.
        features: [T, L, D], in memory that the backend may use again.
        salience: [T, L], in the same memory.
        read_frames: Returns the frames [F, H, W, 3] uint8, as the vision graph took them; copies them from a device.
        off: [F] float64, seconds by which each keyframe is later than the frame of exact sampling; None for exact
            sampling.
    """

    shape: ClipShape
    clock: Clock
    seconds: NDArray[np.float32]
    aspect: float
    features: Tensor
    salience: Tensor
    read_frames: Callable[[], NDArray[np.uint8]]
    off: NDArray[np.float64] | None = None


class EncodedVideo:
    """A video that was decoded and encoded once, for sessions at any retention ratio.

    Its features stay in their own memory, where the backend prunes them: T·L·D numbers, 11 MB for 32 frames of the 0.5B
    model, 45 MB for the 7B. :meth:`tango_runtime.VideoLLM.encode` makes it, and does not wait until a GPU is done.

    Attributes:
        shape: Size of the frames, number of steps, and token grid of a step.
        frames: uint8 [F, H, W, 3], as the vision graph took them.
    """

    def __init__(self, backend: Backend, request: VideoRequest) -> None:
        self._timer = StageTimer(backend)
        clip = encode(backend, request, self._timer)
        self._backend, self._ring = backend, backend.new_ring(clip.shape.steps)
        self._ring.append(clip.features, clip.salience)
        self.shape, self.frames = clip.shape, clip.read_frames()
        if not isinstance(request.timed, DecodedVideo):
            self.frames = np.array(self.frames)  # theirs may be pinned
        self._clip = replace(clip, features=None, salience=None, read_frames=_no_frames)

    @property
    def stages(self) -> dict[str, float]:
        """Milliseconds of ``video`` and ``vision``; waits until they are done."""
        return self._timer.read()

    def clip(self, backend: Backend) -> EncodedClip:
        """The frames as a session takes them.

        Raises:
            TangoError: The session's backend is another.
        """
        if backend is not self._backend:
            raise TangoError("the video was encoded by another model", "encode it with the model that is asked")
        features, salience = self._ring.newest(self.shape.steps)
        # By its frames, the session keeps this, and so the ring.
        return replace(self._clip, features=features, salience=salience, read_frames=lambda: self.frames)


def encode(backend: Backend, request: VideoRequest, timer: StageTimer) -> EncodedClip:
    """Decodes and encodes a video: the stages ``video`` and ``vision``.

    The features are in memory that the backend uses again for the next video.

    Raises:
        TangoError: A frame cannot be read, or the backend failed.
    """
    shape = request.shape
    with timer.measure_on_host("video"):
        batch = _load(backend, request.timed, shape)
    # Only the host repeats a frame that the last step lacks.
    frames = host_frames(backend, batch.frames) if shape.missing else batch.frames
    with timer.measure("vision"):
        features, salience = backend.vision(shape.as_steps(frames), _in_frames(request))
    clock = request.timed.clock  # of frames that were read: a damaged file may have others than it announced
    return EncodedClip(
        shape,
        clock,
        batch.seconds,
        batch.aspect,
        features,
        salience,
        lambda: host_frames(backend, frames),
        request.timed.off,
    )


def _load(backend: Backend, timed: FrameStream | DecodedVideo, shape: ClipShape) -> FrameBatch:
    """The frames of a video, as the backend takes them."""
    if isinstance(timed, DecodedVideo):
        return timed.batch
    return backend.load_frames(timed, shape.frames, shape.size)


def _no_frames() -> NDArray[np.uint8]:
    raise AssertionError("a video's clip has its frames")


def host_frames(backend: Backend, frames: NDArray[np.uint8] | DeviceArray) -> NDArray[np.uint8]:
    """Frames on the host; copied from the device if they are there."""
    return backend.to_host(frames) if isinstance(frames, DeviceArray) else frames


def _in_frames(request: VideoRequest) -> OnProgress:
    """A backend's progress in steps, reported in frames."""
    left = request.shape.frames

    def on_steps(done: int) -> None:
        nonlocal left
        frames = min(done * request.shape.frames_per_step, left)  # the last step may repeat a frame
        left -= frames
        request.on_progress(frames)

    return on_steps
