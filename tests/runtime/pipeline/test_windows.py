"""A stream: each frame is encoded once, and a question about its window is answered as one about a clip."""

from __future__ import annotations

import queue
import threading

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.backends.cuda.device import Stream
from tango_runtime.backends.cuda.ort_runner import OrtRunner
from tango_runtime.pipeline import feed
from tango_runtime.pipeline import live as live_module
from tango_runtime.video import LiveSource
from tests.fakes.camera import FakeCamera
from tests.fakes.cuda import install

QUESTION = "What happens?"


def on_cuda(llm, monkeypatch):
    """The same model on CUDA, which is emulated."""
    import onnxruntime

    install(monkeypatch)
    stream = Stream()
    graphs = OrtRunner(onnxruntime, llm.bundle, stream, ("CPUExecutionProvider", "cpu"))
    llm._backend = CudaBackend(llm.bundle, graphs, stream)
    return llm


@pytest.fixture(params=["ort-cpu", "ort-cuda"])
def llm(request, tiny_bundle, monkeypatch):
    found = VideoLLM(tiny_bundle, "ort-cpu")
    return found if request.param == "ort-cpu" else on_cuda(found, monkeypatch)


@pytest.fixture(params=["ort-cpu", "ort-cuda"])
def qwen(request, responsive_qwen, monkeypatch):
    found = VideoLLM(responsive_qwen()[1], "ort-cpu")
    return found if request.param == "ort-cpu" else on_cuda(found, monkeypatch)


def pairs(frames, begin=0.0, interval=1.0):
    return [(begin + interval * i, frame) for i, frame in enumerate(frames)]


def scene(n, height=36, width=64, seed=3):
    """uint8 [n, height, width, 3]: every frame differs from all others."""
    return np.random.default_rng(seed).integers(0, 255, (n, height, width, 3), dtype=np.uint8)


class Camera:
    """An iterable that gives what it is told, when it is told."""

    def __init__(self):
        self.items = queue.Queue()
        self.taken = threading.Semaphore(0)

    def give(self, *items):
        for item in items:
            self.items.put(item)
        for _ in items:
            self.taken.acquire()

    def end(self, error=None):
        self.items.put(error)

    def __iter__(self):
        while True:
            item = self.items.get()
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
            self.taken.release()  # the reader asks for the next one: it has this one


def counted(llm, monkeypatch):
    """Steps that go through the vision graph."""
    steps, vision = [], llm._backend.vision
    monkeypatch.setattr(
        llm._backend, "vision", lambda frames, done: (steps.append(frames.shape[0]), vision(frames, done))[1]
    )
    return steps


def assert_same(answer, alone):
    assert (answer.ids, answer.text, answer.finish) == (alone.ids, alone.text, alone.finish)
    assert (answer.kept, answer.total, answer.prompt_tokens) == (alone.kept, alone.total, alone.prompt_tokens)
    for name in ("frames", "seconds", "indices", "merged", "segments"):
        np.testing.assert_array_equal(getattr(answer, name), getattr(alone, name))
    np.testing.assert_allclose(answer.salience, alone.salience, rtol=1e-5)  # other steps were in a pass with these


def test_every_window_is_answered_as_a_clip_of_its_frames(llm, monkeypatch):
    stream = pairs(scene(11))
    steps = counted(llm, monkeypatch)
    answers = list(llm.watch(stream, QUESTION, window=4, step=2.0, max_new_tokens=6))
    assert sum(steps) == 11
    assert [answer.live.end for answer in answers] == [2.0, 4.0, 6.0, 8.0, 10.0]
    for answer in answers:
        seen = [timed for timed in stream if timed[0] <= answer.live.end][-4:]
        assert (answer.live.begin, answer.live.frames, answer.live.lag) == (seen[0][0], len(seen), None)
        assert_same(answer, llm.generate(seen, QUESTION, frames=len(seen), max_new_tokens=6))


