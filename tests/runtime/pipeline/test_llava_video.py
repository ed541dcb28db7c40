"""LLaVA-Video: what the decoder gets of a video, and the answers, against a decoder in NumPy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.backends.registry import select
from tango_runtime.video import open_source
from tests.fakes.qwen2 import Qwen2

LENGTH = 20
QUESTIONS = ["What happens in the video?", "Who?", "What happens after that?"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, responsive_checkpoint):
    """The pipeline of a LLaVA-Video with 9×9 patches and 4×4 tokens a frame, and its decoder in NumPy."""
    folder, bundle = responsive_checkpoint("llava-video", tied=request.param, image=126)
    return SimpleNamespace(llm=VideoLLM(bundle, "ort-cpu"), decoder=Qwen2(folder))


def rows_of(decoder, tokens, indices):
    """Tokens with a newline behind the last that is kept of each row of four."""
    rows = []
    for token, index, following in zip(tokens, indices, [*indices[1:], None], strict=True):
        rows.append(token)
        if following is None or index // 4 != following // 4:
            rows.append(decoder.newline)
    return np.array(rows)


def prompt_of(model, answer, tokens):
    """The embeddings of an answer's prompt, its text written out."""
    seconds, duration = answer.seconds.astype(float), len(answer.seconds) * 1.0
    times = ",".join(f"{s:.2f}s" for s in seconds)
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    after = (
        f"\nThe video lasts for {duration:.2f} seconds, and {len(seconds)} frames are uniformly sampled from it. "
        f"These frames are located at {times}.Please answer the following questions related to this video.\n"
        f"{answer.question}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = [model.llm._prompt._ids(text) for text in (before, after)]
    rows = rows_of(model.decoder, tokens, answer.indices.tolist())
    return np.concatenate((model.decoder.table[ids[0]], rows, model.decoder.table[ids[1]]))


def check(model, answer, tokens):
    prompt = prompt_of(model, answer, tokens)
    vocabulary = model.llm.bundle.manifest.prompt.vocabulary
    assert answer.prompt_tokens == len(prompt)
    assert answer.ids == model.decoder.greedy(prompt, len(answer.ids), vocabulary)
    assert len(answer.ids) == LENGTH
    assert len(set(answer.ids)) >= 6


@pytest.mark.parametrize("count", [1, 3, 8])
def test_an_unpruned_answer_is_numpys(model, colors, count):
    answer = model.llm.generate(colors[:count], QUESTIONS[0], frames=count, prune=False, max_new_tokens=LENGTH)
    assert (answer.kept, answer.rows) == (16 * count, 20 * count)
    features, _ = select(model.llm.bundle, "ort-cpu").vision(answer.frames, lambda done: None)
    check(model, answer, features.reshape(16 * count, -1))


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.5])
def test_a_pruned_answer_is_numpys(model, colors, ratio):
    backend = select(model.llm.bundle, "ort-cpu")
    answer = model.llm.generate(colors, QUESTIONS[0], frames=8, retention_ratio=ratio, max_new_tokens=LENGTH)
    features, salience = backend.vision(answer.frames, lambda done: None)
    kept = backend.prune(features, salience, answer.seconds, model.llm.bundle.manifest.params.at(ratio))
    np.testing.assert_array_equal(answer.indices, kept.indices)
    assert answer.rows == answer.kept + len(np.unique(answer.indices // 4))
    check(model, answer, kept.tokens)


def test_the_questions_of_a_session_are_answered_as_if_asked_alone(model, colors):
    alone = [model.llm.generate(colors, question, frames=8, max_new_tokens=LENGTH) for question in QUESTIONS]
    assert len({tuple(answer.ids) for answer in alone}) == len(QUESTIONS)
    with model.llm.session(colors, frames=8) as session:
        for question, wanted in zip([*QUESTIONS, QUESTIONS[0]], [*alone, alone[0]], strict=True):
            answer = session.ask(question, max_new_tokens=LENGTH)
            assert (answer.ids, answer.prompt_tokens, answer.rows) == (wanted.ids, wanted.prompt_tokens, wanted.rows)


def test_a_chat_says_once_when_the_frames_are(model, colors):
    with model.llm.session(colors, frames=8) as session:
        first, second = (session.chat(text, max_new_tokens=3) for text in ("What?", "And then?"))
        follow_up = len(model.llm._prompt.follow_up("And then?"))
    assert second.prompt_tokens == first.prompt_tokens + len(first.ids) + follow_up


def test_the_prompt_has_the_times_of_the_frames_that_were_sampled(model, colors):
    with model.llm.session(colors, frames=3, fps=3.0) as session:
        _, text = session.encode("Q")
    said = model.llm._prompt.decode(text)
    assert "lasts for 2.67 seconds, and 3 frames" in said
    assert "located at 0.00s,1.00s,2.33s.Please answer" in said


def test_a_source_without_a_duration_is_refused(model, colors):
    source = open_source(colors)
    unending = SimpleNamespace(name="it", duration=None, frame_size=None, sample=source.sample, read=source.read)
    with pytest.raises(TangoError, match="the source has no duration"):
        model.llm.stream(unending, "Q", frames=2)


def test_row_ends_and_times_count_where_a_prompt_must_fit(model, colors):
    limit = model.llm.bundle.manifest.decoder.context
    frames = limit // 20 + 1
    clip = np.zeros((frames, 4, 4, 3), np.uint8)
    assert 16 * frames < limit
    with pytest.raises(TangoError, match=rf"the prompt takes \d+ tokens, {20 * frames} of them video"):
        model.llm.stream(clip, "Q", frames=frames, prune=False)
