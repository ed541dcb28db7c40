"""The stages with device graphs, with the GPU's memory emulated on the host and ONNX Runtime's CPU kernels.

What runs the graphs is ONNX Runtime itself, or a fake of TensorRT.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.backends.cuda import device_decoder, tensorrt
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.backends.cuda.device import Stream
from tango_runtime.backends.cuda.ort_fused import FusedOrtRunner
from tango_runtime.bundle import Bundle
from tango_runtime.system import gpu as system
from tests.fakes.cuda import HostBatchDecoder, install
from tests.fakes.device_graphs import with_device_graphs
from tests.fakes.sequence import OneSequence
from tests.fakes.tensorrt_engines import MACHINE, HostTensorRT, build
from tests.runtime.backends.test_cuda_backend import overflow

QUESTION = "What happens in the video?"
ENGINES = ("onnxruntime", "tensorrt")


@pytest.fixture(scope="module")
def fused(responsive_checkpoint, tmp_path_factory):
    """``fused("fp32")``: a bundle with device graphs, and engines."""

    @cache
    def made(dtype):
        _, bundle = responsive_checkpoint(dtype=dtype)
        folder = with_device_graphs(bundle, tmp_path_factory.mktemp("fused") / dtype, dtype)
        build(folder, max_frames=8, max_tokens=600, context=2048)
        return folder

    return made


@pytest.fixture
def host(monkeypatch):
    """CUDA, emulated."""
    return install(monkeypatch)


@pytest.fixture
def make(fused, host, monkeypatch):
    """``make(engine, dtype, **limits)``: a chain with the device graphs, and one with the CPU's plain ones."""
    import onnxruntime

    plugin = system.Plugin(Path("plugins.so"), "1", "V2")
    monkeypatch.setattr(system, "plugin", lambda: plugin)
    monkeypatch.setattr(tensorrt, "current_target", lambda version: MACHINE)

    def open_backend(engine, bundle):
        if engine == "tensorrt":
            trt = HostTensorRT(bundle, host)
            monkeypatch.setattr(tensorrt, "import_tensorrt", lambda: trt)
            return tensorrt.open_backend(bundle)
        stream = Stream()
        return CudaBackend(bundle, FusedOrtRunner(onnxruntime, bundle, stream, ("CPUExecutionProvider", "cpu")), stream)

    def made(engine="onnxruntime", dtype="fp32", folder=None, **limits):
        plain, llm = (VideoLLM(folder or fused(dtype), "ort-cpu") for _ in range(2))
        llm._backend = open_backend(engine, llm.bundle)
        for name, value in limits.items():
            setattr(llm._backend._graphs, name, value)
        return llm, plain

    return made


def close(found, wanted, tolerance=1e-4):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize(
    ("engine", "limits"),
    [
        ("onnxruntime", {}),
        ("onnxruntime", {"tokens_at_once": 16, "steps_at_once": 3}),
        ("onnxruntime", {"tokens_at_once": 7}),
        ("tensorrt", {}),
        ("tensorrt", {"tokens_at_once": 7}),
    ],
)
def test_sixty_four_tokens_are_the_plain_graphs(make, colors, engine, limits, prune):
    llm, plain = make(engine, **limits)
    options = {"frames": 8, "prune": prune, "max_new_tokens": 64}
    found, wanted = (each.generate(colors, QUESTION, **options) for each in (llm, plain))
    np.testing.assert_array_equal(found.indices, wanted.indices)
    assert found.ids == wanted.ids


@pytest.mark.parametrize("budget", ["paper", "exact"])
@pytest.mark.parametrize("engine", ENGINES)
def test_second_questions_of_either_budget_are_the_plain_graphs(make, colors, engine, budget):
    heard = []
    for llm in make(engine):
        llm.bundle = with_budget(llm.bundle, budget)
        with llm.session(colors, frames=8) as session:
            answers = [session.ask(text, max_new_tokens=12) for text in (QUESTION, "Who?", QUESTION)]
            answers.append(session.chat("And then?", max_new_tokens=12))
        heard.append([(answer.ids, answer.kept) for answer in answers])
    assert heard[0] == heard[1]
    assert heard[0][0] == heard[0][2]


def with_budget(bundle, budget):
    manifest = bundle.manifest
    return replace(bundle, manifest=replace(manifest, prune=manifest.prune | {"budget": budget}))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("fp16", 3e-2)])