def test_windows_of_pairs_and_of_any_size(qwen, monkeypatch):
    stream = pairs(scene(9, 60, 90), interval=0.5)
    steps = counted(qwen, monkeypatch)
    answers = list(qwen.watch(stream, QUESTION, window=4, step=1.0, fps=2.0, max_new_tokens=6))
    assert sum(steps) == 4  # the ninth frame has no partner
    assert [answer.live.frames for answer in answers] == [2, 4, 4, 4]
    for answer in answers[1:]:
        seen = [timed for timed in stream if timed[0] <= answer.live.end][-4:]
        assert_same(answer, qwen.generate(seen, QUESTION, max_new_tokens=6))


def test_questions_about_one_window_read_it_once(llm, monkeypatch):
    with llm.live(pairs(scene(4)), window=4, prune=False) as live:
        first = live.ask(QUESTION, max_new_tokens=4)
        steps = counted(llm, monkeypatch)
        second = live.ask("Who?", max_new_tokens=4)
    assert list(first.stages) == ["prefill", "decode"]
    assert steps == []
    assert second.ids == llm.generate(pairs(scene(4)), "Who?", prune=False, max_new_tokens=4).ids


def test_a_camera_faster_than_the_model_loses_its_oldest_frames(llm, monkeypatch):
    camera, frames = Camera(), scene(12)
    with llm.live(camera, window=4) as live:
        steps = counted(llm, monkeypatch)
        camera.give(*pairs(frames[:10]))
        camera.end()
        answer = live.ask(QUESTION, max_new_tokens=6)
        assert (answer.live.begin, answer.live.end, answer.live.dropped) == (6.0, 9.0, 6)
        assert answer.live.lag > 0
        assert steps == [4]
    assert answer.ids == llm.generate(pairs(frames[6:10]), QUESTION, max_new_tokens=6).ids


def test_memory_of_a_camera_does_not_grow(tiny_bundle, monkeypatch):
    llm = on_cuda(VideoLLM(tiny_bundle, "ort-cpu"), monkeypatch)
    from tango_runtime.backends.cuda.device import cudart

    held = []
    for answer in llm.watch(pairs(scene(40)), QUESTION, window=4, step=1.0, max_new_tokens=2):
        held.append(cudart().held())
        assert answer.frames.shape[0] <= 4
    assert len(set(held[8:])) == 1


def test_a_frame_may_be_reused_by_its_camera(llm):
    def camera():
        buffer = np.zeros((36, 64, 3), np.uint8)
        for seconds, frame in pairs(scene(4)):
            buffer[:] = frame
            yield seconds, buffer

    with llm.live(camera(), window=4) as live:
        while live.take_in():
            pass
        assert live.ask(QUESTION, max_new_tokens=6).ids == llm.generate(pairs(scene(4)), QUESTION, max_new_tokens=6).ids


@pytest.mark.parametrize(("fps", "taken"), [(1.0, [0, 4, 8]), (2.0, [0, 2, 4, 6, 8]), (3.0, [0, 2, 3, 4, 6, 7, 8])])
def test_frames_are_taken_at_a_rate(llm, fps, taken):
    frames = scene(9)
    with llm.live(iter(pairs(frames, begin=7.0, interval=0.25)), window=12, fps=fps, drop=False) as live:
        while live.take_in():
            pass
        shown = live.session().frames
    expected = llm.session(pairs(frames[taken]), frames=len(taken)).frames
    np.testing.assert_array_equal(shown, expected)


class Numbered:
    """A camera that numbers the frames that it chose, and must be entered."""

    entered = closed = False

    def __enter__(self):
        self.entered = True
        return self

    def __exit__(self, *error):
        self.closed = True

    def __iter__(self):
        assert self.entered
        for number, seconds in ((0, 0.0), (1, 1.02), (2, 1.98), (5, 5.0)):
            yield number, seconds, scene(6)[number]


