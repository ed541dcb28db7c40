"""Device graphs of Qwen2.5-VL, and of LLaVA-Video with and without inner pruning, against the plain ones on the CPU."""

from __future__ import annotations

import json
from functools import cache
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

from tango_runtime import VideoLLM
from tango_runtime.backends.cuda import ort_runner as sessions
from tango_runtime.backends.cuda.device import cudart
from tango_runtime.backends.registry import select
from tango_runtime.backends.rotary import RotaryIds
from tests.gpu.runtime import families
from tests.gpu.runtime.test_backends import close
from tests.gpu.runtime.test_device_graphs_on_gpu import pieces
from tests.gpu.runtime.thinned import assert_rounded_only, logits

QUESTION = "What happens in the video?"

#: Steps, height and width: windows that are whole, cut on either side, and one token.
FRAMES = [(1, 28, 28), (3, 112, 112), (2, 140, 196), (1, 308, 28), (4, 224, 336), (2, 560, 1008)]


@pytest.fixture(scope="module")
def bundle(request, tmp_path_factory):
    """``bundle("qwen")``: the folder of a bundle."""
    folder = request.config.getoption("--bundles")
    if folder is None:
        folder = tmp_path_factory.mktemp("families")
        families.write(folder)

    def found(name):
        if not (folder / name).exists():
            pytest.skip(f"there is no {folder / name}: python -m tests.gpu.runtime.families {folder}")
        return folder / name

    return found


