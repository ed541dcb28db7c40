"""Videos decoded in processes: the same frames, errors that come back, and processes that die.

A process with a GPU is one whose decoder is in the place of :class:`tango_runtime.backends.cuda.frames.GpuDecoder`.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from concurrent import futures
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime.batch import decoding
from tango_runtime.batch.decoding import Decoders
from tango_runtime.bundle import Bundle
from tango_runtime.bundle.manifest import PixelBudget
from tango_runtime.util.processes import Child
from tango_runtime.video.decoded import decode
from tango_runtime.video.preprocess import preprocess
from tango_runtime.video.shape import FrameOptions


class Deadly:
    """Kills the process that reads it from its pipe, as a file does on which a decoder crashes."""

    def __reduce__(self):
        return _kill, ()

    def __str__(self):
        return "deadly.mp4"


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def manifest(tiny_bundle):
    return Bundle.load(tiny_bundle).manifest


@pytest.mark.parametrize("count", [0, 1])
def test_decoders_give_what_decoding_here_gives(manifest, clip, tmp_path, count):
    decoders = Decoders(manifest, FrameOptions(3), count)
    try:
        decoders.ready(None)
        found = [decoders.submit(video) for video in (clip, tmp_path / "none.mp4", clip)]
        wanted = decode(manifest, clip, FrameOptions(3))
        for decoded in (found[0].result(), found[2].result()):
            np.testing.assert_array_equal(decoded.batch.host_frames, wanted.batch.host_frames)
            np.testing.assert_array_equal(decoded.clock.seconds, wanted.clock.seconds)
            assert (decoded.shape, decoded.batch.aspect) == (wanted.shape, wanted.batch.aspect)
        with pytest.raises(TangoError, match=r"none\.mp4 does not exist"):
            found[1].result()
    finally:
        decoders.close()
    assert not multiprocessing.active_children()


def test_what_a_process_is_started_with_fits_a_pipe(manifest):
    """So none is waited for, however many tensors a bundle has."""
    graphs = {f"{name} {i}": graph for name, graph in manifest.graphs.items() for i in range(100)}
    large = replace(manifest, graphs=graphs)
    with closing(Decoders(large, FrameOptions(), 1, 1)) as decoders:
        assert all(len(pickle.dumps(opened)) < 1 << 14 for opened in decoders._open)


def test_a_file_that_kills_its_process_fails_by_itself(manifest, clip):
    decoders = Decoders(manifest, FrameOptions(), 1)
    try:
        found = [decoders.submit(video) for video in (Deadly(), clip)]
        with pytest.raises(TangoError, match=r"the process that decoded deadly\.mp4 died"):
            found[0].result()
        assert len(found[1].result().batch) == 4
    finally:
        decoders.close()


def test_a_process_that_dies_idle_takes_no_video_with_it(manifest, clip):
    with closing(Decoders(manifest, FrameOptions(3), 1)) as decoders:
        decoders._children[0].kill()
        assert len(decoders.submit(clip).result().batch) == 3


def gpu(manifest, options):
    """Marks what it decodes: the first pixel is the number of frames."""

    def load(timed, count, size):
        batch = preprocess(timed, size)
        batch.host_frames[0, 0, 0] = count
        return batch

    return lambda asked: None if asked is None else decode(manifest, asked[0], options, asked[1], load)


def no_gpu(manifest, options):
    raise TangoError("no NVIDIA GPU can be used", "see: tango doctor")


def dead_gpu(manifest, options):
    _kill()


def test_processes_with_a_gpu_decode_too(manifest, clip, monkeypatch):
    monkeypatch.setattr(decoding, "_open_on_gpu", gpu)
    with closing(Decoders(manifest, FrameOptions(3), 0, 1)) as decoders:
        assert len(decoders) == 1
        found = decoders.submit(clip).result().batch.host_frames
    assert found[0, 0, 0].tolist() == [3, 3, 3]
    np.testing.assert_array_equal(found[1:], decode(manifest, clip, FrameOptions(3)).batch.host_frames[1:])


def test_every_process_takes_videos(manifest, clip, monkeypatch):
    monkeypatch.setattr(decoding, "_open_on_gpu", gpu)
    with closing(Decoders(manifest, FrameOptions(3), 1, 1)) as decoders:
        decoders.ready(None)
        first, second = (decoders._idle.get() for _ in range(2))
        assert {first, second} == {0, 1}
        for i in (first, second):
            decoders._idle.put(i)
            found = decoders.submit(clip).result().batch.host_frames[0, 0, 0]
            assert (found.tolist() == [3, 3, 3]) == (i == 0)
            assert decoders._idle.get() == i


@pytest.mark.parametrize("in_software", [0, 1])
@pytest.mark.parametrize(("opened", "words"), [(no_gpu, "no NVIDIA GPU can be used"), (dead_gpu, "GPU died")])
def test_a_process_without_its_gpu_ends_all_at_once(manifest, clip, monkeypatch, opened, words, in_software):
    monkeypatch.setattr(decoding, "_open_on_gpu", opened)
    with closing(Decoders(manifest, FrameOptions(), in_software, 1)) as decoders:
        found = [decoders.submit(clip) for _ in range(3)]
        with pytest.raises(TangoError, match=words):
            decoders.ready(None)
    assert all(future.done() for future in found)
    assert not multiprocessing.active_children()


@pytest.fixture
def any_size(manifest):
    """A manifest whose frames have any size."""
    return replace(manifest, video=replace(manifest.video, budget=PixelBudget(32, 1024, 65536, 1 << 20)))


@pytest.mark.parametrize("fixed", [None, (32, 64)])
def test_a_size_that_the_backend_has_is_waited_for(any_size, clip, fixed):
    with closing(Decoders(any_size, FrameOptions(3), 1)) as decoders:
        found = decoders.submit(clip)
        decoders.ready(fixed)
        assert found.result().shape.size == decode(any_size, clip, FrameOptions(3), fixed).shape.size
    with closing(Decoders(any_size, FrameOptions(3), 1)) as decoders:
        found = decoders.submit(clip)  # ends although nothing was loaded
    assert found.done()


def test_without_processes_a_size_is_not_guessed(any_size, clip):
    with closing(Decoders(any_size, FrameOptions(3), 0)) as decoders, pytest.raises(futures.TimeoutError):
        decoders.submit(clip)


def test_decoding_in_software_stands_back_for_the_model():
    child = Child(partial(decoding._open_in_software, _niceness))
    child.send(None)
    assert child.receive() == min(_niceness(None) + 10, 19)
    child.kill()


def _niceness(_):
    return os.getpriority(os.PRIO_PROCESS, 0)
