"""Videos decoded ahead of their questions, in processes.

Not on threads: a thread that decodes would take turns with the one that answers, at every token of an answer, and a
file on which a decoder crashes would take the answers with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tango_plugins import TangoError
from tango_runtime.bundle import Manifest
from tango_runtime.util.processes import Child
from tango_runtime.video.decoded import DecodedVideo, decode
from tango_runtime.video.shape import FrameOptions

#: Most processes by default: FFmpeg has threads of its own in each.
_MOST = 8


def default_count(models: int = 1) -> int:
    """Processes that decode for one of so many models on this machine: half of its share of the cores, at most 8."""
    return min(max(len(os.sched_getaffinity(0)) // 2 // models, 1), _MOST)


class Decoders:
    """Decodes videos as a bundle samples them.

    Args:
        manifest: The bundle's.
        options: How they are sampled.
        fixed: The only size (height, width) that the backend's graphs take.
        count: Number of processes; 0 decodes in this one, when a video is submitted.
    """

    def __init__(self, manifest: Manifest, options: FrameOptions, fixed: tuple[int, int] | None, count: int) -> None:
        self._decode: Callable[[Path], DecodedVideo] = partial(decode, manifest, options=options, fixed=fixed)
        self._closed = False
        self._threads = ThreadPoolExecutor(count) if count else None  # each waits for a process
        self._children = [self._new_child() for _ in range(count)]
        self._idle: SimpleQueue[int] = SimpleQueue()
        for i in range(count):
            self._idle.put(i)

    def submit(self, video: Path) -> Future[DecodedVideo]:
        """A video, decoded when the videos before leave a process idle; or the TangoError why it cannot be."""
        if self._threads is not None:
            return self._threads.submit(self._in_child, video)
        here: Future[DecodedVideo] = Future()
        try:
            here.set_result(self._decode(video))
        except TangoError as error:
            here.set_exception(error)
        return here

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        self._closed = True
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            for child in self._children:
                child.kill()
            self._threads.shutdown()

    def _in_child(self, video: Path) -> DecodedVideo:
        i = self._idle.get()
        try:
            self._children[i].send(video)
            decoded: DecodedVideo = self._children[i].receive()
            return decoded
        except (EOFError, ConnectionError) as error:
            self._children[i].kill()
            if not self._closed:
                self._children[i] = self._new_child()
            raise TangoError(
                f"the process that decoded {video} died",
                "check that the file plays; with too little memory: --decoders 1",
            ) from error
        finally:
            self._idle.put(i)

    def _new_child(self) -> Child:
        return Child(partial(_same, self._decode))


def _same(function: Any) -> Any:
    return function
