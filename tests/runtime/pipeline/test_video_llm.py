"""The chain on small bundles: what it is given, what it keeps, when it ends, what it tells."""

from __future__ import annotations

import json
import shutil
from itertools import zip_longest

import numpy as np
import pytest
from PIL import Image

from tango_plugins import TangoError, op, reference
from tango_runtime import VideoLLM
from tango_runtime.video.preprocess import resize
from tests.fakes.sequence import OneSequence

QUESTION = "What happens in the video?"


@pytest.fixture
def edited(tiny_bundle, tmp_path):
    """``edited("decoder", context=…)``: the pipeline of the bundle with some values of bundle.json replaced."""

    def load(section, **values):
        folder = shutil.copytree(tiny_bundle, tmp_path / "edited", dirs_exist_ok=True)
        manifest = json.loads((tiny_bundle / "bundle.json").read_text())
        manifest[section] |= values
        (folder / "bundle.json").write_text(json.dumps(manifest))
        return VideoLLM(folder)

    return load


@pytest.fixture
def given(llm, monkeypatch):
    """``given("prefill")``: a list that fills with the arguments of each call of that stage."""

    def record(name):
        calls, stage = [], getattr(llm._backend, name)
        monkeypatch.setattr(llm._backend, name, lambda *arguments: (calls.append(arguments), stage(*arguments))[1])
        return calls

    return record


def greedy(llm, source, length=12, **options):
    return llm.generate(source, QUESTION, max_new_tokens=length, **options)


# What the decoder is given


def test_the_video_stands_in_its_place_with_the_newline_behind_it(llm, frames, given):
    opened, extended = given("new_cache"), given("extend")
    answer = greedy(llm, frames, prune=False)
    [(capacity, _)], (_, pieces, _) = opened, extended[0]
    prompt = llm.bundle.manifest.prompt
    tokenizer = llm._prompt._tokenizer
    before, after = (
        tokenizer.encode(text, add_special_tokens=False).ids
        for text in ("<|im_start|>user ", f"\n{QUESTION}<|im_end|><|im_start|>assistant\n")
    )
    embed = llm._backend.embed
    np.testing.assert_array_equal(pieces[0], embed(np.array(before)))
    features, _ = llm._backend.vision(answer.frames, lambda done: None)
    np.testing.assert_array_equal(pieces[1], features.reshape(-1, features.shape[-1]))
    np.testing.assert_array_equal(pieces[2], embed(np.array([*prompt.after_video, *after])))
    assert answer.prompt_tokens == sum(map(len, pieces)) == len(before) + answer.total + 1 + len(after)
    assert capacity == answer.prompt_tokens + 12


def test_what_the_operator_keeps_is_given(llm, colors, given):
    extended, pruned_at = given("extend"), given("prune")
    answer = greedy(llm, colors, retention_ratio=0.25, fps=2)
    _, pieces, _ = extended[0]
    features, salience = llm._backend.vision(answer.frames, lambda done: None)
    pruned = reference.prune(features, salience, answer.seconds, llm.bundle.manifest.params.at(0.25))
    np.testing.assert_array_equal(pieces[1], pruned.tokens)
    for name in ("indices", "merged", "segments"):
        np.testing.assert_array_equal(getattr(answer, name), getattr(pruned, name))
    np.testing.assert_array_equal(answer.salience, salience)
    for seconds in (answer.seconds, pruned_at[0][2]):
        np.testing.assert_array_equal(seconds, [0, 1, 2, 3.5])
    assert answer.kept == len(pieces[1]) < answer.total


def test_each_step_sees_all_that_was_said_before(llm, frames, given):
    """Prompt and answer at once give the logits that come step by step: no position and no cached row is off."""
    extended = given("extend")
    answer = greedy(llm, frames)
    _, pieces, _ = extended[0]
    backend = OneSequence(llm._backend)
    for said in range(len(answer.ids)):
        words = backend.embed(np.array(answer.ids[:said], np.int64))
        assert np.argmax(backend.prefill([*pieces, words], 512)) == answer.ids[said]


