"""Answers of models/tiny that share decode steps, by the CUDA library's kernel in the CUDA emulator: the tokens are
those of the plain graphs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnxruntime
import pytest

from tango_plugins.decoder import CudaBatchDecoder, cache_table
from tango_runtime import VideoLLM
from tango_runtime.backends.cuda import device_decoder
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.backends.cuda.device import Stream
from tango_runtime.backends.cuda.ort_fused import FusedOrtRunner
from tests.fakes.cuda import install
from tests.plugins.cuda_emulator import compiled

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]

TINY = Path(__file__).parents[3] / "models" / "tiny"
QUESTIONS = ["What color is the circle?", "How many shapes are there?"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    from tango_export.export import Request, export

    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    return export(Request("llava-ov", str(TINY / "llava"), str(TINY / "siglip"), folder, dtype="fp16"))


@pytest.fixture
def llm(bundle, monkeypatch, tmp_path):
    """On CUDA, emulated, with the library's own step."""
    install(monkeypatch)
    library = compiled(tmp_path, "decode")
    monkeypatch.setattr(device_decoder, "CudaBatchDecoder", partial(CudaBatchDecoder, library=library, blocks=2))
    monkeypatch.setattr(device_decoder, "cache_table", cache_table)
    found, stream = VideoLLM(bundle, "ort-cpu"), Stream()
    runner = FusedOrtRunner(onnxruntime, found.bundle, stream, ("CPUExecutionProvider", "cpu"))
    return VideoLLM(found.bundle, CudaBackend(found.bundle, runner, stream), sequences=8)


def test_the_tokens_are_those_of_each_alone(llm, bundle, frames):
    plain, tokens = VideoLLM(bundle, "ort-cpu"), 3
    session, other = (llm.session(video, frames=8) for video in (frames, frames[::-1]))
    asked = [(session, frames, QUESTIONS[0]), (session, frames, QUESTIONS[1]), (other, frames[::-1], QUESTIONS[0])]
    streams = [session.stream(question, max_new_tokens=tokens) for session, _, question in asked]
    left = streams
    while left:
        left = [stream for stream in left if stream.turn() is not None]
    wanted = [plain.generate(video, question, frames=8, max_new_tokens=tokens).ids for _, video, question in asked]
    assert [stream.answer.ids for stream in streams] == wanted
    assert len(set(map(tuple, wanted))) > 1
