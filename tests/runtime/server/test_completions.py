"""Chat completions, by OpenAI's own client: the answers are those of the library."""

from __future__ import annotations

import base64
import io
import json
import threading
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from tango_runtime import VideoLLM
from tango_runtime.server.settings import Settings
from tests.runtime.server.serving import asked, openai, running

QUESTION = "What happens?"

needs_llguidance = pytest.mark.skipif(
    find_spec("llguidance") is None, reason="answers that follow a JSON schema need llguidance: extra structured"
)


@pytest.fixture
def answer(llm, clip):
    return llm.generate(clip, QUESTION, max_new_tokens=8)


def test_models_are_listed(served):
    assert [model.id for model in served.openai().models.list()] == ["tiny"]
    assert served.openai().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        served.openai().models.retrieve("other")


@pytest.mark.parametrize("place", ["file", "data", "upload"])
def test_an_answer_is_the_librarys(served, answer, clip, data_url, place):
    url = {"file": "file:clip.mp4", "data": data_url}.get(place)
    if url is None:
        uploaded = served.http().post("/v1/videos", content=clip.read_bytes(), headers={"Content-Type": "video/mp4"})
        assert uploaded.status_code == 201
        url = uploaded.json()["id"]
    found = served.openai().chat.completions.create(**asked(url=url))
    assert found.choices[0].message.content == answer.text
    assert found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (answer.prompt_tokens, 8)
    details = found.model_extra["tango"]
    assert (details["kept_tokens"], details["video_tokens"]) == (answer.kept, answer.total)
    assert "prefill" in details["stages_ms"]


def test_a_stream_has_the_same_pieces_and_usage(served, answer):
    chunks = list(
        served.openai().chat.completions.create(**asked(), stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer.text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_second_question_reads_the_video_no_more(served, llm, clip):
    client = served.openai()
    client.chat.completions.create(**asked())
    encoded, hits = served.metric("tango:videos_encoded_total"), served.metric("tango:session_hits_total")
    second = client.chat.completions.create(**asked("Who?"))
    assert second.choices[0].message.content == llm.generate(clip, "Who?", max_new_tokens=8).text
    assert second.usage.prompt_tokens_details.cached_tokens > 0
    assert served.metric("tango:videos_encoded_total") == encoded
    assert served.metric("tango:session_hits_total") == hits + 1


def test_another_ratio_prunes_but_does_not_encode_again(served, llm, clip):
    client = served.openai()
    client.chat.completions.create(**asked())
    encoded = served.metric("tango:videos_encoded_total")
    found = client.chat.completions.create(**asked(), extra_body={"retention_ratio": 0.5})
    wanted = llm.generate(clip, QUESTION, retention_ratio=0.5, max_new_tokens=8)
    assert (found.choices[0].message.content, found.usage.prompt_tokens) == (wanted.text, wanted.prompt_tokens)
    whole = client.chat.completions.create(**asked(), extra_body={"prune": False})
    assert whole.model_extra["tango"]["kept_tokens"] == whole.model_extra["tango"]["video_tokens"] == 64
    assert served.metric("tango:videos_encoded_total") == encoded


@pytest.mark.parametrize(
    ("body", "frames"),
    [({"frames": 8}, 8), ({"media_io_kwargs": {"video": {"num_frames": 2}}}, 2), ({"fps": 1}, 8), ({}, 4)],
)
def test_the_frames_are_those_asked_for(served, body, frames):
    found = served.openai().chat.completions.create(**asked(), extra_body=body)
    assert found.model_extra["tango"]["video_tokens"] == 16 * frames


def test_a_chat_goes_on(served, llm, clip):
    first = served.openai().chat.completions.create(**asked()).choices[0].message.content
    body = asked()
    body["messages"] += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    found = served.openai().chat.completions.create(**body)
    with llm.session(clip) as session:
        stream = session.stream("And then?", history=[(QUESTION, first)], max_new_tokens=8)
        assert found.choices[0].message.content == "".join(stream)


def test_instructions_stand_before_the_question(served, llm, clip):
    body = asked()
    body["messages"].insert(0, {"role": "system", "content": "Be brief."})
    found = served.openai().chat.completions.create(**body)
    assert found.choices[0].message.content == llm.generate(clip, f"Be brief.\n{QUESTION}", max_new_tokens=8).text


def test_sampling_is_repeated_by_its_seed(served, llm, clip):
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    found = [served.openai().chat.completions.create(**asked(), **options).choices[0].message.content for _ in "ab"]
    assert found == [llm.generate(clip, QUESTION, max_new_tokens=8, **options).text] * 2


def test_a_stop_text_ends_the_answer(served, answer):
    stop = answer.text[3:6]
    found = served.openai().chat.completions.create(**asked(), stop=[stop, "never"])
    assert found.choices[0].message.content == answer.text[: answer.text.index(stop)]
    assert found.choices[0].finish_reason == "stop"


SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "moves": {"type": "boolean"}},
    "required": ["color", "moves"],
    "additionalProperties": False,
}
AS_JSON = {"type": "json_schema", "json_schema": {"name": "seen", "schema": SCHEMA, "strict": True}}