def test_answer_depends_on_question_video_and_order_of_frames(llm, frames):
    said = {
        tuple(answer.ids)
        for answer in (
            llm.generate(frames, QUESTION, prune=False, max_new_tokens=12),
            llm.generate(frames, QUESTION + "?", prune=False, max_new_tokens=12),
            llm.generate(frames[::-1], QUESTION, prune=False, max_new_tokens=12),
            llm.generate(frames // 2, QUESTION, prune=False, max_new_tokens=12),
            llm.generate(frames, QUESTION, frames=8, prune=False, max_new_tokens=12),
        )
    }
    assert len(said) == 5


# Where an answer ends


def test_ends_after_max_new_tokens(llm, frames):
    whole = greedy(llm, frames, 12)
    assert (len(whole.ids), whole.finish) == (12, "length")
    for length in (1, 2, 5):
        answer = greedy(llm, frames, length)
        assert (answer.ids, answer.finish) == (whole.ids[:length], "length")


@pytest.mark.parametrize("order", [1, -1])
def test_ends_before_either_stop_token(edited, llm, frames, order):
    ids = greedy(llm, frames).ids
    stop = [ids[4], next(i for i in ids[5:] if i != ids[4])]
    answer = greedy(edited("prompt", stop=stop[::order]), frames)
    assert (answer.ids, answer.finish) == (ids[: ids.index(stop[0])], "stop")


def test_a_stop_token_at_once_is_an_empty_answer(edited, llm, frames):
    first = greedy(llm, frames, 1).ids[0]
    answer = greedy(edited("prompt", stop=[first]), frames)
    assert (answer.ids, answer.text, answer.finish, answer.tokens_per_second) == ([], "", "stop", 0)
    assert answer.kept
    assert answer.stages["prefill"] > 0
    assert not answer.stages.get("decode")


def test_ends_where_the_context_is_full(edited, llm, frames):
    whole = greedy(llm, frames)
    short = edited("decoder", context=whole.prompt_tokens + 5)
    for length, finish in ((12, "context"), (6, "context"), (5, "length")):
        answer = greedy(short, frames, length)
        assert (answer.ids, answer.finish) == (whole.ids[:5], finish)


def test_one_token_fits_behind_the_longest_prompt_and_a_longer_one_is_refused(edited, llm, frames):
    whole = greedy(llm, frames)
    assert greedy(edited("decoder", context=whole.prompt_tokens + 1), frames).ids == whole.ids[:1]
    full = edited("decoder", context=whole.prompt_tokens)
    with pytest.raises(TangoError, match=f"takes {whole.prompt_tokens} tokens, {whole.kept} of them video"):
        greedy(full, frames)


def test_an_unpruned_prompt_that_cannot_fit_is_refused_before_the_video_is_decoded(edited, frames):
    short = edited("decoder", context=100)
    with pytest.raises(TangoError, match=r"128 of them video; the bundle's context is 100") as caught:
        short.stream(frames, QUESTION, frames=8, prune=False)
    assert "--context" in caught.value.hint


def test_a_question_alone_can_be_too_long(llm, frames):
    with pytest.raises(TangoError, match="0 of them video; the bundle's context is 2048"):
        llm.stream(frames, "why? " * 2000)


@pytest.mark.parametrize("length", [0, -1])
def test_no_tokens_at_all_are_refused(llm, frames, length):
    with pytest.raises(TangoError, match=f"max_new_tokens is {length}"):
        llm.stream(frames, QUESTION, max_new_tokens=length)


# How much is kept


def test_retention_ratio_overrides_the_bundles(llm, colors):
    ratios = (0.05, 0.1, 0.25, 0.5, 1.0)
    answers = [greedy(llm, colors, 1, frames=8, retention_ratio=ratio) for ratio in ratios]
    kept = [answer.kept for answer in answers]
    assert kept == sorted(set(kept))
    for ratio, answer in zip(ratios, answers, strict=True):
        assert 0 < answer.kept <= op.capacity(8, 16, llm.bundle.manifest.params.at(ratio)) <= answer.total == 128
    assert greedy(llm, colors, 1, frames=8).kept == kept[1]


def test_unpruned_keeps_every_token(llm, frames):
    answer = greedy(llm, frames, 1, prune=False)
    assert answer.kept == answer.total == 64
    np.testing.assert_array_equal(answer.indices, np.arange(64))
    assert not answer.merged.any()
    assert answer.segments.shape == (0, 2)


@pytest.mark.parametrize("ratio", [0.0, 1.5, -0.1, float("nan"), 0.12345])
def test_a_ratio_out_of_range_is_refused(llm, frames, ratio):
    with pytest.raises(TangoError, match="retention_ratio"):
        llm.stream(frames, QUESTION, retention_ratio=ratio)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_frames_override_the_bundles(llm, frames, count):
    answer = greedy(llm, frames, 2, frames=count)
    chosen = np.linspace(0, 7, count, dtype=int)
    np.testing.assert_array_equal(answer.frames, [resize(frames[i], (112, 112)) for i in chosen])
    np.testing.assert_array_equal(answer.seconds, chosen)
    assert answer.salience.shape == (count, 16)
    assert answer.segments[0, 0] == 0
    assert answer.segments[-1, 1] == count


def test_the_bundles_number_of_frames_is_the_default(llm, frames):
    assert len(greedy(llm, frames, 1).frames) == llm.bundle.manifest.video.frames == 4


@pytest.mark.parametrize("count", [0, -3, 9])
def test_a_number_of_frames_that_the_video_has_not_is_refused(llm, frames, count):
    with pytest.raises(TangoError, match=rf"(?<!\d){count} "):
        llm.stream(frames, QUESTION, frames=count)


# Sampling


def test_the_same_seed_gives_the_same_answer(llm, frames):
    def sampled(seed, **options):
        return greedy(llm, frames, temperature=1.5, seed=seed, **options).ids

    assert sampled(1) == sampled(1)
    assert len({tuple(sampled(seed)) for seed in range(4)}) > 1
    assert sampled(1, top_p=1e-6) == greedy(llm, frames).ids == greedy(llm, frames, seed=3).ids


# What is told


def test_pieces_put_together_are_the_text(llm, frames):
    stream = llm.stream(frames, QUESTION, max_new_tokens=40)
    assert stream.answer.text == ""
    pieces = list(stream)
    assert len(pieces) > 5
    assert all(pieces)
    assert "".join(pieces) == stream.answer.text == llm._prompt.decode(stream.answer.ids)
    assert stream.answer.text == greedy(llm, frames, 40).text


def test_a_piece_comes_as_soon_as_it_is_there(llm, frames):
    stream = llm.stream(frames, QUESTION, max_new_tokens=40)
    next(stream)
    assert 1 <= len(stream.answer.ids) < 8
    assert stream.answer.kept


def test_stages_are_told_in_order(llm, frames):
    answer = greedy(llm, frames)
    assert list(answer.stages) == ["video", "vision", "prune", "prefill", "decode"]
    assert all(ms > 0 for ms in answer.stages.values())
    assert answer.first_token_ms == pytest.approx(sum(answer.stages.values()) - answer.stages["decode"])
    assert answer.tokens_per_second == pytest.approx(11_000 / answer.stages["decode"])
    assert list(greedy(llm, frames, prune=False).stages) == ["video", "vision", "prefill", "decode"]
    assert not greedy(llm, frames, 1).stages.get("decode")


def test_frames_done_are_told(llm, frames):
    done = []
    list(llm.stream(frames, QUESTION, frames=3, max_new_tokens=1, on_progress=done.append))
    assert sum(done) == 3


@pytest.mark.parametrize("options", [{}, {"prune": False}, {"length": 1}, {"frames": 1}])
def test_report_and_picture_are_written(llm, frames, tmp_path, options):
    answer = greedy(llm, frames, **options)
    report = llm.report(answer, "clip.mp4")
    assert (report.kept, report.total) == (answer.kept, answer.total)
    assert report.aspect == pytest.approx(64 / 36)
    assert report.first_token_ms == pytest.approx(answer.first_token_ms)
    report.write(tmp_path / "out.html")
    report.picture(tmp_path / "out.png")
    assert QUESTION in (tmp_path / "out.html").read_text()
    assert Image.open(tmp_path / "out.png").size > (64, 36)


# Sources


def test_every_source_of_the_same_frames_gives_the_same_answer(llm, frames, tmp_path):
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    timed = [(10 + i / 2, frame) for i, frame in enumerate(frames)]
    answers = [
        greedy(llm, frames, fps=2),
        greedy(llm, tmp_path, fps=2),
        greedy(llm, str(tmp_path), fps=2),
        greedy(llm, timed),
        greedy(llm, iter(timed)),
        greedy(llm, (pair for pair in timed)),
    ]
    for answer in answers:
        assert answer.ids == answers[0].ids
        np.testing.assert_array_equal(answer.seconds, np.array([0, 1, 2, 3.5], np.float32))
        np.testing.assert_array_equal(answer.frames, answers[0].frames)


def test_a_file_has_its_own_times(llm, clip):
    answer = greedy(llm, clip)
    np.testing.assert_allclose(answer.seconds, np.linspace(0, 95, 4, dtype=int) / 12, atol=1e-4)
    assert answer.aspect == pytest.approx(640 / 360)
    assert answer.ids == greedy(llm, str(clip)).ids


# One chain, many answers


def test_an_answer_leaves_nothing_behind(llm, frames, clip):
    alone = greedy(llm, frames).ids
    greedy(llm, clip, frames=6, prune=False)
    next(llm.stream(clip, "How many?"))  # and one that is never read to its end
    assert greedy(llm, frames).ids == alone


def test_two_answers_at_a_time_do_not_mix(llm, frames):
    alone, other = greedy(llm, frames), llm.generate(frames[::-1], "How many?", max_new_tokens=12)
    first = llm.stream(frames, QUESTION, max_new_tokens=12)
    second = llm.stream(frames[::-1], "How many?", max_new_tokens=12)
    texts = ["", ""]
    for pieces in zip_longest(first, second, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == [alone.text, other.text]
    for stream, wanted in ((first, alone), (second, other)):
        assert stream.answer.ids == wanted.ids
        for name in ("indices", "merged", "segments", "salience"):
            np.testing.assert_array_equal(getattr(stream.answer, name), getattr(wanted, name))


# Precision


@pytest.mark.parametrize("outliers", [False, True])
def test_fp16_chooses_as_fp32_wherever_the_choice_is_clear(responsive_checkpoint, frames, outliers):
    seed = 7 if outliers else 0
    single, half = (
        VideoLLM(responsive_checkpoint(outliers=outliers, seed=seed, dtype=dtype)[1]) for dtype in ("fp32", "fp16")
    )
    expected, logits = heard(single, frames)
    found, half_logits = heard(half, frames, say=expected.ids)
    np.testing.assert_array_equal(found.indices, expected.indices)
    second, first = np.partition(logits, -2)[:, -2:].T
    clear = first - second > 0.03 * np.abs(logits).max()
    assert clear.sum() >= 10
    np.testing.assert_array_equal(half_logits.argmax(1)[clear], logits.argmax(1)[clear])


def heard(llm, frames, say=None):
    """A greedy answer and the logits [N, V] of its steps; the decoder hears the tokens of ``say`` if they are given."""
    rows, extend, embed = [], llm._backend.extend, llm._backend.embed

    def keep(cache, pieces, thinning=None):
        if rows and say:
            pieces = [embed(np.array([say[len(rows) - 1]], np.int64))]
        rows.append(extend(cache, pieces))
        return rows[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm._backend, "extend", keep)  # on the CPU, a decode step is one of one token
        return greedy(llm, frames, 32, frames=8), np.stack(rows)
