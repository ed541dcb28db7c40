"""Processes that decode clients' media, each with limits on its time and memory; one that fails is replaced."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from tango_plugins import TangoError
from tango_runtime.video import Rounding, Sampled, TimedFrame


@dataclass(frozen=True, eq=False)
class DecodedClip:
    """Sampled frames at the size that a bundle takes: a FrameSource of exactly these frames.

    Attributes:
        name: What messages call it.
        frames: uint8 [F, H, W, 3].
        seconds: float64 [F].
        duration: Seconds from the first frame of the video to the end of its last; None where unknown.
        aspect: Width over height of the video.
    """

    name: str
    frames: NDArray[np.uint8]
    seconds: NDArray[np.float64]
    duration: float | None
    aspect: float

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of a frame."""
        return self.frames.shape[1], self.frames.shape[2]

    def sample(self, count: int, *, rounding: Rounding = "floor") -> Sampled:
        """All frames."""
        assert count == len(self.frames)
        return Sampled(np.arange(count), self.seconds, rounding)

    def sample_at(self, fps: float) -> Sampled:
        """All frames."""
        return self.sample(len(self.frames))

    def read(self, chosen: Sampled) -> Iterator[TimedFrame]:
        """All frames."""
        yield from zip(self.seconds.tolist(), self.frames, strict=True)


class Decoders:
    """A few decoding processes.

    Args:
        count: How many.
        seconds: Most time of a request.
        memory: Most bytes of memory of a process.
    """

    def __init__(self, count: int, seconds: float, memory: int) -> None:
        self._seconds, self._memory = seconds, memory
        self._idle: queue.Queue[subprocess.Popen[bytes]] = queue.Queue()
        self._lock, self._all, self._closed = threading.Lock(), set[subprocess.Popen[bytes]](), False
        for _ in range(count):
            self._idle.put(self._start())

    def decode(self, request: Mapping[str, Any]) -> DecodedClip:
        """Decodes what a request names; waits for a process that is idle.

        Raises:
            TangoError: The media cannot be read, or not within the limits.
        """
        process = self._idle.get()
        if process.poll() is not None:  # it ended in between
            self._forget(process)
            process = self._start()
        timer = threading.Timer(self._seconds, process.kill)
        timer.start()
        try:
            return _ask(process, request)
        except (OSError, EOFError, ValueError) as error:
            late = not timer.is_alive()
            self._forget(process)
            process = self._start()
            what = f"takes more than {self._seconds:g} s" if late else "made the decoder fail"
            raise TangoError(f"decoding the video {what}", "give a shorter or smaller one") from error
        finally:
            timer.cancel()
            self._idle.put(process)

    def close(self) -> None:
        """Ends the processes."""
        with self._lock:
            self._closed, processes = True, list(self._all)
        for process in processes:
            self._forget(process)

    def _start(self) -> subprocess.Popen[bytes]:
        program = [sys.executable, "-m", "tango_runtime.server.decoder", str(self._memory)]
        path = os.pathsep.join(folder for folder in sys.path if folder)
        # NumPy's threads would reserve more address space than the limit; nothing here multiplies matrices.
        environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with self._lock:
            # Of a session of its own: ctrl-C on a terminal is for the server, which ends its decoders.
            process = subprocess.Popen(program, env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]
            self._all.add(process)
        found: subprocess.Popen[bytes] = process
        return found

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        with self._lock:
            self._all.discard(process)


def _ask(process: subprocess.Popen[bytes], request: Mapping[str, Any]) -> DecodedClip:
    requests, replies = cast(BinaryIO, process.stdin), cast(BinaryIO, process.stdout)
    requests.write(json.dumps(request).encode() + b"\n")
    requests.flush()
    line = replies.readline()
    if not line:
        raise EOFError("the decoder ended")
    header = json.loads(line)
    data = bytearray(header["bytes"])
    view = memoryview(data)
    while view:
        count = replies.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the decoder ended")
        view = view[count:]
    if "error" in header:
        raise TangoError(header["error"], header["hint"])
    height, width = header["size"]
    frames = np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)
    return DecodedClip(
        "the video", frames, np.array(header["seconds"], np.float64), header["duration"], header["aspect"]
    )
