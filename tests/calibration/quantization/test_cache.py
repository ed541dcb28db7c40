"""What calibration keeps on disk."""

from __future__ import annotations

import numpy as np
import pytest

from tango_calibration.quantization.cache import ObservationCache
from tango_calibration.quantization.capture import Capture, DecoderInput
from tango_calibration.quantization.clips import read_clips
from tango_calibration.quantization.ranges import ChannelStats
from tango_plugins import TangoError
from tango_runtime.bundle import Bundle


@pytest.fixture(scope="module")
def fp16(bundle):
    return Bundle.load(bundle())


@pytest.fixture(scope="module")
def clips():
    return read_clips("synthetic", 4, 8)


def test_nothing_is_computed_twice(fp16, clips, tmp_path):
    made = []

    def make():
        made.append(1)
        some = np.ones((2, 3), np.float16)
        return Capture(
            np.arange(3, dtype=np.int32), np.zeros(3, np.bool_), DecoderInput(some, some[:0], np.arange(3)[None])
        )

    for max_new_tokens in (4, 4, 5):
        found = ObservationCache(tmp_path, fp16, max_new_tokens).capture(clips[0], make)
        assert found.decoder_input.answer.shape == (0, 3)
    ObservationCache(tmp_path, fp16, 4).capture(clips[1], make)
    assert len(made) == 3  # the first, another length, another clip


def test_what_fails_leaves_nothing(fp16, clips, tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ObservationCache(tmp_path / "cache", fp16, 4).capture(clips[0], fail)
    assert not list(tmp_path.rglob("*.npz*"))


def test_statistics_are_restored(fp16, clips, tmp_path):
    tensors = [np.random.default_rng(0).normal(size=(9, channels)).astype(np.float16) for channels in (3, 5)]
    cache, expected = ObservationCache(tmp_path, fp16, 4), ChannelStats.of(tensors)
    for _ in range(2):
        found = cache.channel_stats(clips[0], "decoder", lambda: ChannelStats.of(tensors))
        for name in ("amax", "square_sums"):
            assert [x.tolist() for x in getattr(found, name)] == [x.tolist() for x in getattr(expected, name)]
        assert found.rows == expected.rows


def test_a_damaged_file_is_named(fp16, clips, tmp_path):
    cache = ObservationCache(tmp_path, fp16, 4)
    cache.channel_stats(clips[0], "decoder", lambda: ChannelStats.of([np.ones((1, 3))]))
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(b"no archive")
    with pytest.raises(TangoError, match=file.name):
        cache.channel_stats(clips[0], "decoder", lambda: ChannelStats.of([np.ones((1, 3))]))
