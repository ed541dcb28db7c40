"""The pipeline as calibration runs it, and its decoder run again on what was captured."""

from __future__ import annotations

import numpy as np
import pytest

from tango_calibration.quantization import replay
from tango_calibration.quantization.capture import capture
from tango_calibration.quantization.clips import read_clips
from tango_calibration.quantization.stored import StoredGraph
from tango_runtime.backends.registry import select
from tango_runtime.bundle import Bundle
from tango_runtime.pipeline.prompt import Prompt
from tango_runtime.pipeline.video_llm import VideoLLM
from tests.fakes.sequence import OneSequence


@pytest.fixture(scope="module")
def fp16(bundle):
    return Bundle.load(bundle())


@pytest.fixture(scope="module")
def clips():
    return read_clips("synthetic", 4, 8)


@pytest.fixture(scope="module")
def captured(fp16, clips):
    return capture(fp16, select(fp16, "ort-cpu"), Prompt.of(fp16), clips[0], 4)


def test_a_capture_is_a_run_of_the_pipeline(fp16, clips, captured):
    answer = VideoLLM(fp16.path, "ort-cpu").generate(
        clips[0].source, clips[0].questions[0].text, frames=8, max_new_tokens=4
    )
    assert (captured.indices == answer.indices).all()
    assert len(captured.decoder_input.prompt) == answer.prompt_tokens
    assert len(captured.decoder_input.answer) == len(answer.ids)


def test_a_replay_of_the_decoder_gives_the_same_logits(fp16, captured, monkeypatch):
    """In chunks of any length, with the activations of every layer beside the logits."""
    stored = StoredGraph(fp16, "decoder")
    inputs, specs = list(dict.fromkeys(layer.input for layer in stored.linears)), fp16.manifest.graphs
    sessions = {"decoder": replay.open_graph(stored, more=inputs)}
    answer_tokens = len(captured.decoder_input.answer)
    whole = [outputs for _, outputs in replay.run_decoder(sessions, specs, captured.decoder_input)]
    monkeypatch.setattr(replay, "CHUNK_TOKENS", 20)
    parts = [outputs for _, outputs in replay.run_decoder(sessions, specs, captured.decoder_input)]
    assert len(whole) == 1 + answer_tokens < len(parts)
    expected = OneSequence(select(fp16, "ort-cpu")).prefill([captured.decoder_input.prompt], 2000)
    for run in (whole[0], parts[-1 - answer_tokens]):
        np.testing.assert_allclose(run[0], expected, atol=0.05 * np.abs(expected).max())
    first = np.concatenate([p[1] for p in parts])
    np.testing.assert_allclose(first, np.concatenate([w[1] for w in whole]), atol=0.02 * np.abs(first).max())
