"""How much of the time the model works is what the progress line says of it."""

from __future__ import annotations

from contextlib import closing
from types import SimpleNamespace

import pytest

from tango_runtime import Session, VideoLLM
from tango_runtime.batch import run, worker
from tango_runtime.batch.decoding import Decoders
from tango_runtime.batch.questions import AskedVideo, Question
from tango_runtime.batch.worker import SamplingOptions, Settings, Task, Worker


def test_the_share_is_the_time_in_the_model(tiny_bundle, clip, monkeypatch):
    """By a clock that goes on where the test says so: two videos with two questions each, one of them at two ratios."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    for module in (run, worker):
        monkeypatch.setattr(module, "time", clock)

    def takes(owner, name, seconds):
        function = getattr(owner, name)

        def slow(*given, **options):
            now[0] += seconds
            return function(*given, **options)

        monkeypatch.setattr(owner, name, slow)

    takes(Decoders, "submit", 30)  # in this process, so the model waits
    takes(VideoLLM, "encode", 7)
    takes(VideoLLM, "session", 3)
    takes(Session, "stream", 2)
    settings = Settings((tiny_bundle,), (0.25, 0.5), sampling=SamplingOptions(max_new_tokens=2))
    one, other = settings.trials()
    questions = (Question("1", "Who?", 1), Question("2", "What?", 2))
    video = AskedVideo("clip.mp4", clip, questions)
    tasks = [Task(video, ((one, questions),)), Task(video, ((one, questions), (other, questions)))]
    usage = run.Usage()
    with closing(Worker(settings)) as opened:
        opened.load()
        assert len(list(run.answer_here(opened, tasks, usage))) == 6
    assert usage.busy == (3 + 2 * 2) + (7 + 2 * (3 + 2 * 2))
    assert usage.seconds == 60 + usage.busy
    assert usage.share == pytest.approx(28 / 88)
