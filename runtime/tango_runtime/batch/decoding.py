"""Videos decoded ahead of their questions, in processes.

Not on threads: a thread that decodes would take turns with the one that answers, at every token of an answer, and a
file on which a decoder crashes would take the answers with it. Each takes the next video when it is done with one, so
those on the GPU and those in software share the videos as fast as they are. They start before the model is loaded, and
decode the first videos meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tango_plugins import TangoError
from tango_runtime.bundle import Manifest
from tango_runtime.util.console import verbosity
from tango_runtime.util.processes import Child
from tango_runtime.video.decoded import DecodedVideo, decode
from tango_runtime.video.shape import FrameOptions

#: Most processes by default: FFmpeg has threads of its own in each.
_MOST = 8

#: How much a process that decodes in software stands back for the one that answers: a GPU waits for that one.
_NICE = 10

#: A video, and the only size (height, width) that the backend's graphs take.
_Asked = tuple[Path, tuple[int, int] | None]
_Decode = Callable[[_Asked], DecodedVideo]


def default_count(models: int = 1) -> int:
    """Processes that decode for one of so many models on this machine: half of its share of the cores, at most 8."""
    return min(max(len(os.sched_getaffinity(0)) // 2 // models, 1), _MOST)


class Decoders:
    """Decodes videos as a bundle samples them.

    Args:
        manifest: The bundle's.
        options: How they are sampled.
        count: Processes that decode in software.
        on_gpu: Processes that decode on the GPU what it can decode, each in a CUDA context of its own. Without any
            process, this one decodes, in software, when a video is submitted.
    """

    def __init__(self, manifest: Manifest, options: FrameOptions, count: int, on_gpu: int = 0) -> None:
        # Without what decoding does not need: more than a pipe holds, and each process would be waited for to start.
        manifest = replace(manifest, graphs={}, files={})
        self._decode: _Decode = partial(_decode, manifest, options)
        self._fixed: Future[tuple[int, int] | None] = Future()
        if manifest.video.budget is None:  # frames have the bundle's size, whatever the backend is
            self._fixed.set_result(None)
        open_on_gpu = partial(_open_on_gpu, manifest, options)
        self._open = [open_on_gpu] * on_gpu + [partial(_open_in_software, self._decode)] * count
        self._closed = False
        self._threads = ThreadPoolExecutor(len(self._open)) if self._open else None  # each waits for a process
        self._children = [Child(opened) for opened in self._open]
        self._idle: SimpleQueue[int] = SimpleQueue()
        for i in range(on_gpu, len(self._children)):
            self._idle.put(i)
        self._checks = [self._threads.submit(self._check, i) for i in range(on_gpu)] if self._threads else []

    def ready(self, fixed: tuple[int, int] | None) -> None:
        """Says that the backend is loaded, and waits until the processes with a GPU can use it.

        Args:
            fixed: The only size (height, width) that the backend's graphs take. Videos of a bundle that leaves their
                size to the backend are not decoded before.

        Raises:
            TangoError: A process cannot use the GPU.
        """
        if not self._fixed.done():
            self._fixed.set_result(fixed)
        try:
            for check in self._checks:
                check.result()
        except (EOFError, ConnectionError) as error:
            raise TangoError("a process that decodes on the GPU died", "see: tango doctor") from error

    def __len__(self) -> int:
        """Number of processes."""
        return len(self._children)

    def submit(self, video: Path) -> Future[DecodedVideo]:
        """A video, decoded when the videos before leave a process idle; or the TangoError why it cannot be.

        Without any process, only after :meth:`ready`.
        """
        if self._threads is not None:
            return self._threads.submit(self._in_child, video)
        here: Future[DecodedVideo] = Future()
        try:
            here.set_result(self._decode((video, self._fixed.result(timeout=0))))
        except TangoError as error:
            here.set_exception(error)
        return here

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        self._closed = True
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._fixed.cancel()
            for i, child in enumerate(self._children):
                child.kill()
                self._idle.put(i)  # for a thread that waits for one, and finds it dead
            self._threads.shutdown()

    def _check(self, i: int) -> None:
        """Lets a process with a GPU have videos once it can use it, or it would fail all that it gets."""
        self._children[i].send(None)
        self._children[i].receive()
        self._idle.put(i)

    def _in_child(self, video: Path) -> DecodedVideo:
        asked, i = (video, self._fixed.result()), self._idle.get()
        try:
            try:
                self._children[i].send(asked)
            except ConnectionError:  # it died while it was idle, which is no fault of this video
                self._replace(i)
                self._children[i].send(asked)
            decoded: DecodedVideo = self._children[i].receive()
            return decoded
        except (EOFError, ConnectionError) as error:
            self._replace(i)
            raise TangoError(
                f"the process that decoded {video} died",
                "check that the file plays; with too little memory: --decoders 1",
            ) from error
        finally:
            self._idle.put(i)

    def _replace(self, i: int) -> None:
        self._children[i].kill()
        if not self._closed:
            self._children[i] = Child(self._open[i])


def _decode(manifest: Manifest, options: FrameOptions, asked: _Asked, load: Any = None) -> DecodedVideo:
    video, fixed = asked
    return decode(manifest, video, options, fixed, load)


def _open_in_software(decode: _Decode) -> _Decode:
    os.nice(_NICE)
    return decode


def _open_on_gpu(manifest: Manifest, options: FrameOptions) -> Any:
    from tango_runtime.backends.cuda.frames import GpuDecoder

    load = GpuDecoder()

    def decode_on_gpu(asked: _Asked | None) -> DecodedVideo | None:
        if asked is None:  # only asks whether the GPU can be used
            return None
        with verbosity(0):  # says why a file is decoded in software
            return _decode(manifest, options, asked, load)

    return decode_on_gpu
