"""Clips, the chain as calibration runs it, ranges, and what is kept of them."""

from __future__ import annotations

import numpy as np
import pytest

from examples.make_video import write
from tango_calibration.quantization import observe
from tango_calibration.quantization.observe import (
    Cache,
    Channels,
    Histograms,
    Prompted,
    Watched,
    read_clips,
    run_decoder,
    watch,
)
from tango_calibration.quantization.quantize import linears, read_graph
from tango_plugins import TangoError
from tango_runtime.backends.registry import select
from tango_runtime.bundle import Bundle
from tango_runtime.pipeline.prompt import Prompt
from tango_runtime.pipeline.video_llm import VideoLLM


@pytest.fixture(scope="module")
def fp16(bundle):
    return Bundle.load(bundle())


@pytest.fixture(scope="module")
def clips():
    return read_clips("synthetic", 4, 8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write(path)
    return path


@pytest.fixture(scope="module")
def watched(fp16, clips):
    return watch(fp16, select(fp16, "ort-cpu"), Prompt.of(fp16), clips[0], 4)


def test_watching_is_the_chain(fp16, clips, watched):
    answer = VideoLLM(fp16.path, "ort-cpu").generate(
        clips[0].source, clips[0].questions[0].text, frames=8, max_new_tokens=4
    )
    assert (watched.indices == answer.indices).all()
    assert len(watched.prompted.prompt) == answer.prompt_tokens
    assert len(watched.prompted.answer) == len(answer.ids)


def test_the_decoder_again_says_what_it_said(fp16, watched, monkeypatch):
    """In passes of any length, with the activations of every layer beside the logits."""
    model = read_graph(fp16.graph("decoder"))
    inputs = list(dict.fromkeys(layer.input for layer in linears(model)))
    specs = fp16.manifest.graphs["decoder"].inputs
    session = observe.open_graph(model, fp16.path, inputs)
    whole = list(run_decoder(session, specs, watched.prompted))
    monkeypatch.setattr(observe, "_PASS", 20)
    parts = list(run_decoder(session, specs, watched.prompted))
    assert len(whole) == 1 + len(watched.prompted.answer) < len(parts)
    stages = select(fp16, "ort-cpu")
    wanted = stages.prefill([watched.prompted.prompt], 2000)
    for run in (whole[0], parts[-1 - len(watched.prompted.answer)]):
        np.testing.assert_allclose(run[0], wanted, atol=0.05 * np.abs(wanted).max())
    first = np.concatenate([p[1] for p in parts])
    np.testing.assert_allclose(first, np.concatenate([w[1] for w in whole]), atol=0.02 * np.abs(first).max())


# Ranges


def test_histograms_of_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(50, 4)).astype(np.float16) * scale for scale in (1, 30, 0.01)]
    merged = Histograms.of([parts[0]]).merge(Histograms.of([parts[1]])).merge(Histograms.of([parts[2]]))
    whole = Histograms.of([np.concatenate(parts)])
    assert (merged.counts == whole.counts).all()
    assert (merged.tops == whole.tops).all()
    assert (merged.peaks == whole.peaks).all()
    assert merged.counts.sum() == 600


def test_histograms_far_apart():
    merged = Histograms.of([np.full(3, 1e-6, np.float32)]).merge(Histograms.of([np.full(2, 6e4, np.float32)]))
    assert merged.counts[0, 0] == 3
    assert merged.counts.sum() == 5


def test_ranges():
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    values[0] = 40
    (minmax,), (percentile,), (entropy,) = (Histograms.of([values]).ranges(m) for m in observe.METHODS)
    assert minmax == 40
    assert 3.8 < percentile < 4.1  # 0.9999 of the magnitudes of a normal distribution
    assert 2 < entropy < 8


@pytest.mark.parametrize("method", observe.METHODS)
def test_ranges_of_nothing_and_of_one_value(method):
    ranges = Histograms.of([np.zeros(5, np.float32), np.full(5, 3, np.float32)]).ranges(method)
    assert ranges[0] == 0
    assert 0 < ranges[1] <= 3


def test_channels():
    a, b = np.array([[1.0, -2], [0, 1]], np.float16), np.array([[-3.0, 0]], np.float16)
    both = Channels.of([a]).merge(Channels.of([b]))
    assert both.peaks[0].tolist() == [3, 2]
    np.testing.assert_allclose(both.energies()[0], [10 / 3, 5 / 3])


# What is kept


def test_nothing_is_observed_twice(fp16, clips, tmp_path):
    made = []

    def make():
        made.append(1)
        some = np.ones((2, 3), np.float16)
        return Watched(np.arange(3, dtype=np.int32), np.zeros(3, np.bool_), Prompted(some, some[:0]))

    for max_new_tokens in (4, 4, 5):
        found = Cache(tmp_path, fp16, max_new_tokens).watched(clips[0], make)
        assert found.prompted.answer.shape == (0, 3)
    Cache(tmp_path, fp16, 4).watched(clips[1], make)
    assert len(made) == 3  # another clip and another length are made anew, the same are not


def test_what_fails_leaves_nothing(fp16, clips, tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path / "cache", fp16, 4).watched(clips[0], fail)
    assert not list(tmp_path.rglob("*.npz*"))


def test_channels_and_histograms_come_back(fp16, clips, tmp_path):
    tensors = [np.random.default_rng(0).normal(size=(9, width)).astype(np.float16) for width in (3, 5)]
    cache = Cache(tmp_path, fp16, 4)
    for _ in range(2):
        channels = cache.channels(clips[0], "decoder", lambda: Channels.of(tensors))
        histograms = cache.histograms(clips[0], "decoder", lambda: Histograms.of(tensors))
    assert [p.tolist() for p in channels.peaks] == [np.abs(t).max(0).tolist() for t in tensors]
    assert (histograms.counts == Histograms.of(tensors).counts).all()


def test_a_damaged_file_is_named(fp16, clips, tmp_path):
    cache = Cache(tmp_path, fp16, 4)
    cache.histograms(clips[0], "decoder", lambda: Histograms.of([np.ones(3)]))
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(b"no archive")
    with pytest.raises(TangoError, match=file.name):
        cache.histograms(clips[0], "decoder", lambda: Histograms.of([np.ones(3)]))


# Clips


def test_calibration_never_sees_what_evaluation_asks(clips):
    assert all(video.source.split == "validation" for video in clips)


def test_a_folder_of_videos(clip, tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.mp4").symlink_to(clip)
    (tmp_path / "notes.txt").write_text("not a video")
    assert [video.name for video in read_clips(str(tmp_path), 4, 8)] == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]


def test_no_folder_no_clips_too_few(clip, tmp_path):
    with pytest.raises(TangoError, match="no folder"):
        read_clips(str(tmp_path / "nowhere"), 16, 8)
    with pytest.raises(TangoError, match="no clips"):
        read_clips(str(tmp_path), 16, 8)
    (tmp_path / "a.mp4").symlink_to(clip)
    with pytest.raises(TangoError, match="1 clips"):
        read_clips(str(tmp_path), 16, 8)
