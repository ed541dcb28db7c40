"""TensorRT and ONNX Runtime on the GPU against the CPU: every stage, whole answers, host-device copies."""

from __future__ import annotations

import subprocess
import sys
from itertools import zip_longest

import numpy as np
import pytest

from tango_plugins import op
from tango_runtime.backends.cuda.device import cudart
from tests.fakes.sequence import OneSequence

QUESTION = "What happens in the video?"

#: Cosine at least, and norms' ratio within: TensorRT and cuBLAS round products of fp32 to TF32.
GATES = {"fp32": (0.9999, 0.01), "fp16": (0.999, 0.02)}
DTYPES = tuple(GATES)


def close(found, wanted, dtype):
    """Passes both gates: the cosine alone is blind to scale."""
    a, b = (np.asarray(array, np.float64).ravel() for array in (found, wanted))
    cosine, ratio = a @ b / np.linalg.norm(a) / np.linalg.norm(b), np.linalg.norm(a) / np.linalg.norm(b)
    print(f"{dtype}: cosine {cosine:.7f}, norm ratio {ratio:.5f}")
    assert cosine >= GATES[dtype][0]
    assert abs(ratio - 1) <= GATES[dtype][1]


def decode_logits(stages, video, prompt, words):
    """Logits [len(words) + 1, V] of the prompt, the video tokens and ``words``."""
    rows = [np.array(stages.prefill([stages.embed(prompt), video, stages.embed(prompt[:3])], 1024))]
    return np.stack(rows + [np.array(stages.decode(int(word))) for word in words])


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_stage_gives_what_the_cpus_gives(load, on_cpu, video, dtype):
    gpu, cpu = OneSequence(load(dtype)._backend), OneSequence(on_cpu(dtype)._backend)
    size = load(dtype).bundle.manifest.video.size[0]
    frames = np.random.default_rng(0).integers(0, 255, (12, size, size, 3), dtype=np.uint8)
    frames[3:9] = frames[3]
    advanced = []
    found, wanted = gpu.vision(frames, advanced.append), cpu.vision(frames, lambda done: None)
    assert sum(advanced) == 12
    for a, b in zip(found, wanted, strict=True):
        close(gpu.to_host(a), b, dtype)
    ids = np.arange(50, 90)
    close(gpu.to_host(gpu.embed(ids)), cpu.embed(ids), dtype)
    prompt, words = np.arange(100, 130), np.random.default_rng(1).integers(0, 200, 8)
    logits = decode_logits(gpu, wanted[0].reshape(-1, wanted[0].shape[-1]), prompt, words)
    close(logits, decode_logits(cpu, cpu.flatten(wanted[0]), prompt, words), dtype)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_pruning_keeps_what_the_reference_keeps(load, on_cpu, video, ratio):
    """On the GPU's own features: what it keeps and merges is the operator's doing, not the tower's rounding."""
    from tango_plugins import reference

    llm = load("fp32")
    gpu, params = llm._backend, llm.bundle.manifest.params.at(ratio)
    size, seconds = llm.bundle.manifest.video.size[0], np.arange(16, dtype=np.float32)
    frames = np.random.default_rng(2).integers(0, 255, (16, size, size, 3), dtype=np.uint8)
    features, salience = gpu.vision(frames, lambda done: None)
    found = gpu.prune(features, salience, seconds, params)
    wanted = reference.prune(gpu.to_host(features), gpu.to_host(salience), seconds, params)
    trace = found.trace()
    assert trace.segments.tolist() == wanted.segments.tolist()
    common = np.intersect1d(trace.indices, wanted.indices)
    assert found.count == len(trace.indices) == gpu.to_host(found.tokens).shape[0]
    assert len(common) >= 0.98 * wanted.count
    merged = dict(zip(wanted.indices.tolist(), wanted.merged.tolist(), strict=True))
    same = [merged.get(i) == m for i, m in zip(trace.indices.tolist(), trace.merged.tolist(), strict=True)]
    assert np.mean(same) >= 0.95


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixty_four_tokens_are_the_cpus(load, on_cpu, video, dtype):
    """Where the CPU's two best logits are close, either may win, and the answers part."""
    clip = video(3, 12)
    # Every token is kept: pruning may tip over for a rounding of the tower, and then the prompts differ.
    options = {"frames": 8, "prune": False, "max_new_tokens": 64}
    wanted, rows = heard(on_cpu(dtype), clip, options)
    found = load(dtype).generate(clip, QUESTION, **options)
    second, first = np.partition(rows, -2)[:, -2:].T
    clear = first - second > {"fp32": 2e-3, "fp16": 0.03}[dtype] * np.abs(rows).max()
    until = next((i for i, (a, b) in enumerate(zip(found.ids, wanted.ids, strict=False)) if a != b), len(wanted.ids))
    print(f"{dtype}: the same for {until} tokens of {len(wanted.ids)}, {clear.sum()} of them clear")
    assert until == len(wanted.ids) or not clear[until]
    assert clear.sum() >= 32


def heard(llm, clip, options):
    """An answer on the CPU, where a decode step is a pass of one token, and the logits [N, V] of its steps."""
    rows, extend = [], llm._backend.extend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm._backend, "extend", lambda *arguments: rows.append(extend(*arguments)) or rows[-1])
        return llm.generate(clip, QUESTION, **options), np.stack(rows)