def test_text_follows_text_and_is_rewound(make, engine, dtype, tolerance):
    ids, heard = np.arange(20, 29), []
    for llm in make(engine, dtype):
        stages, rows = OneSequence(llm._backend), []
        tokens = np.random.default_rng(0).standard_normal((30, llm.bundle.manifest.decoder.hidden_size))
        tokens = tokens.astype(llm.bundle.manifest.dtype)
        stages.prefill([stages.embed(ids), tokens, stages.embed(ids[:1])], 64)
        for question in (ids[:5], ids[3:4], ids[:5]):
            stages.rewind(40)
            rows.append(np.array(stages.extend(stages.embed(question))))
            rows += [np.array(stages.decode(token)) for token in (5, 9)]
        heard.append(np.stack(rows))
    close(*heard, tolerance)
    np.testing.assert_array_equal(heard[0][:3], heard[0][6:])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_of_one_token_and_one_that_fills_the_context(make, engine):
    for count in (1, 2047):
        heard = []
        for llm in make(engine):
            stages = OneSequence(llm._backend)
            rows = [np.array(stages.prefill([stages.embed(np.arange(count) % 200)], 2048))]
            heard.append(np.stack([*rows, np.array(stages.decode(7))]))
        close(*heard)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_overflow_left_in_the_cache_is_forgotten(make, frames, engine):
    llm, _ = make(engine)
    wanted = llm.generate(frames, QUESTION, max_new_tokens=8).ids
    overflow(llm._backend)
    assert llm.generate(frames, QUESTION, max_new_tokens=8).ids == wanted


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("fp16", 3e-2)])
def test_a_step_is_a_pass_of_one_token(make, engine, dtype, tolerance):
    stages = OneSequence(make(engine, dtype)[0]._backend)
    for count in (1, 30, 500):
        stages.prefill([stages.embed(np.arange(count) % 200)], 512)
        for length, token in enumerate((7, 8, 7), count):
            stepped = np.array(stages.decode(token))
            stages.rewind(length)
            close(stepped, np.array(stages.extend(stages.embed(np.array([token])))), tolerance)


def test_steps_go_on_in_another_cache(make):
    heard = []
    for llm in make():
        stages, rows = OneSequence(llm._backend), []
        for capacity in (300, 2048, 512):
            if isinstance(stages, CudaBackend):
                stages._graphs.capacity = capacity
            stages.prefill([stages.embed(np.arange(60))], 200)
            rows += [np.array(stages.decode(token)) for token in (5, 9)]
        heard.append(np.stack(rows))
    close(*heard)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_lie_on_the_device_once(make, host, engine):
    llm, _ = make(engine)
    graphs = llm.bundle.manifest.graphs
    sizes = {llm.bundle.manifest.files[graphs[name].data].size for name in ("vision", "decoder")}
    for _ in range(3):
        stages = OneSequence(llm._backend)
        stages.prefill([stages.embed(np.arange(9))], 64)
        stages.decode(1)
        cache = stages.cache._buffer.size
        held = [size for _, size in host.blocks.values() if size >= min(sizes) and size != cache]
        assert sorted(held) == sorted(sizes)
    del llm, stages
    assert not host.blocks


@pytest.mark.parametrize("engine", ENGINES)
def test_for_a_token_its_embedding_goes_up(make, engine):
    stages = OneSequence(make(engine)[0]._backend)
    logits, traffic = stages.prefill([stages.embed(np.arange(9))], 64), stages.traffic
    before = replace(traffic)
    for _ in range(40):  # more than there is pinned memory for
        logits = stages.decode(logits.argmax()[0])
    assert (traffic.uploads, traffic.downloads) == (before.uploads + 40, before.downloads + 40)


@pytest.fixture(scope="module")
def quantized(responsive_checkpoint, tmp_path_factory):
    """``quantized(vision=…, decoder=…)``: a bundle whose quantized graphs have device forms.

    Its INT4 products take activations as they are, as the device form does, so that the two differ in rounding only.
    """
    from tango_calibration.quantization.calibrate import CalibrationRequest, calibrate
    from tango_export.graph import blocks

    root = tmp_path_factory.mktemp("quantized")

    @cache
    def made(**precisions):
        _, bundle = responsive_checkpoint(dtype="fp16")
        output = root / "-".join(precisions.values())
        sizes = {"videos": 4, "frames": 8, "max_new_tokens": 2, "cache": root / "cache"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "ACCURACY_LEVEL", 0)
            calibrate(CalibrationRequest(bundle, output, "synthetic", **precisions, **sizes))
        return output

    return made


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.2), ("int4", 0.03)])
def test_the_device_graph_of_a_quantized_decoder_is_its_plain_one(make, quantized, precision, most):
    """And so are its decode steps. In INT8 the plain one also rounds their activations to 8 bits."""
    heard = []
    for llm in make(folder=quantized(vision="fp16", decoder=precision)):
        assert llm.bundle.manifest.graphs["decoder"].quantization
        stages = OneSequence(llm._backend)
        rows = [np.array(stages.prefill([stages.embed(np.arange(20, 60))], 64))]
        rows += [np.array(stages.decode(token)) for token in (5, 9, 5)]
        stages.rewind(41)
        rows.append(np.array(stages.extend(stages.embed(np.arange(9, 12)))))
        heard.append(np.stack(rows))
    difference, size = (np.linalg.norm(x, axis=-1) for x in (heard[0] - heard[1], heard[1]))
    assert (difference < most * size).all()


