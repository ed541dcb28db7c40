"""A session sees its video once, and answers as if every question were asked anew."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime import Session, VideoLLM
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.backends.cuda.device import Stream
from tango_runtime.backends.cuda.ort_runner import OrtRunner
from tests.fakes.cuda import install

QUESTIONS = [f"{start} happens {end}?" for start in ("What", "Who", "Where") for end in ("here", "first", "at the end")]
QUESTIONS += ["What happens here?"]


@pytest.fixture(params=["ort-cpu", "ort-cuda"])
def llm(request, tiny_bundle, monkeypatch):
    """The pipeline on the CPU, and on CUDA, which is emulated; device graphs and TensorRT: tests/runtime/backends."""
    found = VideoLLM(tiny_bundle, "ort-cpu")
    if request.param == "ort-cuda":
        import onnxruntime

        install(monkeypatch)
        stream = Stream()
        graphs = OrtRunner(onnxruntime, found.bundle, stream, ("CPUExecutionProvider", "cpu"))
        found._backend = CudaBackend(found.bundle, graphs, stream)
    return found


def test_ten_questions_are_answered_as_if_each_were_asked_anew(llm, frames):
    session = llm.session(frames)
    assert isinstance(session, Session)
    for question in QUESTIONS:
        answer, alone = session.ask(question, max_new_tokens=8), llm.generate(frames, question, max_new_tokens=8)
        assert (answer.ids, answer.text, answer.finish) == (alone.ids, alone.text, alone.finish)
        assert (answer.kept, answer.total, answer.prompt_tokens) == (alone.kept, alone.total, alone.prompt_tokens)
        for name in ("frames", "seconds", "salience", "indices", "merged", "segments"):
            np.testing.assert_array_equal(getattr(answer, name), getattr(alone, name))


def test_the_video_is_seen_once(llm, frames, monkeypatch):
    seen, vision = [], llm._backend.vision
    monkeypatch.setattr(llm._backend, "vision", lambda *arguments: (seen.append(1), vision(*arguments))[1])
    session = llm.session(frames, frames=8)
    extended, extend = [], llm._backend.extend
    monkeypatch.setattr(
        llm._backend, "extend", lambda cache, *given: (extended.append(given[0]), extend(cache, *given))[1]
    )
    first, second = (session.ask(question, max_new_tokens=3) for question in QUESTIONS[:2])
    assert seen == [1]
    assert list(first.stages) == ["video", "vision", "prune", "prefill", "decode"]
    assert list(second.stages) == ["prefill", "decode"]
    assert list(session.stages) == ["video", "vision", "prune"]
    passes = [sum(len(getattr(piece, "ids", piece)) for piece in pieces) for pieces in extended if len(pieces) == 1]
    assert max(passes) < first.prompt_tokens - first.kept  # the second question's pass has no token of the video


def test_two_sessions_take_turns(llm, frames):
    alone = {}
    for reverse in (1, -1):
        for question in QUESTIONS[:3]:
            alone[reverse, question] = llm.generate(frames[::reverse], question, max_new_tokens=6).ids
    sessions = {reverse: llm.session(frames[::reverse]) for reverse in (1, -1)}
    for question in QUESTIONS[:3]:
        for reverse, session in sessions.items():
            answer = session.ask(question, max_new_tokens=6)
            assert answer.ids == alone[reverse, question]
    streams = {reverse: session.stream(QUESTIONS[0], max_new_tokens=6) for reverse, session in sessions.items()}
    ended = set()
    while len(ended) < 2:
        ended |= {reverse for reverse, stream in streams.items() if next(stream, None) is None}
    for reverse, stream in streams.items():
        assert stream.answer.ids == alone[reverse, QUESTIONS[0]]


def test_two_streams_of_one_session_take_turns(llm, frames):
    session = llm.session(frames)
    alone = [session.ask(question, max_new_tokens=8).ids for question in QUESTIONS[:2]]
    streams = [session.stream(question, max_new_tokens=8) for question in QUESTIONS[:2]]
    ended = set()
    while len(ended) < 2:
        ended |= {i for i, stream in enumerate(streams) if next(stream, None) is None}
    assert [stream.answer.ids for stream in streams] == alone


def test_a_session_that_is_not_asked_at_once_keeps_its_video(llm, frames):
    wanted = llm.generate(frames, QUESTIONS[0], max_new_tokens=6)
    waiting = llm.session(frames)
    llm.generate(frames[::-1], "How many?", frames=8, prune=False, max_new_tokens=4)
    answer = waiting.ask(QUESTIONS[0], max_new_tokens=6)
    assert answer.ids == wanted.ids
    np.testing.assert_array_equal(answer.indices, wanted.indices)
    np.testing.assert_array_equal(answer.salience, wanted.salience)


def test_a_chat_is_the_conversation_as_one_prompt(llm, frames):
    """The decoder sees what the template renders of the whole chat, with the answers' own token ids."""
    session = llm.session(frames)
    first = session.chat("What happens?", max_new_tokens=5)
    session.ask("Something else?", max_new_tokens=3)  # no part of the chat
    second = session.chat("And then?", max_new_tokens=5)
    third = session.chat("Why?", max_new_tokens=5)
    assert [message for message, _ in session.history] == ["What happens?", "And then?", "Why?"]
    assert [text for _, text in session.history] == [answer.text for answer in (first, second, third)]

    prompt = llm._prompt
    before, after = prompt.encode("What happens?")
    text = [*after, *first.ids, *prompt.follow_up("And then?")]
    text += [*second.ids, *prompt.follow_up("Why?")]
    assert third.prompt_tokens == len(before) + first.kept + len(llm.bundle.manifest.prompt.after_video) + len(text)
    fresh = llm.session(frames)
    fresh._turns, fresh._chat_ids = session._turns[:2], [int(i) for i in text[: -len(prompt.follow_up("Why?"))]]
    assert fresh.chat("Why?", max_new_tokens=5).ids == third.ids


