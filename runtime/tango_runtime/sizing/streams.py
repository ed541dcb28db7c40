"""How many streams one device takes. Arithmetic only, on the estimates of estimate.py and times.py.

Memory: weights, scratch memory and the operator's workspace are there once. Each stream has frames and features of its
window, and a cache.

Time: a stream's frames are encoded one step at a time, each once. Its window has moved by the next question, so every
question prunes, prefills and decodes anew. Streams take turns, so shares of the device's time add up. Decoding of the
video is not part of it, nor are gaps between passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from tango_plugins import TangoError
from tango_runtime.sizing.estimate import Estimate
from tango_runtime.sizing.times import vision_time


@dataclass(frozen=True)
class StreamLoad:
    """What streams ask of a device.

    Attributes:
        streams: Number of streams.
        every: Seconds between two questions about a stream.
        fps: Frames a second that are taken of a stream.
        answer: Tokens of an answer.
    """

    streams: int
    every: float
    fps: float
    answer: int


@dataclass(frozen=True)
class StreamCapacity:
    """What a load takes, estimated.

    Attributes:
        load: The load.
        memory: Bytes for all streams, weights included.
        per_stream: Bytes of one stream.
        vision: Share of the device's time for encoding all streams' frames; 1 is all of it.
        answers: Share for answering.
        most_by_memory: Streams that fit into the usable memory.
        most_by_time: Streams that keep up.
    """

    load: StreamLoad
    memory: int
    per_stream: int
    vision: float
    answers: float
    most_by_memory: int
    most_by_time: int

    @property
    def busy(self) -> float:
        """Share of the device's time."""
        return self.vision + self.answers

    @property
    def most(self) -> int:
        """Streams that fit and keep up."""
        return min(self.most_by_memory, self.most_by_time)

    @property
    def holds(self) -> bool:
        """Whether the load fits, and keeps up."""
        return self.load.streams <= self.most


def stream_capacity(found: Estimate, load: StreamLoad) -> StreamCapacity:
    """Memory and time of streams of an estimate's workload.

    Raises:
        TangoError: An answer is longer than the cache has room for.
    """
    memory, workload, video = found.memory, found.workload, found.model.video
    room = workload.context - workload.prompt
    if load.answer > room:
        raise TangoError(
            f"an answer of {load.answer} tokens does not fit: the context has {workload.context} positions, the prompt "
            f"takes {workload.prompt}",
            "give fewer --max-new-tokens, or a larger --context",
        )
    per_stream = memory.cache + memory.tensors
    shared = memory.total - per_stream
    step = vision_time(found.model, found.device, video.frames_per_step, workload.vision)
    times = found.times
    encode = step * load.fps / video.frames_per_step
    answer = (times.prune + times.prefill + load.answer * times.token) / load.every
    return StreamCapacity(
        load,
        memory=shared + load.streams * per_stream,
        per_stream=per_stream,
        vision=load.streams * encode,
        answers=load.streams * answer,
        most_by_memory=max(found.device.usable - shared, 0) // per_stream,
        most_by_time=int(1 / (encode + answer)),
    )