def test_the_device_graph_of_a_quantized_tower_is_its_plain_one(make, quantized, colors):
    heard = []
    for llm in make(folder=quantized(vision="int8", decoder="int4")):
        frames = np.random.default_rng(0).integers(0, 255, (4, 112, 112, 3), np.uint8)
        heard.append([llm._backend.to_host(t).astype(np.float64) for t in llm._backend.vision(frames, lambda n: None)])
        assert len(llm.generate(colors, QUESTION, frames=8, max_new_tokens=4).ids) == 4
    for found, wanted in zip(*heard, strict=True):
        assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)


def test_int8_costs_a_device_graph_what_it_costs_its_plain_one(make, quantized, responsive_checkpoint):
    """Both round activations to 8 bits. What calibration measures with the plain one is so true of the other."""
    _, fp16 = responsive_checkpoint(dtype="fp16")
    heard, frames = [], np.random.default_rng(0).integers(0, 255, (4, 112, 112, 3), np.uint8)
    for llm in (*make(folder=quantized(vision="int8", decoder="int8")), VideoLLM(fp16, "ort-cpu")):
        tensors, stages = llm._backend.vision(frames, lambda n: None), OneSequence(llm._backend)
        logits = np.array(stages.prefill([stages.embed(np.arange(20, 60))], 64))
        heard.append([*(llm._backend.to_host(t).astype(np.float64) for t in tensors), logits])
    for device, plain, wanted in zip(*heard, strict=True):
        costs = [np.linalg.norm(found - wanted) / np.linalg.norm(wanted) for found in (device, plain)]
        assert 0.7 < costs[0] / costs[1] < 1.4, costs


def test_device_graphs_in_fp8_and_decode_steps_are_close_to_fp16(bundle, host, tmp_path):
    """Their weights are inputs of a type that NumPy does not have."""
    import onnxruntime

    from tango_calibration.quantization.calibrate import CalibrationRequest, calibrate

    folder, stream = bundle(vision_width=96, vision_intermediate=192), Stream()
    sizes = {"videos": 4, "frames": 8, "max_new_tokens": 2}
    calibrate(CalibrationRequest(folder, tmp_path / "fp8", "synthetic", vision="fp8", decoder="fp8", **sizes))
    fp8 = Bundle.load(tmp_path / "fp8")
    graphs = FusedOrtRunner(onnxruntime, fp8, stream, ("CPUExecutionProvider", "cpu"))
    frames = np.random.default_rng(0).integers(0, 255, (2, *fp8.manifest.video.size, 3), np.uint8)
    heard = []
    for backend in (CudaBackend(fp8, graphs, stream), VideoLLM(folder, "ort-cpu")._backend):
        tensors = [backend.to_host(t) for t in backend.vision(frames, lambda done: None)]
        stages = OneSequence(backend)
        tensors.append(np.array(stages.prefill([stages.embed(np.arange(20, 60))], 64)))
        tensors += [np.array(stages.decode(token)) for token in (5, 9, 5)]
        heard.append([tensor.astype(np.float64) for tensor in tensors])
    for found, wanted in zip(*heard, strict=True):
        assert 0 < np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


def test_a_bundle_without_fused_graphs_runs_its_plain_ones(tiny_bundle, host, colors):
    import onnxruntime

    llm = VideoLLM(tiny_bundle, "ort-cpu")
    wanted, stream = [llm.generate(colors, text, max_new_tokens=8).ids for text in (QUESTION, "Where?")], Stream()
    graphs = FusedOrtRunner(onnxruntime, llm.bundle, stream, ("CPUExecutionProvider", "cpu"))
    assert not graphs.in_place
    llm._backend = CudaBackend(llm.bundle, graphs, stream)
    assert [llm.generate(colors, text, max_new_tokens=8).ids for text in (QUESTION, "Where?")] == wanted


@pytest.mark.parametrize("engine", ENGINES)
def test_sessions_take_turns_as_if_each_question_were_asked_anew(make, colors, engine):
    llm = make(engine)[0]
    videos, questions = (colors, colors[::-1]), [QUESTION, "Who?", "What happens here?", QUESTION]
    alone = [[llm.generate(video, each, max_new_tokens=8).ids for video in videos] for each in questions]
    sessions = [llm.session(video) for video in videos]
    for question, wanted in zip(questions, alone, strict=True):
        assert [session.ask(question, max_new_tokens=8).ids for session in sessions] == wanted
    streams = [session.stream(questions[1], max_new_tokens=8) for session in sessions]
    for pieces in zip_longest(*streams):
        assert pieces
    assert [stream.answer.ids for stream in streams] == alone[1]


