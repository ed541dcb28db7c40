"""Inner pruning on a GPU, emulated on the host: the same answers as the CPU's. The CPU's are compared with NumPy."""

from __future__ import annotations

import shutil
from itertools import zip_longest

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.backends.cuda.device import Stream
from tango_runtime.backends.cuda.ort_fused import FusedOrtRunner
from tango_runtime.bundle import Bundle
from tests.fakes.cuda import install
from tests.fakes.tensorrt_engines import MACHINE, build, open_backend

QUESTIONS = ["What happens in the video?", "Who?", "What happens here?"]


@pytest.fixture(scope="module")
def folder(responsive_checkpoint):
    return responsive_checkpoint("llava-video", image=126, layers=4, inner=(2, 0.5))[1]


@pytest.fixture
def host(monkeypatch):
    return install(monkeypatch)


@pytest.fixture
def make(host, folder, tmp_path, monkeypatch):
    """``make("onnxruntime", tokens_at_once=7)`` or ``make("tensorrt")``: a chain on the emulated GPU."""
    import onnxruntime

    def made(engine="onnxruntime", **limits):
        if engine == "tensorrt":
            built = shutil.copytree(folder, tmp_path / "built")
            build(built, max_frames=8, max_tokens=100, context=900)
            llm = VideoLLM(built, "ort-cpu")
            llm._backend = open_backend(llm.bundle, host, monkeypatch)
            return llm
        llm, stream = VideoLLM(folder, "ort-cpu"), Stream()
        graphs = FusedOrtRunner(onnxruntime, llm.bundle, stream, ("CPUExecutionProvider", "cpu"))
        for name, value in limits.items():
            setattr(graphs, name, value)
        llm._backend = CudaBackend(llm.bundle, graphs, stream)
        return llm

    return made


ENGINES = [("onnxruntime", {}), ("onnxruntime", {"tokens_at_once": 31}), ("tensorrt", {})]


@pytest.mark.parametrize("options", [{}, {"retention_ratio": 0.4}, {"prune": False}])
@pytest.mark.parametrize(("engine", "limits"), ENGINES)
def test_the_answer_is_the_cpus(make, folder, colors, engine, limits, options):
    options = {"frames": 8, "max_new_tokens": 16, **options}
    found, wanted = (
        llm.generate(colors, QUESTIONS[0], **options) for llm in (make(engine, **limits), VideoLLM(folder, "ort-cpu"))
    )
    assert found.ids == wanted.ids
    for name in ("kept", "rows", "thinned", "prompt_tokens"):
        assert getattr(found, name) == getattr(wanted, name)


@pytest.mark.parametrize(("engine", "limits"), ENGINES)
def test_sessions_and_streams_take_turns(make, folder, colors, engine, limits):
    cpu, llm = VideoLLM(folder, "ort-cpu"), make(engine, **limits)
    alone = [cpu.generate(colors, question, frames=8, max_new_tokens=6).ids for question in QUESTIONS]
    with llm.session(colors, frames=8) as first, llm.session(colors[::-1], frames=8) as other:
        for question, wanted in zip(QUESTIONS, alone, strict=True):
            other.ask(question, max_new_tokens=2)
            assert first.ask(question, max_new_tokens=6).ids == wanted
        streams = [first.stream(question, max_new_tokens=6) for question in QUESTIONS]
        for _ in zip_longest(*streams):
            pass
        assert [stream.answer.ids for stream in streams] == alone


def test_a_conversation_outgrows_its_first_cache(make, folder, colors):
    chats, llm = [], make()
    for each in (llm, VideoLLM(folder, "ort-cpu")):
        with each.session(colors, frames=8) as session:
            chats.append([session.chat("Go on.", max_new_tokens=40).ids for _ in range(3)])
            cache = session._cache._cache
    assert chats[0] == chats[1]
    assert cache.low.capacity >= cache.length > 256


def test_an_engine_that_is_too_small_is_named(make, colors):
    with pytest.raises(TangoError, match="positions, the decoder's engine holds 900"):
        make("tensorrt").generate(colors, QUESTIONS[0], frames=8, max_new_tokens=900)


def test_memory_grows_to_a_peak_and_no_further(make, host, colors):
    llm, held = make(), []
    for _ in range(3):
        for frames, ratio in ((8, 0.5), (2, 0.1), (5, 0.3)):
            llm.generate(colors, QUESTIONS[0], frames=frames, retention_ratio=ratio, max_new_tokens=4)
        held.append(host.held())
    assert held[1] == held[2]


def test_after_a_pass_that_failed_the_sequence_is_as_long_as_before(make, colors, monkeypatch):
    llm = make()
    with llm.session(colors, frames=8) as session:
        wanted = session.ask(QUESTIONS[0], max_new_tokens=4).ids
        graphs, bind = llm._backend._graphs, llm._backend._graphs.bind

        def failing(graph, tensors, **options):
            if graph == "decoder_high":
                raise TangoError("the engine failed", "")
            return bind(graph, tensors, **options)

        monkeypatch.setattr(graphs, "bind", failing)
        with pytest.raises(TangoError, match="the engine failed"):
            session.ask(QUESTIONS[1], max_new_tokens=4)
        monkeypatch.setattr(graphs, "bind", bind)
        assert session.ask(QUESTIONS[0], max_new_tokens=4).ids == wanted


def test_a_graph_that_the_bundle_has_not_is_named(folder):
    from tango_runtime.engines import BuildOptions, plan_engines

    bundle = Bundle.load(folder)
    with pytest.raises(TangoError, match="has no graph decoder") as caught:
        plan_engines(bundle, MACHINE, BuildOptions(), ["decoder"])
    assert "vision, prune, embed, decoder_low, decoder_high" in caught.value.hint
    low, high = plan_engines(bundle, MACHINE, BuildOptions(), ["decoder_low", "decoder_high"])
    assert low.memory.cache == high.memory.cache > 0
    assert [profile["rotary"] for profile in high.profiles] == [profile["positions"] for profile in high.profiles]
    assert np.array_equal(low.profiles[1]["embeddings"], high.profiles[1]["rows"])
