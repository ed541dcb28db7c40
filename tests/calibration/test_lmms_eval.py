"""The model for lmms-eval, with a stand-in for that package; tests/packaging runs the released one."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.batch.decoding import Decoders

MODEL = "tango_calibration.lmms_eval.model"


@dataclass
class TokenCounts:
    input_tokens: int
    output_tokens: int


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    chat_class_path: str


class Model:
    def __init__(self):
        self.task_dict = {}


@dataclass
class Instance:
    args: tuple
    task_name: str = "quiz"
    resps: list = field(default_factory=list)


@pytest.fixture
def lmms_eval(monkeypatch):
    """Stands in for lmms-eval's modules."""
    found = {
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": Model},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models", *found):
        module = ModuleType(name)
        vars(module).update(found.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delitem(sys.modules, MODEL, raising=False)
    yield
    sys.modules.pop(MODEL, None)


@pytest.fixture
def opened(lmms_eval, tiny_bundle):
    """``opened(**model_args)``: the model, as lmms-eval opens it from the manifest."""

    def call(**given):
        from tango_calibration.lmms_eval import manifest

        found = manifest()
        module, _, name = found.chat_class_path.rpartition(".")
        assert (found.model_id, module) == ("tango", MODEL)
        model = getattr(importlib.import_module(module), name)
        assert model.is_simple is False
        return model(**{"bundle": str(tiny_bundle), "decoders": 0, "batch_size": 1, **given})

    return call


def asked(model, *docs):
    """Requests of a task with documents of (messages, generation parameters)."""
    model.task_dict = {"quiz": {"test": [messages for messages, _ in docs]}}
    return [
        Instance(("context", lambda messages: messages, dict(options), i, "quiz", "test"))
        for i, (_, options) in enumerate(docs)
    ]


def about(video, question, **options):
    video = {"type": "video", "url": str(video)}
    return [{"role": "user", "content": [video, {"type": "text", "text": question}]}], {"max_new_tokens": 6, **options}


def test_answers_are_the_session_s_in_the_order_of_the_requests(opened, llm, clip, tmp_path, monkeypatch):
    other = tmp_path / "other.mp4"
    other.write_bytes(clip.read_bytes())
    model = opened(retention_ratio=0.5, frames=5)
    decoded, seen = [], []
    submit, session = Decoders.submit, VideoLLM.session
    monkeypatch.setattr(Decoders, "submit", lambda *given: (decoded.append(given[1]), submit(*given))[1])
    monkeypatch.setattr(VideoLLM, "session", lambda *given, **more: (seen.append(more), session(*given, **more))[1])
    found = model.generate_until(
        asked(model, about(clip, "Who?"), about(other, "What?"), about(clip, "Where?", max_new_tokens=3))
    )
    monkeypatch.undo()
    assert decoded == [clip, other]
    assert [more["retention_ratio"] for more in seen] == [0.5, 0.5]
    for result, question, count in zip(found, ("Who?", "What?", "Where?"), (6, 6, 3), strict=True):
        answer = llm.generate(clip, question, retention_ratio=0.5, frames=5, max_new_tokens=count)
        assert result.text == answer.text
        assert result.token_counts == TokenCounts(answer.prompt_tokens, len(answer.ids))


def test_generation_parameters_are_honored(opened, llm, clip):
    model = opened(prune=False)
    whole = llm.generate(clip, "Who?", prune=False, max_new_tokens=12).text
    stop = whole[len(whole) // 2 :][:2]
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    first, second, third = model.generate_until(
        asked(
            model,
            about(clip, "Who?", max_new_tokens=12, until=["\n\n\n", stop], num_beams=1, image_aspect_ratio="original"),
            about(clip, "Who?", max_new_tokens=12, do_sample=False, **options | {"top_p": 0}),
            about(clip, "Who?", max_new_tokens=12, **options),
        )
    )
    assert first.text == whole[: whole.index(stop)]
    assert second.text == whole
    assert third.text == llm.generate(clip, "Who?", prune=False, max_new_tokens=12, **options).text


def test_images_are_the_frames_of_a_video(opened, llm, frames):
    model = opened()
    parts = [{"type": "image", "url": Image.fromarray(frame)} for frame in frames]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [*parts, {"type": "text", "text": "Who?"}]},
    ]
    (found,) = model.generate_until(asked(model, (messages, {"max_new_tokens": 6})))
    assert found.text == llm.generate(frames, "Be brief.\nWho?", fps=1, max_new_tokens=6).text
    parts[0] = {"type": "image", "url": Image.fromarray(np.zeros((9, 9, 3), np.uint8))}
    with pytest.raises(TangoError, match="differ in size"):
        model.generate_until(asked(model, ([*messages[1:], {"role": "user", "content": parts}], {})))


def part(**more):
    return [{"role": "user", "content": [{"type": "text", "text": "Who?"}, more]}], {}


def test_what_cannot_be_done_is_an_error(opened):
    model = opened()
    for doc, message in (
        (about("nowhere.mp4", "Who?"), "nowhere.mp4 does not exist"),
        (about(".", "Who?", num_beams=5), "num_beams 5, which is not supported"),
        (part(type="audio", url="a.wav"), "the task has audio"),
        (part(type="text", text="Where?"), "0 videos and 0 images"),
        (part(type="video", url=".", start_time=3.0), "a part of a video"),
        (part(type="video", url={"video_start": 1}), "a part of a video"),
        (([{"role": "assistant", "content": []}], {}), "a message of the assistant"),
    ):
        with pytest.raises(TangoError, match=message):
            model.generate_until(asked(model, doc))


def test_a_damaged_video_is_an_error_and_no_wrong_answer(opened, clip, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[:5000])
    model = opened()
    with pytest.raises(TangoError, match=r"cut\.mp4 is truncated"):
        model.generate_until(asked(model, about(clip, "Who?"), about(cut, "Who?")))


def test_there_may_be_nothing_to_answer(opened):
    assert opened(decoders=1).generate_until([]) == []  # as where lmms-eval has all answers in its cache


def test_other_kinds_of_requests_are_refused(opened):
    model = opened()
    for ask, message in ((model.loglikelihood, "log-likelihoods"), (model.generate_until_multi_round, "rounds")):
        with pytest.raises(TangoError, match=message):
            ask([SimpleNamespace()])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bundle": "nowhere"}, "nowhere"),
        ({"retention_ratio": 2}, "retention_ratio"),
        ({"device": "cuda:0"}, "--device cuda:0 is not supported"),
    ],
)
def test_wrong_arguments_are_errors(opened, given, message):
    with pytest.raises(TangoError, match=message):
        opened(**given)


def test_several_processes_are_refused(opened, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TangoError, match="several processes"):
        opened()