def test_questions_follow_one_prefill(load, on_cpu):
    """As an evaluation asks: several questions behind the same tokens, from the host."""
    ids, heard = np.arange(20, 40), []
    for llm in (load("fp32"), on_cpu("fp32")):
        stages, width = OneSequence(llm._backend), llm.bundle.manifest.decoder.hidden_size
        tokens = np.random.default_rng(0).standard_normal((60, width)).astype(np.float32)
        stages.prefill([stages.embed(ids), tokens, stages.embed(ids[:1])], 128)
        rows = []
        for question in (ids[:9], ids[3:4], ids[:9]):
            stages.rewind(81)
            rows.append(np.array(stages.extend(stages.embed(question))))
            rows += [np.array(stages.decode(token)) for token in (5, 9)]
        heard.append(np.stack(rows))
    close(*heard, "fp32")
    np.testing.assert_allclose(heard[0][:3], heard[0][6:], rtol=1e-3, atol=1e-3)


def test_features_never_cross(load, video):
    """What goes up: frames, times, words. What comes down: one count (none if exact), 8 bytes a token, the report's."""
    llm, clip = load("fp16"), video(5, 12)
    traffic, params = llm._backend.traffic, llm.bundle.manifest.params
    word = llm.bundle.manifest.decoder.hidden_size * np.dtype(llm.bundle.manifest.dtype).itemsize
    for budget, counts in (("paper", 1), ("exact", 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(llm.bundle.manifest.prune, "budget", budget)
            before = list(vars(traffic).values())
            answer = llm.generate(clip, QUESTION, frames=8, max_new_tokens=20)
            uploads, up, downloads, down = np.subtract(list(vars(traffic).values()), before).tolist()
        K = op.capacity(8, llm.bundle.manifest.video.tokens_per_frame, params)
        steps = len(answer.ids) - (answer.finish != "stop")  # tokens that were decoded after
        text = answer.prompt_tokens - answer.kept
        assert up == answer.frames.nbytes + answer.seconds.nbytes + word * (text + steps)
        assert uploads == 2 + 2 + steps
        assert down == 4 * counts + 8 * (steps + 1) + K * (4 + 1) + 8 * 8 + answer.salience.nbytes
        assert downloads == counts + steps + 1 + 4


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_same_twice(load, video, temperature):
    options = {"frames": 8, "max_new_tokens": 32, "temperature": temperature, "seed": 1}
    first, second = (load("fp16").generate(video(7, 12), QUESTION, **options) for _ in range(2))
    assert first.ids == second.ids


@pytest.mark.slow
def test_a_thousand_clips_take_no_more_memory(load, video):
    llm, rng, free = load("fp16"), np.random.default_rng(0), []
    clips = [video(seed, 32) for seed in range(20)]
    for turn in range(1000):
        options = {"frames": int(rng.integers(2, 33)), "retention_ratio": float(rng.choice([0.05, 0.1, 0.25, 0.5]))}
        if turn % 100 == 0:  # the largest there is, so that the peak is known from the first
            options = {"frames": 32, "prune": False}
        llm.generate(clips[rng.integers(20)], QUESTION, max_new_tokens=int(rng.integers(1, 9)), **options)
        if turn % 100 == 99:
            free.append(cudart().cudaMemGetInfo()[1])
    print(f"free after each hundred clips: {free}")
    assert free[-1] >= free[0]


PROGRAM = """
import gc, sys
import numpy as np
from tango_runtime import VideoLLM
for at_exit in (False, True):
    held = [VideoLLM(*sys.argv[1:])]
    held[0].generate(np.zeros((4, 36, 64, 3), np.uint8), "What?", frames=4, max_new_tokens=2)
    held.append(held)  # for the garbage collector, which finalizes in any order
    if not at_exit:
        del held
        gc.collect()
"""


def test_a_process_ends_well_whoever_holds_the_chain(load):
    llm = load("fp16")
    engine = "tensorrt" if llm.backend.startswith("TensorRT") else "ort-cuda"
    done = subprocess.run([sys.executable, "-c", PROGRAM, llm.bundle.path, engine], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sessions_take_turns_as_if_each_question_were_asked_anew(load, video):
    """The small model's logits are far apart in fp32: rounding does not decide a token."""
    llm, clips = load("fp32"), (video(9, 12), video(10, 12))
    questions = [QUESTION, "Who?", "What happens in the first second?", QUESTION]
    options = {"frames": 8, "retention_ratio": 0.5}
    alone = [[llm.generate(clip, each, max_new_tokens=16, **options).ids for clip in clips] for each in questions]
    sessions = [llm.session(clip, **options) for clip in clips]
    found = [[session.ask(each, max_new_tokens=16).ids for session in sessions] for each in questions]
    assert found == alone
    streams = [session.stream(questions[1], max_new_tokens=16) for session in sessions]
    for _ in zip_longest(*streams):
        pass
    assert [stream.answer.ids for stream in streams] == alone[1]


def test_caches_are_given_back(load, video):
    llm = load("fp16")
    free = []
    for _ in range(12):
        first, second = (llm.session(video(9, 12), frames=4) for _ in range(2))
        for session in (first, second):
            session.ask(QUESTION, max_new_tokens=4)
        first.close()
        second.close()
        free.append(cudart().cudaMemGetInfo()[1])
    assert free[-1] >= free[3]
