"""Device graphs of Qwen2.5-VL and of a decoder with inner pruning, with the GPU's memory emulated on the host: the same
answers as the plain graphs on the CPU, which are compared with NumPy elsewhere."""

from __future__ import annotations

from functools import cache
from itertools import zip_longest

import numpy as np
import onnxruntime
import pytest

from tango_runtime import VideoLLM
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.backends.cuda.device import Stream
from tango_runtime.backends.cuda.ort_fused import FusedOrtRunner
from tango_runtime.sizing import memory
from tests.fakes.cuda import install
from tests.fakes.device_graphs import with_device_graphs
from tests.gpu.runtime.thinned import assert_rounded_only, logits

QUESTION = "What happens in the video?"
QWEN, INNER = "qwen", "inner"

#: Frames as the family takes them.
VIDEO = {QWEN: {"frames": 7, "frame_size": (84, 140)}, INNER: {"frames": 8}}


@pytest.fixture(scope="module")
def folder(responsive_qwen, responsive_checkpoint, tmp_path_factory):
    """``folder(QWEN, "fp32")``: a bundle with device graphs."""

    @cache
    def made(family, dtype):
        if family == QWEN:
            bundle = responsive_qwen(dtype=dtype)[1]
        else:
            bundle = responsive_checkpoint("llava-video", image=126, layers=4, inner=(2, 0.5), dtype=dtype)[1]
        return with_device_graphs(bundle, tmp_path_factory.mktemp(family) / dtype, dtype)

    return made


@pytest.fixture
def make(folder, monkeypatch):
    """``make(QWEN, "fp32", tokens_at_once=7)``: a chain with the device graphs, and one with the CPU's plain ones."""
    install(monkeypatch)

    def made(family, dtype="fp32", **limits):
        plain, llm = (VideoLLM(folder(family, dtype), "ort-cpu") for _ in range(2))
        stream = Stream()
        graphs = FusedOrtRunner(onnxruntime, llm.bundle, stream, ("CPUExecutionProvider", "cpu"))
        for name, value in limits.items():
            setattr(graphs, name, value)
        llm._backend = CudaBackend(llm.bundle, graphs, stream)
        return llm, plain

    return made


def clip(seed=0):
    """uint8 [12, 60, 90, 3]: scenes of noise, and a block that moves."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 255, (3, 60, 90, 3), dtype=np.uint8)[np.arange(12) // 4]
    for i, frame in enumerate(frames):
        frame[i : i + 20, 3 * i : 3 * i + 25] = (230, 60, 40)
    return frames


@pytest.mark.parametrize("family", [QWEN, INNER])
def test_every_graph_has_a_device_form_and_grows_its_cache_in_place(make, family):
    llm, _ = make(family)
    graphs = llm.bundle.manifest.graphs
    assert all(graphs[name].device for name in ("vision", "embed", *llm.bundle.manifest.decoders))
    assert llm._backend._graphs.in_place


@pytest.mark.parametrize("family", [QWEN, INNER])
@pytest.mark.parametrize("options", [{}, {"retention_ratio": 0.4}, {"prune": False}])
@pytest.mark.parametrize("limits", [{}, {"tokens_at_once": 16, "steps_at_once": 3}])
def test_the_answer_is_the_plain_graphs(make, family, options, limits):
    llm, plain = make(family, **limits)
    options = {"max_new_tokens": 32, **VIDEO[family], **options}
    found, wanted = (each.generate(clip(), QUESTION, **options) for each in (llm, plain))
    assert found.ids == wanted.ids
    for name in ("indices", "kept", "rows", "thinned", "prompt_tokens"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    np.testing.assert_allclose(found.salience, wanted.salience, atol=1e-6)


@pytest.mark.parametrize("family", [QWEN, INNER])
def test_half_precision_too(make, family):
    llm, plain = make(family, "fp16")
    options = {"max_new_tokens": 8, "prune": False, **VIDEO[family]}
    found, wanted = (each.generate(clip(), QUESTION, **options) for each in (llm, plain))
    assert found.ids == wanted.ids


def test_a_thinned_prompt_in_half_precision_is_as_close_to_fp32_as_by_the_plain_graphs(make):
    chains = (*make(INNER, "fp16"), make(INNER, "fp32")[1])
    assert_rounded_only(*(logits(llm, 60, 30) for llm in chains))


@pytest.mark.parametrize("family", [QWEN, INNER])
def test_sessions_and_streams_take_turns(make, family):
    """Sequences with positions of their own, and other places in the upper layers' cache, one after the other."""
    llm, plain = make(family)
    questions, videos = ["What happens here?", "Who?", QUESTION], [clip(), clip(1)]
    wanted = [[plain.generate(v, q, max_new_tokens=6, **VIDEO[family]).ids for q in questions] for v in videos]
    with llm.session(videos[0], **VIDEO[family]) as first, llm.session(videos[1], **VIDEO[family]) as second:
        for i, question in enumerate(questions):
            assert [s.ask(question, max_new_tokens=6).ids for s in (first, second)] == [w[i] for w in wanted]
        streams = [first.stream(question, max_new_tokens=6) for question in questions]
        for _ in zip_longest(*streams):
            pass
        assert [stream.answer.ids for stream in streams] == wanted[0]


@pytest.mark.parametrize(("steps", "at_once"), [(0.5, [1, 1, 1, 1]), (3.5, [3, 1]), (1e3, [4])])
def test_steps_go_through_the_tower_as_memory_allows(make, monkeypatch, steps, at_once):
    """A patch takes two tensors of the tower's width in fp32, three of its MLP's and six of its own."""
    patch = 2 * 4 * 64 + 4 * (3 * 80 + 6 * 64)
    monkeypatch.setattr(memory, "VISION_BYTES", int(steps * 60 * patch))
    llm, _ = make(QWEN)
    bound, bind = [], llm._backend._graphs.bind

    def noted(graph, tensors, **options):
        bound.append((graph, tensors))
        return bind(graph, tensors, **options)

    monkeypatch.setattr(llm._backend._graphs, "bind", noted)
    llm.generate(clip(), QUESTION, max_new_tokens=1, frames=8, frame_size=(84, 140))
    assert [tensors["frames"].shape[0] for graph, tensors in bound if graph == "vision"] == at_once


def test_tokens_far_behind_their_slots_and_far_ahead(make):
    """Few of many tokens stay, or the times of the video's steps run far ahead."""
    llm, plain = make(QWEN)
    for fps in (0.02, 30.0):
        options = {**VIDEO[QWEN], "fps": fps, "max_new_tokens": 12, "retention_ratio": 0.2}
        found, wanted = (each.generate(clip(), QUESTION, **options) for each in (llm, plain))
        assert found.ids == wanted.ids