@pytest.fixture(scope="module")
def chains(bundle):
    """``chains("qwen")``: a bundle on the GPU, fused, and on the CPU."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime is the one without CUDA")

    @cache
    def made(name):
        gpu, cpu = VideoLLM(bundle(name), "ort-cuda"), VideoLLM(bundle(name), "ort-cpu")
        assert gpu._backend._graphs.in_place
        assert gpu._backend._graphs.fuses_vision
        return gpu, cpu

    return made


@pytest.fixture(scope="module")
def exact(bundle):
    """The decoder with inner pruning on the CPU, in fp32."""
    return VideoLLM(bundle(families.EXACT), "ort-cpu")


def checkerboard(height, width, edge=56):
    """Squares of black and white, which are said to break the tower in fp16 (ollama/ollama#18070)."""
    row, column = np.indices((height, width)) // edge
    frame = np.repeat((255 * ((row + column) % 2)).astype(np.uint8)[..., None], 3, -1)
    return np.stack((frame, frame))[None]


def noise(count, height, width):
    return np.random.default_rng(height).integers(0, 256, (count, 2, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "frames", [*(noise(*shape) for shape in FRAMES), checkerboard(392, 504)], ids=lambda frames: str(frames.shape[:4])
)
def test_the_tower_is_the_plain_one(chains, frames):
    gpu, cpu = chains("qwen")
    found, wanted = (llm._backend.vision(frames, lambda done: None) for llm in (gpu, cpu))
    for a, b in zip(found, wanted, strict=True):
        close(gpu._backend.to_host(a), b, "fp16")


def test_steps_in_chunks_are_the_same_bits(chains, monkeypatch):
    gpu, _ = chains("qwen")
    frames, heard = noise(5, 84, 140), []
    for steps in (32, 2, 1):
        monkeypatch.setattr(gpu._backend._graphs, "steps_at_once", steps)
        heard.append([gpu._backend.to_host(tensor) for tensor in gpu._backend.vision(frames, lambda done: None)])
    for features, salience in heard[1:]:
        np.testing.assert_allclose(features, heard[0][0], rtol=0, atol=2e-2 * np.abs(heard[0][0]).max())
        np.testing.assert_allclose(salience, heard[0][1], rtol=2e-2)


@pytest.mark.parametrize(
    ("name", "graph", "ours"),
    [
        ("qwen", "vision", {"Patches", "AddWideRMSNorm", "WindowAttention", "FrameAttention", "BiasSwiGLU"}),
        ("qwen", "decoder", {"RMSNorm", "AddRMSNorm", "PositionedAttention", "SwiGLU"}),
        ("inner", "decoder_low", {"RMSNorm", "AddRMSNorm", "CachedAttention", "AttentionShares"}),
        ("inner", "decoder_high", {"RMSNorm", "AddRMSNorm", "PositionedAttention"}),
    ],
)
def test_the_librarys_operators_are_what_runs(chains, tmp_path, monkeypatch, name, graph, ours):
    """And not what the graphs say of them for engines that lack the library."""
    made = sessions._options

    def profiling(*arguments):
        options = made(*arguments)
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        return options

    monkeypatch.setattr(sessions, "_options", profiling)
    backend = select(chains(name)[0].bundle, "ort-cuda")
    if graph == "vision":
        backend.vision(noise(1, 84, 140), lambda done: None)
    else:
        np.array(backend.extend(backend.new_cache(64), [backend.embed(np.arange(20, 40))]))
    events = json.loads(Path(backend._graphs._sessions[graph].end_profiling()).read_text())
    ran = {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}
    assert ours <= ran
    assert not ran & {"Sigmoid", "Sqrt", "Where"}  # what their functions are made of


@pytest.mark.parametrize("kept", [1, 60, 671])
def test_logits_with_positions_of_their_own_are_the_plain_graphs(chains, kept):
    """Prefill with tokens of a video that stayed, decoding, text behind it, and what follows after going back."""
    grid, before, heard = (4, 20, 36), 20, []
    chosen = np.sort(np.random.default_rng(kept).choice(int(np.prod(grid)), kept, replace=False))
    for llm in chains("qwen"):
        backend, rows = llm._backend, []
        width, ids = llm.bundle.manifest.decoder.hidden_size, np.arange(20, 20 + before)
        rotary = RotaryIds.of(llm.bundle.manifest.decoder.rotary, before, grid, 7.0, chosen)
        cache = backend.new_cache(1024, rotary)
        rows.append(np.array(backend.extend(cache, pieces(backend, width, ids, kept))))
        rows += [np.array(backend.decode(cache, int(token))) for token in ids]
        for question in (ids[:9], ids[3:4], ids[:9]):
            backend.rewind(cache, before + kept + 2)
            rows.append(np.array(backend.extend(cache, [backend.embed(question)])))
            rows += [np.array(backend.decode(cache, token)) for token in (5, 9)]
        heard.append(np.stack(rows))
        cache.release()
    assert np.isfinite(heard[0]).all()
    for found, wanted in zip(*heard, strict=True):
        close(found, wanted, "fp16")


@pytest.mark.parametrize(("rows", "kept"), [(2, 1), (60, 30), (671, 670), (671, 671)])
def test_logits_of_a_thinned_prompt_are_as_close_to_fp32_as_the_plain_graphs(chains, exact, rows, kept):
    """Of many rows that drop, rounding would choose some."""
    assert_rounded_only(*(logits(llm, rows, kept) for llm in (*chains("inner"), exact)))


@pytest.mark.parametrize("name", families.NAMES)
def test_the_same_twice_and_in_turns(chains, video, name):
    gpu, _ = chains(name)
    clips, questions = (video(9, 12), video(10, 12)), [QUESTION, "Who?", "What happens here?"]
    options = {"frames": 8, "retention_ratio": 0.5}
    alone = [[gpu.generate(c, q, max_new_tokens=12, **options).ids for c in clips] for q in questions]
    held = [gpu.session(clip, **options) for clip in clips]
    assert [[session.ask(each, max_new_tokens=12).ids for session in held] for each in questions] == alone
    streams = [session.stream(questions[1], max_new_tokens=12) for session in held]
    for _ in zip_longest(*streams):
        pass
    assert [stream.answer.ids for stream in streams] == alone[1]


@pytest.mark.parametrize("name", ["qwen", "inner"])
def test_memory_does_not_grow(chains, video, name):
    gpu, free = chains(name)[0], []
    for turn in range(30):
        gpu.generate(video(turn % 3, 12), QUESTION, frames=(8, 4, 6)[turn % 3], max_new_tokens=3)
        free.append(cudart().cudaMemGetInfo()[1])
    assert free[-1] >= free[9]
