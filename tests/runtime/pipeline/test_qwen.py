"""Qwen2.5-VL: what the decoder gets of a video and where, and its answers, against a model in NumPy."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from tango_plugins import TangoError, reference
from tango_runtime import VideoLLM
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.backends.cuda.device import Stream
from tango_runtime.backends.cuda.ort_runner import OrtRunner
from tango_runtime.bundle import Bundle
from tango_runtime.sizing import memory
from tests.fakes.cuda import install
from tests.fakes.qwen25vl import Qwen25VL, frame_budget, grid_times, positions, sample_indices, smart_resize
from tests.fakes.tensorrt_engines import build, open_backend

LENGTH, QUESTION = 16, "What happens in the video?"
QUESTIONS = [f"{start} happens {end}?" for start in ("What", "Who", "Where") for end in ("here", "first", "at the end")]
QUESTIONS += ["What happens here?"]

BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module", params=[("hub", True), ("module", False)], ids=str)
def model(request, responsive_qwen):
    """The pipeline of a checkpoint in one of both layouts, tied or not, and the model in NumPy."""
    layout, tied = request.param
    folder, bundle = responsive_qwen(layout, tied)
    unit = responsive_qwen(layout, tied, time_step="unit")[1]
    return SimpleNamespace(llm=VideoLLM(bundle, "ort-cpu"), numpy=Qwen25VL(folder), unit=unit)


def video(n=12, height=60, width=90, seed=0):
    """uint8 [n, height, width, 3]: scenes of noise, a block that moves."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 255, (3, height, width, 3), dtype=np.uint8)[np.arange(n) * 3 // n]
    for i, frame in enumerate(frames):
        frame[i : i + 20, 3 * i : 3 * i + 25] = (230, 60, 40)
    return frames


def expected(model, frames, count, size, *, fps=1.0, ratio=0.1, prune=True, unit=False):
    """What the model in NumPy makes of a video: kept indices, and the embeddings of a prompt with their positions."""
    chosen = sample_indices(len(frames), count)
    resized = [Image.fromarray(frames[i]).resize(size[::-1], Image.Resampling.BICUBIC) for i in chosen]
    features, salience = model.numpy.vision(np.stack([np.array(image) for image in resized]))
    grid = len(features), size[0] // 28, size[1] // 28
    tokens, indices = features.reshape(grid[0] * grid[1] * grid[2], -1), np.arange(np.prod(grid))
    if prune:
        params = replace(model.llm.bundle.manifest.params.at(ratio), grid=grid[1:])
        pruned = reference.prune(features, salience, grid_times(chosen / fps), params)
        tokens, indices = pruned.tokens, pruned.indices
    step = 2.0 if unit else 2 * 2 * (len(frames) / fps) / count
    return SimpleNamespace(grid=grid, tokens=tokens, indices=indices, step=step)


def prompt_of(model, question, seen):
    """Embeddings and positions of a prompt, its text written out."""
    before, after = (model.llm._prompt._ids(text) for text in (BEFORE, AFTER.format(question)))
    table, total = model.numpy.table, int(np.prod(seen.grid))
    keep = [np.arange(len(before)), len(before) + seen.indices, len(before) + total + np.arange(len(after))]
    places = positions(len(before), seen.grid, len(after), seen.step)[:, np.concatenate(keep)]
    return np.concatenate((table[before], seen.tokens, table[after])), places


def check(model, answer, seen):
    x, places = prompt_of(model, answer.question, seen)
    vocabulary = model.llm.bundle.manifest.prompt.vocabulary
    np.testing.assert_array_equal(answer.indices, seen.indices)
    assert (answer.prompt_tokens, answer.kept, answer.total) == (len(x), len(seen.indices), int(np.prod(seen.grid)))
    assert answer.ids == model.numpy.greedy(x, places, len(answer.ids), vocabulary)
    assert len(answer.ids) == LENGTH
    assert len(set(answer.ids)) >= 6


