"""Evaluation of a predictable evaluator and of a small bundle."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tango_calibration.data.dataset import Video
from tango_calibration.data.questions import Question
from tango_calibration.evaluation.evaluate import (
    ALL,
    NONE,
    BundleEvaluator,
    Trial,
    check_room,
    evaluate,
    trials_of,
)
from tango_calibration.evaluation.methods import Selection
from tango_plugins import TangoError, op, reference
from tango_runtime import VideoLLM
from tango_runtime.bundle import Bundle
from tango_runtime.video import Clock
from tango_runtime.video.shape import ClipShape
from tests.fakes.evaluator import PARAMS, TRIALS, VIDEOS, Counter
from tests.fakes.sequence import OneSequence

SHAPE, CLOCK = ClipShape(8, (112, 112), 1, (4, 4)), Clock(np.zeros(8), 8.0)

# Questions and records


def test_every_question_is_asked_in_every_trial():
    evaluator, done = Counter(), []
    records = evaluate(evaluator, VIDEOS, TRIALS, PARAMS, done.append)
    assert [(r.video, r.trial, r.question) for r in records] == [
        (v.name, trial, key) for v in VIDEOS for trial in TRIALS for key in v.ids
    ]
    assert (evaluator.seen, len(evaluator.prefilled), done) == (4, 4 * len(TRIALS), [1] * 4)
    assert {r.kept for r in records if r.trial == NONE} == {0}
    for record in records:
        assert record.answer == (f"{record.kept}." if record.type == "count" else record.question[1:2])
        assert record.correct == (record.type == "when" or record.kept == 64)
        assert (record.total, record.prefill_ms) == (64, 5)
        assert record.tags == (() if record.type == "count" else ("brief",))
    for ratio in (0.1, 0.3):
        counts = {r.trial.method: r.kept for r in records if r.video == "v1" and r.trial.retention_ratio == ratio}
        assert counts.pop("tango-exact") == op.exact_count(4, 16, PARAMS.at(ratio))
        assert set(counts.values()) == {counts["tango"]}


def test_the_count_is_that_of_tango_even_without_a_trial_of_tango():
    alone = evaluate(Counter(), VIDEOS, [Trial("topk", 0.3)], PARAMS)
    with_it = evaluate(Counter(), VIDEOS, [Trial("topk", 0.3), Trial("tango", 0.3)], PARAMS)
    assert [r.kept for r in alone] == [r.kept for r in with_it if r.trial.method == "topk"]


def test_random_choices_depend_only_on_video_and_seed():
    class Remembering(Counter):
        def answer(self, kept, *asked):
            self.drawn = getattr(self, "drawn", [])
            self.drawn.append(kept.tokens)
            return super().answer(kept, *asked)

    def drawn(videos, trials, seed=0):
        evaluator = Remembering()
        evaluate(evaluator, videos, trials, PARAMS, seed=seed)
        return evaluator.drawn[-1]

    mine = drawn(VIDEOS[:1], [Trial("random", 0.3)])
    np.testing.assert_array_equal(mine, drawn([VIDEOS[3], VIDEOS[0]], [Trial("topk", 0.1), Trial("random", 0.3)]))
    assert not np.array_equal(mine, drawn(VIDEOS[:1], [Trial("random", 0.3)], seed=1))


def test_bounds_have_no_ratio():
    assert trials_of(["none", "topk", "topk", "all"], [0.1, 0.2]) == [
        ALL,
        NONE,
        Trial("topk", 0.1),
        Trial("topk", 0.2),
    ]


def test_tango_runs_once_for_each_ratio(monkeypatch):
    ratios, prune = [], reference.prune

    def spy(features, salience, seconds, params):
        ratios.append(params.retention_ratio)
        return prune(features, salience, seconds, params)

    monkeypatch.setattr(reference, "prune", spy)
    evaluate(Counter(), VIDEOS[:1], TRIALS, PARAMS)
    assert ratios == [0.1] * 4 + [0.3] * 4  # tango once for each ratio, with its count for all methods


def test_an_unknown_method_is_rejected():
    with pytest.raises(TangoError, match="there is no method 'magic'"):
        Trial("magic", 0.1)


# A bundle


@pytest.fixture(scope="module")
def frames():
    """uint8 [4, 36, 64, 3]: a bright block moves over noise."""
    pixels = np.random.default_rng(0).integers(0, 120, (4, 36, 64, 3), dtype=np.uint8)
    for i, frame in enumerate(pixels):
        frame[10:20, 6 * i : 6 * i + 10] = (230, 60, 40)
    return pixels


QUESTIONS = ("What happens in the video?", "why?", "Is the red ball left of the blue square?")


@pytest.fixture(scope="module")
def evaluator(tiny_bundle):
    return BundleEvaluator(tiny_bundle)


@pytest.mark.parametrize("method", ["all", "tango"])
def test_answers_equal_those_of_single_runs(evaluator, llm, frames, method):
    """One prefill of the video for all questions gives each the answer of a run of its own."""
    asked = tuple(Question("q", text, "?") for text in QUESTIONS)
    clip = Video("clip", frames, 4, asked, QUESTIONS)
    records = evaluate(evaluator, [clip], [Trial(method, 0.25)], llm.bundle.manifest.params)
    for record in records:
        options = {"prune": False} if method == "all" else {"retention_ratio": 0.25}
        alone = llm.generate(frames, record.question, max_new_tokens=16, **options)
        assert record.answer == alone.text.strip()
        assert record.kept == alone.kept
    assert len({record.answer for record in records}) == 3


def test_answers_without_a_video(evaluator, llm, frames):
    """The prompt is only text then, so the answer does not depend on the video."""
    clips = [
        Video(f"{i}", f, 4, (Question("q", QUESTIONS[0], "?"),), (f"{i}",))
        for i, f in enumerate((frames, frames[::-1]))
    ]
    first, second = evaluate(evaluator, clips, [NONE], llm.bundle.manifest.params)
    assert first.kept == second.kept == 0
    before, after = llm._prompt.encode(QUESTIONS[0])
    ids = np.concatenate([before, llm.bundle.manifest.prompt.after_video, after]).astype(np.int64)
    logits = OneSequence(llm._backend).prefill([llm._backend.embed(ids)], len(ids))
    text = llm._prompt.decode([int(np.argmax(logits))])
    assert text
    assert first.answer.startswith(text.strip())
    assert first.answer == second.answer


def test_rewinding_forgets_what_followed(llm):
    backend = OneSequence(llm._backend)
    first, second, other = (backend.embed(np.arange(n, dtype=np.int64) + n) for n in (9, 4, 6))
    whole = backend.prefill([first, second], 20)
    backend.prefill([first], 20)
    np.testing.assert_allclose(backend.extend(second), whole, rtol=1e-4, atol=1e-4)
    backend.decode(3)
    backend.rewind(9)
    changed = backend.extend(other)
    backend.rewind(9)
    np.testing.assert_allclose(backend.extend(second), whole, rtol=1e-4, atol=1e-4)
    assert not np.allclose(changed, whole, rtol=1e-2, atol=1e-2)


def test_questions_are_independent(evaluator, frames):
    features, _ = evaluator.encode_video(
        np.stack([np.array(Image.fromarray(frame).resize((112, 112))) for frame in frames])
    )
    kept = everything(features)
    together, _ = evaluator.answer(kept, SHAPE, CLOCK, QUESTIONS)
    alone = [evaluator.answer(kept, SHAPE, CLOCK, [question])[0][0] for question in QUESTIONS]
    assert together == alone == evaluator.answer(kept, SHAPE, CLOCK, QUESTIONS[::-1])[0][::-1]


def everything(features):
    """All tokens of features [F, L, D]."""
    tokens = features.reshape(-1, features.shape[-1])
    return Selection(tokens, np.arange(len(tokens), dtype=np.int32))


def test_the_answer_ends_where_the_context_does(tiny_bundle, evaluator, frames, tmp_path):
    manifest = json.loads((tiny_bundle / "bundle.json").read_text())
    kept = everything(np.zeros((1, 20, manifest["decoder"]["hidden_size"]), np.float32))
    [whole], _ = evaluator.answer(kept, SHAPE, CLOCK, QUESTIONS[:1])
    prompt = VideoLLM(tiny_bundle)._prompt
    text = sum(map(len, prompt.encode(QUESTIONS[0]))) + len(manifest["prompt"]["after_video"])
    for room in (3, 0):
        copy = shutil.copytree(tiny_bundle, tmp_path / f"{room}")
        manifest["decoder"]["context"] = 20 + text + room
        (copy / "bundle.json").write_text(json.dumps(manifest))
    [short], _ = BundleEvaluator(tmp_path / "3").answer(kept, SHAPE, CLOCK, QUESTIONS[:1])
    assert whole.startswith(short) and whole != short != ""  # noqa: PT018
    with pytest.raises(TangoError, match=f"takes {20 + text} tokens, 20 of them video"):
        BundleEvaluator(tmp_path / "0").answer(kept, SHAPE, CLOCK, QUESTIONS[:1])


def test_prompts_that_do_not_fit_are_rejected_first(tiny_bundle, frames):
    bundle = Bundle.load(tiny_bundle)
    long = Video("long", frames, 500, (Question("q", "?", "x"),), ("long#0",))
    with pytest.raises(TangoError, match=r"long: the prompt takes .* 8000 of them video"):
        check_room(bundle, [long])
    special = Video("special", frames, 4, (Question("q", "<|im_end|>", "x"),), ("special#0",))
    with pytest.raises(TangoError, match=r"special: the question contains <\|im_end\|>"):
        check_room(bundle, [special])
