"""Answers that share decode steps are the answers that each gets alone."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.backends.ort_cpu import OrtCpuBackend
from tango_runtime.pipeline.together import finished_together
from tests.fakes.together import TogetherBackend

QUESTIONS = ["What happens here?", "Who happens first?", "Where happens at the end?"]


@pytest.fixture(scope="module")
def alone(tiny_bundle):
    """What each question gets, forwards and backwards, from a model that decodes one sequence at a time."""
    return VideoLLM(tiny_bundle, "ort-cpu")


@pytest.fixture
def llm(tiny_bundle):
    found = VideoLLM(tiny_bundle, "ort-cpu")
    return VideoLLM(found.bundle, TogetherBackend(found.bundle), sequences=8)


def read_in_turns(streams):
    """Reads a token of each stream in turn, to their ends."""
    left = list(streams)
    while left:
        left = [stream for stream in left if stream.turn() is not None]
    return [stream.answer.ids for stream in streams]


def asked_alone(llm, frames, questions, tokens=8):
    return [llm.generate(frames, question, max_new_tokens=tokens).ids for question in questions]


def test_a_backend_that_decodes_one_sequence_at_a_time_has_no_shared_steps(alone):
    assert VideoLLM(alone.bundle, OrtCpuBackend(alone.bundle), sequences=8).sequences == 1


@pytest.mark.parametrize("sequences", [0, True, "2"])
def test_a_bad_number_of_sequences_is_rejected(alone, sequences):
    with pytest.raises(TangoError, match="sequences is"):
        VideoLLM(alone.bundle, alone._backend, sequences=sequences)


def test_streams_of_sessions_share_steps(llm, alone, frames):
    videos = frames, frames[::-1], frames[:6]
    streams = [llm.session(video).stream(QUESTIONS[0], max_new_tokens=8) for video in videos]
    assert read_in_turns(streams) == [alone.generate(video, QUESTIONS[0], max_new_tokens=8).ids for video in videos]
    assert llm._backend.steps == [3] * 7  # the first token of each is its prefill's


def test_streams_of_one_session_share_steps(llm, alone, frames):
    session = llm.session(frames)
    streams = [session.stream(question, max_new_tokens=8) for question in QUESTIONS]
    assert read_in_turns(streams) == asked_alone(alone, frames, QUESTIONS)
    assert llm._backend.steps == [3] * 7
    assert session.ask(QUESTIONS[1], max_new_tokens=8).ids == streams[1].answer.ids


def test_a_stream_joins_the_others_when_it_begins(llm, alone, frames):
    session = llm.session(frames)
    first = session.stream(QUESTIONS[0], max_new_tokens=8)
    for _ in range(4):
        first.turn()
    second = session.stream(QUESTIONS[1], max_new_tokens=6)
    assert read_in_turns([first, second]) == [
        *asked_alone(alone, frames, QUESTIONS[:1]),
        *asked_alone(alone, frames, QUESTIONS[1:2], 6),
    ]
    assert llm._backend.steps == [1] * 4 + [2] * 3 + [1] * 2


def test_no_step_has_more_sequences_than_allowed(llm, alone, frames):
    llm._backend.sequences = 2
    streams = [llm.session(frames).stream(question, max_new_tokens=8) for question in QUESTIONS]
    assert read_in_turns(streams) == asked_alone(alone, frames, QUESTIONS)
    assert max(llm._backend.steps) == 2
    assert sum(llm._backend.steps) == 3 * 7


def test_a_stream_that_is_closed_or_forgotten_leaves_the_steps(llm, alone, frames):
    session = llm.session(frames)
    closed, kept, forgotten = (session.stream(question, max_new_tokens=8) for question in QUESTIONS)
    for stream in (closed, kept, forgotten):
        stream.turn()
    closed.close()
    del forgotten, stream
    gc.collect()
    assert read_in_turns([kept]) == asked_alone(alone, frames, QUESTIONS[1:2])
    assert llm._backend.steps == [1] * 7
    assert session.ask(QUESTIONS[0], max_new_tokens=8).ids == asked_alone(alone, frames, QUESTIONS[:1])[0]


def test_another_text_may_come_between_a_step_and_its_result(llm, alone, frames):
    """The step of a stream was computed for another stream, and then its session answers something else."""
    sessions = [llm.session(video) for video in (frames, frames[::-1])]
    streams = [session.stream(QUESTIONS[0], max_new_tokens=8) for session in sessions]
    for stream in (*streams, streams[0]):
        stream.turn()
    between = sessions[1].ask(QUESTIONS[1], max_new_tokens=5).ids
    assert between == asked_alone(alone, frames[::-1], QUESTIONS[1:2], 5)[0]
    wanted = [alone.generate(video, QUESTIONS[0], max_new_tokens=8).ids for video in (frames, frames[::-1])]
    assert read_in_turns(streams) == wanted


@pytest.mark.parametrize("computed", [False, True])
def test_what_was_announced_may_be_followed_by_something_else(llm, alone, frames, computed):
    def logits(model, between):
        session = model.session(frames)
        before, text = session.encode(QUESTIONS[0])
        cache = session._open(before)
        found = [np.array(cache.logits(text))]
        cache.announce(text, [7])
        if between and computed:
            cache._steps.logits(cache._next[1])
        other = [*text, 9, 11] if between else text
        return [*found, np.array(cache.logits(other)), np.array(cache.logits(text, [7]))]

    found, wanted = logits(llm, True), logits(alone, False)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[2], wanted[2], rtol=0, atol=1e-5)


def test_an_error_of_a_step_ends_the_answers_in_it_and_no_other(llm, alone, frames):
    streams = [llm.session(frames).stream(question, max_new_tokens=8) for question in QUESTIONS]
    for stream in streams[:2]:
        stream.turn()
    llm._backend.failures = 1
    for stream in streams[:2]:
        with pytest.raises(TangoError, match="the device failed"):
            stream.turn()
    assert read_in_turns(streams[2:]) == asked_alone(alone, frames, QUESTIONS[2:])
    assert read_in_turns([llm.session(frames).stream(QUESTIONS[0], max_new_tokens=8)])


def test_an_answer_that_cannot_be_sampled_does_not_end_the_others(llm, alone, frames):
    streams = [llm.session(frames).stream(question, max_new_tokens=8) for question in QUESTIONS]
    for stream in streams:
        stream.turn()
    llm._backend.spoiled = 1  # the second sequence of the next step
    assert streams[0].turn() is not None
    with pytest.raises(TangoError, match="the logit of token 0 is nan"):
        streams[1].turn()
    left = read_in_turns([streams[0], streams[2]])
    assert left == asked_alone(alone, frames, [QUESTIONS[0], QUESTIONS[2]])


def test_all_answers_of_a_step_took_its_time(llm, frames):
    session = llm.session(frames)
    streams = [session.stream(question, max_new_tokens=4) for question in QUESTIONS]
    read_in_turns(streams)
    for stream in streams:
        assert stream.answer.stages["decode"] >= llm._backend.slept_ms


def test_finished_answers_come_in_order_and_errors_in_their_places(llm, alone, frames):
    session = llm.session(frames)
    lengths = 8, 2, 5, 3

    def begin(length, place):
        return lambda: session.stream(QUESTIONS[place % 3], max_new_tokens=length)

    begun = [begin(length, place) for place, length in enumerate(lengths)]
    begun.insert(2, lambda: session.stream("<image>", max_new_tokens=0))
    found = list(finished_together(begun, 2, lambda work: work()))
    assert isinstance(found.pop(2), TangoError)
    for place, (answer, length) in enumerate(zip(found, lengths, strict=True)):
        assert answer.ids == alone.generate(frames, QUESTIONS[place % 3], max_new_tokens=length).ids
    assert max(llm._backend.steps) == 2