#: Frames, and their size: one token, a row, a column, windows cut on either side; odd and even numbers.
CASES = [
    (4, (28, 28)),
    (1, (84, 112)),
    (3, (28, 280)),
    (2, (308, 28)),
    (7, (140, 196)),
    (8, (112, 224)),
    (12, (84, 84)),
]


@pytest.mark.parametrize(("count", "size"), CASES, ids=str)
@pytest.mark.parametrize("prune", [True, False])
def test_an_answer_is_numpys(model, count, size, prune):
    frames = video()
    options = {"frames": count, "frame_size": size, "prune": prune, "max_new_tokens": LENGTH}
    check(model, model.llm.generate(frames, QUESTION, **options), expected(model, frames, count, size, prune=prune))


@pytest.mark.parametrize("model", [("hub", True)], indirect=True, ids=str)
def test_a_grid_of_720_tokens(model):
    """What 720p becomes by Qwen's recipe: 20×36 tokens for two frames."""
    frames, size = video(2, 720, 1280), (560, 1008)
    assert smart_resize(720, 1280, most=frame_budget(2)) == size
    options = {"frames": 2, "frame_size": size, "retention_ratio": 0.05, "max_new_tokens": LENGTH}
    check(model, model.llm.generate(frames, QUESTION, **options), expected(model, frames, 2, size, ratio=0.05))


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("fps", [0.3, 1.0, 4.0])
def test_other_ratios_and_clocks(model, ratio, fps):
    frames, size = video(), (84, 140)
    options = {"frames": 8, "frame_size": size, "retention_ratio": ratio, "fps": fps, "max_new_tokens": LENGTH}
    seen = expected(model, frames, 8, size, ratio=ratio, fps=fps)
    check(model, model.llm.generate(frames, QUESTION, **options), seen)


def test_time_in_units_is_the_authors(model):
    frames, size = video(), (84, 140)
    options = {"frames": 8, "frame_size": size, "fps": 0.2, "max_new_tokens": LENGTH}
    unit = SimpleNamespace(llm=VideoLLM(model.unit, "ort-cpu"), numpy=model.numpy)
    found = unit.llm.generate(frames, QUESTION, **options)
    check(unit, found, expected(unit, frames, 8, size, fps=0.2, unit=True))
    assert found.ids != model.llm.generate(frames, QUESTION, **options).ids


# The size of frames


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (480, 480), (36, 200)])
def test_frames_keep_their_aspect_within_the_budget(model, height, width):
    answer = model.llm.generate(video(4, height, width), QUESTION, max_new_tokens=1)
    size = smart_resize(height, width, least=1, most=9 * 784)
    assert answer.frames.shape == (4, *size, 3)
    assert answer.shape.grid == (size[0] // 28, size[1] // 28)
    assert answer.salience.shape == (2, answer.shape.step_tokens)
    assert answer.aspect == width / height


def test_the_caller_may_allow_fewer_pixels(model):
    answer = model.llm.generate(video(4), QUESTION, max_new_tokens=1, max_pixels=4 * 784)
    assert answer.frames.shape[1] * answer.frames.shape[2] <= 4 * 784


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame_size": (84, 100)}, "not made of multiples of 28"),
        ({"frame_size": (84, 84), "max_pixels": 5000}, "a frame size and most pixels"),
    ],
)
def test_sizes_are_refused_before_anything_is_decoded(model, options, message):
    with pytest.raises(TangoError, match=message):
        model.llm.stream(video(4), QUESTION, **options)


def test_a_prompt_without_room_is_refused_by_its_own_size(model):
    with pytest.raises(TangoError, match=r"the prompt takes \d+ tokens, 2100 of them video"):
        model.llm.stream(video(12), QUESTION, frames=6, frame_size=(700, 784), prune=False)


def test_a_video_whose_positions_the_decoder_does_not_know(model):
    with pytest.raises(TangoError, match="positions reach"):
        model.llm.generate(video(4), QUESTION, fps=1e-5)