def test_frames_that_a_camera_chose_are_all_taken_and_those_that_it_lost_counted(llm):
    camera = Numbered()
    with llm.live(camera, window=4) as live:
        while live.take_in():
            pass
        answer = live.ask(QUESTION, max_new_tokens=2)
    assert (answer.live.frames, answer.live.dropped, camera.closed) == (4, 2, True)


def test_an_address_is_a_live_source(llm, monkeypatch):
    """The address of a stream is read by a LiveSource at the rate, and closed with the window."""
    shown = FakeCamera(ends=True)
    for seconds, frame in pairs(scene(6), interval=0.5):
        shown.show(seconds, frame)
    shown.end()
    monkeypatch.setattr(feed, "LiveSource", lambda address, **options: LiveSource(shown, lossless=True, **options))
    with llm.live("rtsp://camera/", window=4, fps=1.0) as live:
        while live.take_in():
            pass
        answer = live.ask(QUESTION, max_new_tokens=6)
    wanted = llm.generate(pairs(scene(6)[::2]), QUESTION, frames=3, max_new_tokens=6)
    assert (answer.ids, answer.live.frames, answer.live.dropped) == (wanted.ids, 3, 0)


def test_a_file_and_a_folder_of_times_are_streams_too(llm, clip):
    answers = list(llm.watch(clip, QUESTION, window=4, step=3.0, max_new_tokens=2))
    assert [round(answer.live.end) for answer in answers] == [3, 6, 7]


def test_gaps_and_clocks_are_reported_and_survived(llm, caplog):
    frames = scene(12)
    times = [0, 1, 2, 3, 7, 8, 30, 31, 5, 6, 7, 8]
    answers = list(llm.watch(list(zip(times, frames, strict=True))[:8], QUESTION, window=4, step=1.0, max_new_tokens=4))
    assert answers[3].live.gaps == 1  # a short one: the window goes on
    assert (answers[3].live.begin, answers[3].live.end) == (1.0, 7.0)
    assert (answers[5].live.begin, answers[5].live.end, answers[5].live.gaps) == (30.0, 30.0, 2)
    with llm.live(iter(zip(times, frames, strict=True)), window=4, drop=False) as live:
        while live.take_in():
            pass
        assert live.window.gaps == 3
        answer = live.ask(QUESTION, max_new_tokens=4)
    assert answer.ids == llm.generate(pairs(frames[8:]), QUESTION, max_new_tokens=4).ids
    assert "it paused from 3.0 to 7.0 s" in caplog.text
    assert "it paused from 8.0 to 30.0 s; the window begins anew" in caplog.text
    assert "its clock stepped back from 31.0 to 5.0 s; the window begins anew" in caplog.text


@pytest.fixture
def mixed():
    """A stream whose frames change their size."""
    return [*pairs(scene(4, 36, 64)), *pairs(scene(4, 80, 60), begin=4.0)]


def test_a_changed_resolution_is_survived(llm, mixed, caplog):
    answers = list(llm.watch(mixed, QUESTION, window=4, step=1.0, max_new_tokens=4))
    assert_same(answers[4], llm.generate(mixed[2:6], QUESTION, frames=4, max_new_tokens=4))
    assert "its frames are 80x60 in place of 36x64" in caplog.text


def test_frames_of_another_size_for_the_model_begin_the_window_anew(qwen, mixed, caplog):
    answers = list(qwen.watch(mixed, QUESTION, window=4, step=1.0, max_new_tokens=4))
    assert answers[-1].live.begin == 4.0
    assert_same(answers[-1], qwen.generate(mixed[4:], QUESTION, max_new_tokens=4))
    assert "; the window begins anew" in caplog.text


def test_a_camera_that_stops_is_reported_until_it_goes_on(llm, monkeypatch, caplog):
    monkeypatch.setattr(live_module, "_PATIENCE", 0.01)
    camera = Camera()
    with llm.live(camera, window=4) as live:
        answers = live.watch(QUESTION, step=1.0, max_new_tokens=2)
        threading.Timer(0.05, lambda: (camera.give(*pairs(scene(2))), camera.end())).start()
        assert next(answers).live.end == 1.0
        assert "no frame has come for" in caplog.text
        assert next(answers, None) is None