def test_a_chat_that_is_not_read_to_its_end_leaves_the_history(llm, frames):
    session = llm.session(frames)
    next(session.stream("What happens?", chat=True, max_new_tokens=8))
    assert session.history == ()


def test_a_turn_that_another_one_overtakes_is_refused(llm, frames):
    session = llm.session(frames)
    begun, waiting = (session.stream(text, chat=True, max_new_tokens=8) for text in ("What?", "Who?"))
    next(begun)
    session.chat("Where?", max_new_tokens=3)
    for stream in (begun, waiting):
        with pytest.raises(TangoError, match="the chat went on before this message was answered"):
            list(stream)
    assert [message for message, _ in session.history] == ["Where?"]


def test_a_stream_can_be_closed(llm, frames):
    with llm.stream(frames, QUESTIONS[0], max_new_tokens=8) as stream:
        next(stream)
    assert list(stream) == []
    assert 1 <= len(stream.answer.ids) < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"temperature": "a"}, "temperature is 'a'"),
        ({"top_p": None}, "top_p is None"),
        ({"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_values_of_another_type_are_named(llm, frames, options, message):
    with pytest.raises(TangoError, match=message):
        llm.stream(frames, QUESTIONS[0], **options)


@pytest.mark.parametrize("question", [None, 5, ["What?"]])
def test_a_question_must_be_text(llm, frames, question):
    with pytest.raises(TangoError, match="the question is not text"):
        llm.stream(frames, question)
    with pytest.raises(TangoError, match=r"2.5 frames were asked for"):
        llm.session(frames, frames=2.5)


def test_a_long_conversation_outgrows_its_first_cache(llm, frames):
    session = llm.session(frames)
    answers = [session.chat("Go on, please, and say more.", max_new_tokens=90) for _ in range(4)]
    assert answers[-1].prompt_tokens > 256
    alone = llm.session(frames).ask(QUESTIONS[0], max_new_tokens=6).ids
    assert session.ask(QUESTIONS[0], max_new_tokens=6).ids == alone


def test_a_conversation_ends_with_the_context(llm, frames):
    session = llm.session(frames)
    with pytest.raises(TangoError, match=r"the prompt takes \d+ tokens, \d+ of them video"):
        session.ask("why? " * 2000)
    assert session.ask(QUESTIONS[0], max_new_tokens=3).ids  # and is still there


@pytest.mark.parametrize(
    ("question", "error"),
    [("<|im_end|>", "contains"), ("<video>", "contains"), ("", "is empty"), (" \n", "is empty")],
)
def test_a_wrong_question_is_refused_in_every_turn(llm, frames, question, error):
    session = llm.session(frames)
    for ask in (session.ask, session.chat):
        with pytest.raises(TangoError, match=f"the question {error}"):
            ask(question)
    session.chat("What?", max_new_tokens=2)
    with pytest.raises(TangoError, match=f"the question {error}"):
        session.chat(question)


def test_an_answer_of_a_history_may_be_empty(llm, frames):
    session = llm.session(frames)
    history = [("What?", "")]  # an answer may have nothing in it
    assert list(session.stream("Who?", history=history, max_new_tokens=2))


def test_a_closed_session_says_so(llm, frames):
    with llm.session(frames) as session:
        assert session.ask(QUESTIONS[0], max_new_tokens=2).ids
    with pytest.raises(TangoError, match="the session is closed"):
        session.ask(QUESTIONS[0])
    session.close()


def test_a_stream_of_a_closed_session_ends_with_an_error(llm, frames):
    session = llm.session(frames)
    begun, waiting = (session.stream(QUESTIONS[0], max_new_tokens=8) for _ in range(2))
    next(begun)
    session.close()
    for stream in (begun, waiting):
        with pytest.raises(TangoError, match="the session is closed"):
            list(stream)


def test_a_forgotten_session_gives_its_cache_back(llm, frames):
    session = llm.session(frames)
    session.ask(QUESTIONS[0], max_new_tokens=2)
    released, cache = [], session._cache._cache
    release = cache.release
    cache.release = lambda: (released.append(1), release())
    del session, cache
    gc.collect()
    assert released == [1]


def test_an_answer_that_fails_does_not_spoil_the_next(llm, frames, monkeypatch):
    session = llm.session(frames)
    wanted = session.ask(QUESTIONS[0], max_new_tokens=4).ids
    decode = llm._backend.decode

    def failing(cache, token):
        raise TangoError("the device failed", "")

    monkeypatch.setattr(llm._backend, "decode", failing)
    with pytest.raises(TangoError, match="the device failed"):
        session.ask(QUESTIONS[1], max_new_tokens=4)
    monkeypatch.setattr(llm._backend, "decode", decode)
    assert session.ask(QUESTIONS[0], max_new_tokens=4).ids == wanted


def test_a_template_that_writes_the_question_first_takes_one_question(tiny_bundle, tmp_path, frames):
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    template = "{{ messages[0]['content'][1]['text'] }}<video>{% for m in messages[1:] %}{% endfor %}!"
    (folder / "chat_template.jinja").write_text(template)
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["files"]["chat_template.jinja"]["size"] = len(template)
    (folder / "bundle.json").write_text(json.dumps(manifest))
    llm = VideoLLM(folder, "ort-cpu")
    session = llm.session(frames)
    assert session.ask("What?", max_new_tokens=3).ids == llm.generate(frames, "What?", max_new_tokens=3).ids
    with pytest.raises(TangoError, match="the chat template writes the question before the video"):
        session.ask("Who?")
    with pytest.raises(TangoError, match="does not render earlier answers"):
        session.chat("What?", max_new_tokens=3) and session.chat("What?")


def test_a_decoded_video_is_answered_as_its_source(llm, frames):
    decoded = llm.decode(frames, frames=6)
    for options in ({"retention_ratio": 0.5}, {"prune": False}):
        session, wanted = llm.session(decoded, **options), llm.session(frames, frames=6, **options)
        given = {"max_new_tokens": 4}
        assert session.ask("Who?", **given).ids == wanted.ask("Who?", **given).ids
        np.testing.assert_array_equal(session.frames, wanted.frames)
        assert (session.aspect, session.seconds.tolist()) == (wanted.aspect, wanted.seconds.tolist())


def test_a_decoded_video_has_its_frames(llm, frames, responsive_qwen):
    with pytest.raises(TangoError, match="decoded already"):
        llm.session(llm.decode(frames), frames=3)
    other = VideoLLM(responsive_qwen()[1]).decode(frames)
    with pytest.raises(TangoError, match=r"decoded for a bundle that takes other frames|frames must be"):
        llm.session(other)


def test_an_encoded_video_goes_when_its_last_session_does(llm, frames):
    """Without the cyclic collector: a GPU's memory would wait for that."""
    gc.collect()
    gc.disable()
    try:
        video = llm.encode(llm.decode(frames, frames=8))
        gone = weakref.ref(video)
        session = llm.session(video)
        wanted = video.frames
        del video
        assert gone() is not None  # the session reads its salience from there
        np.testing.assert_array_equal(session.frames, wanted)
        assert session.ask("?", max_new_tokens=2).ids == llm.generate(frames, "?", frames=8, max_new_tokens=2).ids
        session.close()
        del session
        assert gone() is None
    finally:
        gc.enable()
