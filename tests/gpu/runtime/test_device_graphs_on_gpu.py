"""The device graphs on a GPU, in TensorRT and ONNX Runtime, and the kernel that decodes, against the CPU's graphs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tango_runtime import VideoLLM
from tango_runtime.backends.cuda import ort_runner as sessions
from tango_runtime.backends.cuda.device import cudart
from tango_runtime.backends.registry import select
from tests.fakes.sequence import OneSequence
from tests.gpu.runtime import heads
from tests.gpu.runtime.conftest import build
from tests.gpu.runtime.test_backends import close


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """A bundle with the released heads."""
    given = request.config.getoption("--bundles")
    path = given / "heads" if given else heads.write(tmp_path_factory.mktemp("heads"))
    if not path.exists():
        pytest.skip(f"there is no {path}: python -m tests.gpu.runtime.heads {given}")
    return path


@pytest.fixture(scope="module", params=["tensorrt", "ort-cuda"])
def chains(request, folder, kept):
    """The bundle on the GPU, by its device graphs, and on the CPU."""
    onnxruntime, path = pytest.importorskip("onnxruntime"), folder
    if request.param == "tensorrt":
        pytest.importorskip("tensorrt", reason="TensorRT is not installed")
        path = kept(folder, "heads-device")
        build(path, "--form", "device", "--max-frames", "33", "--max-tokens", "2048", "--context", "4096")
    elif "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime is the one without CUDA")
    gpu, cpu = VideoLLM(path, request.param), VideoLLM(path, "ort-cpu")
    assert gpu._backend._graphs.in_place
    return gpu, cpu


def opened_again(gpu):
    """The same bundle on the same backend, once more."""
    return select(gpu.bundle, "tensorrt" if gpu.backend.startswith("TensorRT") else "ort-cuda")


def pieces(stages, width, ids, count):
    """A prompt around embeddings of no word."""
    tokens = np.random.default_rng(count).standard_normal((count, width)).astype(np.float16)
    return [stages.embed(ids), tokens, stages.embed(ids[:2])]


@pytest.mark.parametrize("count", [1, 9, 32, 33])
def test_vision_is_the_plain_graphs(chains, count):
    gpu, cpu = chains
    size = gpu.bundle.manifest.video.size[0]
    frames = np.random.default_rng(count).integers(0, 255, (count, size, size, 3), dtype=np.uint8)
    found, wanted = (llm._backend.vision(frames, lambda done: None) for llm in (gpu, cpu))
    for a, b in zip(found, wanted, strict=True):
        close(gpu._backend.to_host(a), b, "fp16")


def test_the_librarys_operators_are_what_runs(chains, tmp_path, monkeypatch):
    """And not what the graphs say of them for engines that lack the library, which TensorRT is not given."""
    if not chains[0].backend.startswith("ONNX Runtime"):
        pytest.skip("only ONNX Runtime has functions to fall back on")
    made = sessions._options

    def profiling(*arguments):
        options = made(*arguments)
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        return options

    monkeypatch.setattr(sessions, "_options", profiling)
    bundle = chains[0].bundle
    stages, size = OneSequence(select(bundle, "ort-cuda")), bundle.manifest.video.size[0]
    stages.vision(np.zeros((1, size, size, 3), np.uint8), lambda done: None)
    np.array(stages.prefill([stages.embed(np.arange(20, 40))], 64))
    for graph, ours in (
        ("vision", {"Linear", "LinearGelu", "LayerNorm", "AddLayerNorm", "VisionAttention", "BiasGelu"}),
        ("decoder", {"Linear", "RMSNorm", "AddRMSNorm", "CachedAttention", "SwiGLU"}),
    ):
        events = json.loads(Path(stages._graphs._sessions[graph].end_profiling()).read_text())
        ran = {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}
        assert ours <= ran
        assert not ran & {"LayerNormalization", "Erf", "Tanh", "Sigmoid"}  # what their functions are made of


@pytest.mark.parametrize("count", [1, 60, 671])
def test_logits_are_the_plain_graphs(chains, count):
    """Prefill, decoding, text behind it, and what follows after going back: one token, several, and one again."""
    ids, rows = np.arange(20, 40), []
    for llm in chains:
        stages, width, heard = OneSequence(llm._backend), llm.bundle.manifest.decoder.hidden_size, []
        heard.append(np.array(stages.prefill(pieces(stages, width, ids, count), 1024)))
        heard += [np.array(stages.decode(int(token))) for token in ids]
        length = len(ids) + count + 2
        for question in (ids[:9], ids[3:4], ids[:9]):
            stages.rewind(length)
            heard.append(np.array(stages.extend(stages.embed(question))))
            heard += [np.array(stages.decode(token)) for token in (5, 9)]
        rows.append(np.stack(heard))
    assert np.isfinite(rows[0]).all()
    for found, wanted in zip(*rows, strict=True):
        close(found, wanted, "fp16")
    np.testing.assert_allclose(rows[0][-9:-6], rows[0][-3:], rtol=1e-3, atol=1e-3)


def test_a_step_is_a_pass_of_one_token(chains):
    """Whatever ran in between; the lengths are from the first position to the last of the context."""
    gpu, _ = chains
    stages, width, ids = OneSequence(gpu._backend), gpu.bundle.manifest.decoder.hidden_size, np.arange(20, 60)
    for count in (30, 700, 1, 981, 2005, 2500, 982, 300, 4052):
        stages.prefill(pieces(stages, width, ids, count), 4096)
        length = len(ids) + count + 2
        for token in (7, 8):
            stepped = np.array(stages.decode(token))
            stages.rewind(length)
            close(stepped, np.array(stages.extend(stages.embed(np.array([token])))), "fp16")
            length += 1


def test_memory_does_not_grow(chains):
    gpu, _ = chains
    stages, width, ids, free = OneSequence(gpu._backend), gpu.bundle.manifest.decoder.hidden_size, np.arange(20, 60), []
    for turn in range(60):
        stages.prefill(pieces(stages, width, ids, (900, 1, 333)[turn % 3]), 1024)
        for token in range(3):
            stages.decode(token)
        stages._stream.synchronize()
        free.append(cudart().cudaMemGetInfo()[1])
    assert free[-1] >= free[9]


def test_two_loaded_side_by_side(chains):
    """Each has its own stream, weights and workspace."""
    gpu, _ = chains
    both, ids = [OneSequence(gpu._backend), OneSequence(opened_again(gpu))], np.arange(20, 40)
    rows = []
    for stages in both:
        stages.prefill([stages.embed(ids)], 1024)
    for token in (3, 4, 5):
        rows.append([np.array(stages.decode(token)) for stages in both])
    for first, second in rows:
        np.testing.assert_array_equal(first, second)