def test_what_a_camera_raises_is_raised_after_its_frames(llm):
    camera = Camera()
    with llm.live(camera, window=4) as live:
        camera.give(*pairs(scene(2)))
        camera.end(OSError("the cable"))
        answers = live.watch(QUESTION, step=1.0, max_new_tokens=2)
        assert next(answers).live.end == 1.0
        with pytest.raises(OSError, match="the cable"):
            next(answers)


def test_an_answer_goes_on_while_the_window_does(llm):
    frames = pairs(scene(6))
    with llm.live(iter(frames), window=4, drop=False) as live:
        stream = live.stream(QUESTION, max_new_tokens=8)
        text = next(stream)
        live.take_in()
        live.ask("Who?", max_new_tokens=2)
        text += "".join(stream)
    assert text == llm.generate(frames[:4], QUESTION, max_new_tokens=8).text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "the window has 0 frames"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"retention_ratio": 2}, "retention"),
    ],
)
def test_wrong_settings_are_named_at_once(tiny_bundle, options, message):
    with pytest.raises(TangoError, match=message):
        VideoLLM(tiny_bundle, "ort-cpu").live(pairs(scene(4)), **options)


def test_a_window_of_half_a_pair_is_refused(responsive_qwen):
    llm = VideoLLM(responsive_qwen()[1], "ort-cpu")
    with pytest.raises(TangoError, match="the window has 5 frames"):
        llm.live(pairs(scene(6)), window=5)


def test_a_stream_without_frames_and_a_closed_one_say_so(llm):
    with llm.live(iter([]), window=4) as live, pytest.raises(TangoError, match="no whole step"):
        live.ask(QUESTION)
    with pytest.raises(TangoError, match="the stream is closed"):
        live.ask(QUESTION)
    with pytest.raises(TangoError, match=r"item 0 is not a \(seconds, frame\) pair"):
        next(llm.watch([1, 2], QUESTION))
    with pytest.raises(TangoError, match="step is 0"):
        next(llm.watch(pairs(scene(4)), QUESTION, step=0))


def test_a_video_that_is_encoded_is_asked_at_any_ratio(llm, frames, monkeypatch):
    video = llm.encode(frames, frames=8)
    steps = counted(llm, monkeypatch)
    for ratio in (0.1, 0.5):
        with llm.session(video, retention_ratio=ratio) as session:
            answer = session.ask(QUESTION, max_new_tokens=6)
            assert list(answer.stages) == ["prune", "prefill", "decode"]
            found = list(steps)
            alone = llm.generate(frames, QUESTION, frames=8, retention_ratio=ratio, max_new_tokens=6)
            assert_same(answer, alone)
            assert found == steps[: len(found)]
    assert len(steps) == 2  # those of generate
    with pytest.raises(TangoError, match="has its frames already"):
        llm.session(video, frames=4)
    with pytest.raises(TangoError, match="another model"):
        VideoLLM(llm.bundle, "ort-cpu").session(video)


def test_a_chat_that_the_caller_keeps_is_the_sessions(llm, frames):
    with llm.session(frames) as session:
        first, second = (session.chat(text, max_new_tokens=5) for text in ("What happens?", "And then?"))
    with llm.session(frames) as session:
        again = session.stream("And then?", history=[("What happens?", first.text)], max_new_tokens=5)
        assert list(again)
        _, text = session.encode("And then?", history=[("What happens?", first.text)])
    prompt = llm._prompt
    assert text == [
        *prompt.encode("What happens?")[1],
        *prompt._ids(first.text),
        *prompt.follow_up("And then?"),
    ]
    if prompt._ids(first.text).tolist() == first.ids:
        assert again.answer.ids == second.ids