def test_progress_counts_frames(model):
    done = []
    model.llm.generate(video(7), QUESTION, frames=7, frame_size=(28, 28), max_new_tokens=1, on_progress=done.append)
    assert done == [2, 2, 2, 1]


# Sessions


def test_ten_questions_are_answered_as_if_each_were_asked_anew(model):
    options = {"frames": 7, "frame_size": (84, 140)}
    with model.llm.session(video(), **options) as session:
        for question in QUESTIONS:
            answer = session.ask(question, max_new_tokens=8)
            alone = model.llm.generate(video(), question, **options, max_new_tokens=8)
            assert (answer.ids, answer.text, answer.finish) == (alone.ids, alone.text, alone.finish)
            for name in ("frames", "seconds", "salience", "indices", "merged", "segments", "shape"):
                np.testing.assert_array_equal(getattr(answer, name), getattr(alone, name))


def test_a_chat_goes_on_at_the_right_positions(model):
    frames, size = video(), (84, 140)
    with model.llm.session(frames, frames=8, frame_size=size) as session:
        first = session.chat(QUESTION, max_new_tokens=6)
        second = session.chat("And then?", max_new_tokens=LENGTH)
    x, places = prompt_of(model, QUESTION, expected(model, frames, 8, size))
    more = model.llm._prompt.follow_up("And then?")
    ids = [*first.ids, *more.tolist()]
    places = np.concatenate((places, np.tile(places.max() + 1 + np.arange(len(ids)), (3, 1))), 1)
    x = np.concatenate((x, model.numpy.table[ids]))
    assert second.ids == model.numpy.greedy(x, places, LENGTH, model.llm.bundle.manifest.prompt.vocabulary)


