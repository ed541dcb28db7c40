"""Requests that are answered at a time share decode steps, and get what each would get alone."""

from __future__ import annotations

import threading

import pytest

from tango_runtime import VideoLLM
from tango_runtime.server.settings import Settings
from tests.fakes.together import TogetherBackend
from tests.runtime.server.serving import asked, running
from tests.runtime.server.test_server_limits import Gate, eventually

QUESTIONS = ["What happens?", "Who is it?", "Where is it?", "Why?"]


@pytest.fixture
def served(tiny_bundle, media_root):
    """A server whose backend decodes up to four sequences in a step."""
    bundle = VideoLLM(tiny_bundle, "ort-cpu").bundle
    model = VideoLLM(bundle, TogetherBackend(bundle), sequences=4)
    with running({"tiny": model}, Settings(media_root=media_root, decoders=1)) as found:
        yield found


def steps(served):
    return served.service.answerer.models["tiny"]._backend.steps


def ask_all(served, monkeypatch, bodies):
    """Asks at a time: the model's thread waits for all requests before it decodes."""
    results, gate = [None] * len(bodies), Gate(served, monkeypatch)

    def ask(i):
        results[i] = served.http().post("/v1/chat/completions", json=bodies[i]).json()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    worker = served.service.worker
    eventually(lambda: worker.running + worker.waiting == len(bodies))
    steps(served).clear()
    gate.opened.set()
    for thread in threads:
        thread.join()
    return results


def text(result):
    return result["choices"][0]["message"]["content"]


def test_questions_about_one_video_share_steps(served, llm, clip, monkeypatch):
    found = ask_all(served, monkeypatch, [asked(question) for question in QUESTIONS])
    assert [text(each) for each in found] == [llm.generate(clip, q, max_new_tokens=8).text for q in QUESTIONS]
    assert max(steps(served)) == 4


def test_questions_about_several_videos_share_steps(served, llm, clip, monkeypatch):
    ratios = 0.2, 0.4, 0.6, 0.8
    found = ask_all(served, monkeypatch, [asked(retention_ratio=ratio) for ratio in ratios])
    wanted = [llm.generate(clip, "What happens?", retention_ratio=ratio, max_new_tokens=8).text for ratio in ratios]
    assert [text(each) for each in found] == wanted
    assert max(steps(served)) == 4


def test_an_answer_that_ends_early_leaves_the_others(served, llm, clip, monkeypatch):
    lengths = 2, 8, 8, 5
    whole = llm.generate(clip, QUESTIONS[2], max_new_tokens=8).text
    bodies = [asked(q, max_tokens=length) for q, length in zip(QUESTIONS, lengths, strict=True)]
    bodies[2]["stop"] = whole[1:3]
    found = ask_all(served, monkeypatch, bodies)
    wanted = [llm.generate(clip, q, max_new_tokens=n).text for q, n in zip(QUESTIONS, lengths, strict=True)]
    wanted[2] = whole[: whole.index(whole[1:3])]
    assert [text(each) for each in found] == wanted
    assert found[2]["choices"][0]["finish_reason"] == "stop"


def test_a_failed_step_is_an_error_of_its_requests_alone(served, llm, clip, monkeypatch):
    served.service.answerer.models["tiny"]._backend.failures = 1
    found = ask_all(served, monkeypatch, [asked(question) for question in QUESTIONS])
    assert any("error" in each for each in found)
    assert all("the device failed" in each["error"]["message"] for each in found if "error" in each)
    again = ask_all(served, monkeypatch, [asked(question) for question in QUESTIONS])
    assert [text(each) for each in again] == [llm.generate(clip, q, max_new_tokens=8).text for q in QUESTIONS]
