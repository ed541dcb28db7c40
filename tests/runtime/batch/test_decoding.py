"""Videos decoded in processes: the same frames, errors that come back, and processes that die."""

from __future__ import annotations

import multiprocessing
import os
import signal

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime.batch.decoding import Decoders
from tango_runtime.bundle import Bundle
from tango_runtime.video.decoded import decode
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
    decoders = Decoders(manifest, FrameOptions(3), None, count)
    try:
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


def test_a_file_that_kills_its_process_fails_by_itself(manifest, clip):
    decoders = Decoders(manifest, FrameOptions(), None, 1)
    try:
        found = [decoders.submit(video) for video in (Deadly(), clip)]
        with pytest.raises(TangoError, match=r"the process that decoded deadly\.mp4 died"):
            found[0].result()
        assert len(found[1].result().batch) == 4
    finally:
        decoders.close()