def in_turns(streams):
    """Reads a token of each stream in turn, to their ends."""
    left = list(streams)
    while left:
        left = [stream for stream in left if stream.turn() is not None]
    return [stream.answer.ids for stream in streams]


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_of_one_and_of_several_sessions_share_steps(make, colors, engine):
    llm, plain = make(engine)
    llm._backend.batch(8)
    assert llm.sequences == 8
    questions = QUESTION, "Who?", "What happens here?"
    sessions = [llm.session(video) for video in (colors, colors[::-1])]
    streams = [session.stream(question, max_new_tokens=8) for question in questions for session in sessions]
    wanted = [plain.generate(video, q, max_new_tokens=8).ids for q in questions for video in (colors, colors[::-1])]
    assert in_turns(streams) == wanted
    assert max(HostBatchDecoder.steps) == 6
    assert sum(HostBatchDecoder.steps) == sum(len(ids) - 1 for ids in wanted)


def test_sampled_answers_share_steps(make, colors):
    llm, plain = make()
    llm._backend.batch(2)
    options = {"temperature": 1.0, "max_new_tokens": 8}
    session = llm.session(colors)
    found = in_turns([session.stream(QUESTION, seed=seed, **options) for seed in (3, 4, 5)])
    assert found == [plain.generate(colors, QUESTION, seed=seed, **options).ids for seed in (3, 4, 5)]
    assert max(HostBatchDecoder.steps) == 2


def test_for_a_step_of_several_sequences_the_host_reads_once(make, colors):
    llm = make()[0]
    llm._backend.batch(8)
    session = llm.session(colors)
    streams = [session.stream(question, max_new_tokens=16) for question in (QUESTION, "Who?", "Where?")]
    for stream in (*streams, *streams):  # the second turn makes what a step needs of each sequence
        stream.turn()
    before = replace(llm._backend.traffic)
    for stream in (*streams, *streams):
        stream.turn()
    traffic = llm._backend.traffic
    assert (traffic.uploads, traffic.downloads) == (before.uploads + 2, before.downloads + 2)


def test_released_caches_serve_the_next_answers(make, host, colors):
    llm = make()[0]
    llm._backend.batch(3)
    session, held = llm.session(colors), []
    for _ in range(3):
        in_turns([session.stream(question, max_new_tokens=4) for question in (QUESTION, "Who?", "Where?")])
        held.append((host.held(), host.allocations))
    assert held[1] == held[2]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_a_gpu_cannot_share_is_each_sequences_own(make, colors, monkeypatch, caplog, engine):
    def rejected(*arguments):
        raise TangoError("the inputs of 8 sequences do not fit", "")

    monkeypatch.setattr(device_decoder, "CudaBatchDecoder", rejected)
    llm, plain = make(engine)
    llm._backend.batch(8)
    assert llm.sequences == 1
    assert "sequences are decoded one after the other: the inputs of 8 sequences do not fit" in caplog.text
    assert (
        llm.generate(colors, QUESTION, max_new_tokens=4).ids == plain.generate(colors, QUESTION, max_new_tokens=4).ids
    )


def test_a_question_binds_no_cache_anew(make):
    backend = make("tensorrt")[0]._backend
    stages, context = OneSequence(backend), backend._graphs._contexts["decoder"]
    stages.prefill([stages.embed(np.arange(30))], 64)
    given = []
    context.set_tensor_address = lambda name, address: given.append(name) or True
    stages.rewind(20)
    stages.extend(stages.embed(np.arange(5)))
    assert given == ["embeddings"]  # where they lay, in another shape


def test_engines_of_either_form_run_together(make, fused, colors, tmp_path):
    """As where one was built before its plugins were."""
    for portable in ("vision", "embed", "decoder"):
        folder = shutil.copytree(fused("fp32"), tmp_path / portable)
        for file in (folder / "engines").glob(f"{portable}-*"):
            file.unlink()
        build(folder, graphs=[portable], form="portable", max_frames=8, max_tokens=600, context=2048)
        llm, plain = make("tensorrt", folder=folder)
        assert llm._backend._graphs.in_place == (portable != "decoder")
        found, wanted = (each.generate(colors, QUESTION, frames=8, max_new_tokens=8).ids for each in (llm, plain))
        assert found == wanted


def test_plugins_that_cannot_be_loaded_are_named(make, monkeypatch):
    monkeypatch.setattr(HostTensorRT, "load_library", lambda self, path: None)
    with pytest.raises(TangoError, match=r"cannot load the plugins of plugins\.so") as error:
        make("tensorrt")
    assert "tango plugin build" in error.value.hint