def test_the_same_video_gives_the_same_answer(model):
    options = {"frames": 8, "frame_size": (112, 140), "max_new_tokens": 8}
    first, second = (model.llm.generate(video(), QUESTION, **options) for _ in range(2))
    assert first.ids == second.ids
    for name in ("salience", "indices", "merged", "frames"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


# On a GPU, which is emulated


@pytest.fixture
def make(responsive_qwen, tmp_path, monkeypatch):
    """``make("onnxruntime")`` or ``make("tensorrt")``: a pipeline whose stages are the GPU's."""

    def made(engine, dtype="fp32", frame=(84, 140)):
        host, folder = install(monkeypatch), responsive_qwen(dtype=dtype)[1]
        if engine == "tensorrt":
            folder = shutil.copytree(folder, tmp_path / "built")
            build(folder, max_frames=8, max_tokens=100, context=600, frame=frame)
        llm = VideoLLM(folder, "ort-cpu")
        if engine == "tensorrt":
            llm._backend = open_backend(llm.bundle, host, monkeypatch)
            return llm
        stream = Stream()
        graphs = OrtRunner(onnxruntime, llm.bundle, stream, ("CPUExecutionProvider", "cpu"))
        llm._backend = CudaBackend(llm.bundle, graphs, stream)
        return llm

    return made


def same(found, wanted):
    assert found.ids == wanted.ids
    for name in ("indices", "merged", "segments", "kept", "prompt_tokens", "finish", "shape"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    np.testing.assert_allclose(found.salience, wanted.salience, atol=1e-6)


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_the_answer_of_a_gpu_is_the_cpus(make, responsive_qwen, engine, prune):
    options = {"frames": 7, "frame_size": (84, 140), "prune": prune, "max_new_tokens": 12}
    wanted = VideoLLM(responsive_qwen()[1], "ort-cpu").generate(video(), QUESTION, **options)
    same(make(engine).generate(video(), QUESTION, **options), wanted)


@pytest.mark.parametrize("most", [1, 3 * 15 * 4 * (2 * 4 * 4 * 60 + 8 * 4 * 64), 1 << 40])
def test_steps_go_through_the_tower_as_memory_allows(make, responsive_qwen, monkeypatch, most):
    """A step of 60 patches takes their scores twice and eight tensors of the decoder's width."""
    monkeypatch.setattr(memory, "VISION_BYTES", most)
    llm, options = make("onnxruntime"), {"frames": 8, "frame_size": (84, 140), "max_new_tokens": 4}
    bound, bind = [], llm._backend._graphs.bind
    monkeypatch.setattr(
        llm._backend._graphs,
        "bind",
        lambda graph, tensors, **o: (bound.append((graph, tensors)), bind(graph, tensors, **o))[1],
    )
    same(
        llm.generate(video(), QUESTION, **options),
        VideoLLM(responsive_qwen()[1], "ort-cpu").generate(video(), QUESTION, **options),
    )
    taken = [tensors["frames"].shape for graph, tensors in bound if graph == "vision"]
    at_once = {1: [1, 1, 1, 1], 1 << 40: [4]}.get(most, [3, 1])
    assert taken == [(n, 2, 84, 140, 3) for n in at_once]


@pytest.mark.parametrize("count", [8, 7])
def test_large_frames_are_resized_on_the_gpu(make, responsive_qwen, count):
    """Where steps are whole they stay there: only what the answer shows comes back."""
    options, large = {"frames": count, "frame_size": (84, 140)}, video(9, 200, 320)
    llm, plain = make("onnxruntime"), VideoLLM(responsive_qwen()[1], "ort-cpu")
    traffic, nbytes = llm._backend.traffic, count * 84 * 140 * 3
    before = replace(traffic)
    with llm.session(large, **options) as session, plain.session(large, **options) as wanted:
        assert (traffic.downloaded - before.downloaded < nbytes) == (count % 2 == 0)
        same(session.ask(QUESTION, max_new_tokens=8), wanted.ask(QUESTION, max_new_tokens=8))
        np.testing.assert_array_equal(session.frames, wanted.frames)


def test_half_precision_too(make, responsive_qwen):
    options = {"frames": 5, "frame_size": (84, 140), "max_new_tokens": 8}
    wanted = VideoLLM(responsive_qwen(dtype="fp16")[1], "ort-cpu").generate(video(), QUESTION, **options)
    same(make("onnxruntime", "fp16").generate(video(), QUESTION, **options), wanted)


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_sessions_take_turns(make, engine):
    """Sequences with positions of their own, one after the other in one memory."""
    llm, sizes = (
        make(engine),
        [{"frames": 7, "frame_size": (84, 140)}, {"frames": 4, "frame_size": (84, 140), "fps": 0.1}],
    )
    alone = [[llm.generate(video(), q, **size, max_new_tokens=6).ids for size in sizes] for q in QUESTIONS[:3]]
    sessions = [llm.session(video(), **size) for size in sizes]
    for question, wanted in zip(QUESTIONS[:3], alone, strict=True):
        assert [session.ask(question, max_new_tokens=6).ids for session in sessions] == wanted


def test_engines_take_the_frames_that_they_were_built_for(make):
    llm = make("tensorrt")
    assert llm._backend.frame_size == (84, 140)
    answer = llm.generate(video(4, 200, 100), QUESTION, max_new_tokens=2)  # whatever the video's own aspect
    assert answer.frames.shape == (4, 84, 140, 3)
    with pytest.raises(TangoError, match="frames must be 84x140, as the engines were built") as caught:
        llm.stream(video(4), QUESTION, frame_size=(112, 112))
    assert "tango build --frame" in caught.value.hint


def test_the_bundle_has_what_the_tests_take_for_granted(responsive_qwen):
    manifest = Bundle.load(responsive_qwen()[1]).manifest
    assert (manifest.video.frames, manifest.video.budget.max_pixels, manifest.decoder.context) == (4, 9 * 784, 2048)
    assert manifest.decoder.rotary.time_step == "seconds"