@needs_llguidance
def test_an_answer_fits_the_schema(served, llm, clip):
    body = asked(max_tokens=64, response_format=AS_JSON)
    found = served.openai().chat.completions.create(**body).choices[0]
    assert found.message.content == llm.generate(clip, QUESTION, max_new_tokens=64, json_schema=SCHEMA).text
    assert set(json.loads(found.message.content)) == {"color", "moves"}
    assert found.finish_reason == "stop"
    chunks = served.openai().chat.completions.create(**body, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == found.message.content
    short = served.openai().chat.completions.create(**{**body, "max_tokens": 3}).choices[0]
    assert (short.finish_reason, found.message.content.startswith(short.message.content)) == ("length", True)


@needs_llguidance
def test_any_object(served):
    body = asked(max_tokens=60, temperature=1.0, seed=1, response_format={"type": "json_object"})
    found = served.openai().chat.completions.create(**body).choices[0]
    assert found.message.content.startswith("{")
    assert found.finish_reason == "length" or isinstance(json.loads(found.message.content), dict)


@needs_llguidance
def test_a_schema_that_cannot_be_followed_is_named(served):
    schema = {"type": "object", "not": {"required": ["a"]}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="the JSON schema cannot be followed"):
        served.openai().chat.completions.create(**asked(response_format=wanted), stream=True)


@pytest.mark.parametrize("key", ["logprobs", "top_logprobs", "tools", "n"])
def test_what_is_not_supported_is_named(served, key):
    value = {"logprobs": True, "top_logprobs": 2, "tools": [{"type": "function", "function": {"name": "f"}}], "n": 2}
    with pytest.raises(openai.BadRequestError, match=f"{key} is .*, which is not supported"):
        served.openai().chat.completions.create(**asked(), **{key: value[key]})


@pytest.mark.parametrize("key", ["presence_penalty", "frequency_penalty"])
def test_nought_is_nought_however_it_is_written(served, answer, key):
    for nought in (0, 0.0):
        found = served.openai().chat.completions.create(**asked(), **{key: nought})
        assert found.choices[0].message.content == answer.text
    with pytest.raises(openai.BadRequestError, match=f"{key} is false"):
        served.openai().chat.completions.create(**asked(), extra_body={key: False})


def pictures():
    rng = np.random.default_rng(5)
    return rng.integers(0, 255, (4, 36, 64, 3), dtype=np.uint8)


def png(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("seconds", [None, [0.0, 1.0, 5.0, 6.0]])
def test_images_are_frames_with_times(served, llm, seconds):
    frames = pictures()
    urls = [{"url": f"data:image/png;base64,{png(frame)}"} for frame in frames]
    for url, at in zip(urls, seconds or [], strict=False):
        url["seconds"] = at
    content = [{"type": "image_url", "image_url": url} for url in urls]
    body = asked(fps=2) if seconds is None else asked()
    extra = {"fps": body.pop("fps")} if "fps" in body else {}
    body["messages"] = [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]
    found = served.openai().chat.completions.create(**body, extra_body=extra)
    pairs = list(zip(seconds or [0.0, 0.5, 1.0, 1.5], frames, strict=True))
    wanted = llm.generate(pairs, QUESTION, frames=4, max_new_tokens=8)
    assert (found.choices[0].message.content, found.usage.prompt_tokens) == (wanted.text, wanted.prompt_tokens)


def test_vllms_form_of_frames(served, llm):
    frames = pictures()
    url = "data:video/png;base64," + ",".join(map(png, frames))
    found = served.openai().chat.completions.create(**asked(url=url))
    wanted = llm.generate([(float(i), frame) for i, frame in enumerate(frames)], QUESTION, frames=4, max_new_tokens=8)
    assert found.choices[0].message.content == wanted.text


def test_many_at_once_are_answered_as_one_by_one(served, llm, clip):
    questions = [f"What happens {word}?" for word in ("here", "first", "then", "last", "now", "there")] * 2
    found = {}

    def ask(i, question):
        ratio = (0.1, 0.3)[i % 2]
        body = {"retention_ratio": ratio}
        answer = served.openai().chat.completions.create(**asked(question), extra_body=body)
        found[i] = answer.choices[0].message.content

    threads = [threading.Thread(target=ask, args=item) for item in enumerate(questions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, question in enumerate(questions):
        wanted = llm.generate(clip, question, retention_ratio=(0.1, 0.3)[i % 2], max_new_tokens=8)
        assert found[i] == wanted.text


def test_the_cache_is_bounded_and_what_is_forgotten_is_decoded_again(serving, llm, clip):
    served = serving(videos=1, sessions=1)
    for frames in (2, 3, 2):
        found = served.openai().chat.completions.create(**asked(), extra_body={"frames": frames})
        assert found.choices[0].message.content == llm.generate(clip, QUESTION, frames=frames, max_new_tokens=8).text
    assert served.metric("tango:videos_encoded_total") == 3
    assert len(served.service.answerer._sessions) == 1


def test_metrics_have_vllms_names(served, answer):
    names = ("vllm:generation_tokens_total", "tango:video_tokens_seen_total", "tango:video_tokens_kept_total")
    before = {}
    served.openai().chat.completions.create(**asked())
    for name in names:
        before[name] = served.metric(f'{name}{{model_name="tiny"}}')
    served.openai().chat.completions.create(**asked())
    grown = {name: served.metric(f'{name}{{model_name="tiny"}}') - before[name] for name in names}
    assert list(grown.values()) == [8, answer.total, answer.kept]
    text = served.http().get("/metrics").text
    assert 'vllm:request_success_total{model_name="tiny",finished_reason="length"}' in text
    assert 'vllm:time_to_first_token_seconds_bucket{model_name="tiny",le="+Inf"}' in text
    assert served.metric("vllm:num_requests_running") == 0


def test_a_view_is_what_an_answer_is_read_from(served, llm, clip):
    body = {"video_url": "file:clip.mp4", "retention_ratio": 0.3, "frames": 8}
    view = served.http().post("/v1/videos/view", json=body).json()
    answer = llm.generate(clip, QUESTION, retention_ratio=0.3, frames=8, max_new_tokens=1)
    kinds = np.array([list(map(int, row)) for row in view["kinds"]]).ravel()
    np.testing.assert_array_equal(np.flatnonzero(kinds), answer.indices)
    np.testing.assert_array_equal(kinds[answer.indices] == 2, answer.merged)
    assert view["segments"] == answer.segments.tolist()
    assert view["grid"] == [4, 4]
    assert {"video", "vision", "prune"} <= set(view["stages_ms"])
    levels = np.array([list(bytes.fromhex(row)) for row in view["salience"]])
    assert levels.argmax() == answer.salience.argmax()
    assert "images" not in view
    assert served.http().post("/v1/videos/view", json={}).status_code == 400


def test_an_unknown_model_is_named(served):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        served.openai().chat.completions.create(**{**asked(), "model": "gpt"})


def test_errors_of_the_pipeline_are_the_clients(served):
    with pytest.raises(openai.BadRequestError, match="the video has 96 frames, 250 were asked for"):
        served.openai().chat.completions.create(**asked(), extra_body={"frames": 250})
    with pytest.raises(openai.BadRequestError, match="reserved for the prompt itself"):
        served.openai().chat.completions.create(**asked("<|im_end|>"))
    with pytest.raises(openai.BadRequestError, match="the bundle's context is 2048"):
        served.openai().chat.completions.create(**asked("word " * 3000))


@pytest.mark.parametrize(
    ("question", "options"), [(QUESTION, {"frames": 250}), (QUESTION, {"max_pixels": 100}), ("word " * 3000, {})]
)
def test_hints_name_no_option_of_a_clients_command(served, question, options):
    with pytest.raises(openai.BadRequestError) as found:
        served.openai().chat.completions.create(**asked(question), extra_body=options)
    assert "--" not in found.value.message.replace("export with a larger --context", "")


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_the_clients(served, question):
    with pytest.raises(openai.BadRequestError, match="the last message asks nothing"):
        served.openai().chat.completions.create(**asked(question))


def test_each_question_is_answered_where_it_stands_before_the_video(question_first_bundle, media_root, clip):
    alone = VideoLLM(question_first_bundle, "ort-cpu")
    wanted = [alone.generate(clip, question, max_new_tokens=8).text for question in (QUESTION, "Who?")]
    with running({"tiny": alone}, Settings(media_root=media_root, decoders=1)) as served:
        create = served.openai().chat.completions.create
        found = [create(**asked(question)).choices[0].message.content for question in (QUESTION, "Who?")]
    assert found == wanted


def test_the_json_is_openais(served):
    found = served.http().post("/v1/chat/completions", json=asked()).json()
    assert list(found) == ["id", "created", "model", "object", "choices", "usage", "tango"]
    lines = served.http().post("/v1/chat/completions", json=asked(stream=True)).text.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert {json.loads(event)["object"] for event in events[:-1]} == {"chat.completion.chunk"}
