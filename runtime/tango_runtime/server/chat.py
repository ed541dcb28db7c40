"""The body of a chat completion → what is asked about which video; what cannot be done is refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from tango_plugins import PruneParams, TangoError
from tango_runtime.pipeline.structured import ANY_OBJECT, JsonSchema
from tango_runtime.server.errors import ApiError
from tango_runtime.util.jsonschema import shown
from tango_runtime.util.numbers import is_integer, is_number

_T = TypeVar("_T")

#: Keys that ask for something; with these values they ask for what is done anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "logprobs": (False, None),
    "top_logprobs": (0, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "modalities": (["text"], None),
}
#: Keys that change no answer.
_IGNORED = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}

_OPTIONS = {"frames", "fps", "seconds", "max_pixels", "retention_ratio", "prune", "media_io_kwargs"}
_KNOWN = {
    *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
    *("temperature", "top_p", "seed", "stop", "response_format"),
    *_OPTIONS,
}

#: Most messages, stop strings, and characters of all texts; largest time of an image.
_MESSAGES, _STOPS, _TEXT, _SECONDS = 1000, 16, 1 << 20, 1e12


@dataclass(frozen=True)
class VideoOptions:
    """What is said of a video's frames and tokens; None where nothing is.

    Attributes:
        frames: Frames sampled uniformly, or most of them at ``fps``.
        fps: Frames a second that are sampled.
        max_pixels: Most pixels of a frame.
        retention_ratio: Fraction of the video tokens kept.
        prune: False keeps every token.
        seconds: How long a camera is watched.
    """

    frames: int | None = None
    fps: float | None = None
    max_pixels: int | None = None
    retention_ratio: float | None = None
    prune: bool = True
    seconds: float | None = None


@dataclass(frozen=True)
class Media:
    """The video of a chat.

    Attributes:
        urls: Where it is: one video, or images that are its frames.
        images: Whether they are images.
        seconds: When each image is; None for images at the rate of the request's ``fps``.
    """

    urls: tuple[str, ...]
    images: bool = False
    seconds: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ChatRequest:
    """A question about a video.

    Attributes:
        model: The bundle's name.
        media: The video.
        options: Its frames and tokens.
        question: The last message.
        history: Messages before it, with their answers.
        stream: Whether pieces are sent as they come.
        include_usage: Whether a stream ends with the numbers of tokens.
        max_new_tokens: Most tokens of the answer.
        temperature: 0 is greedy.
        top_p: Nucleus of the sampling.
        seed: Seed of the sampling.
        stop: Texts that end the answer.
        json_schema: What the answer fits; None for any text.
    """

    model: str
    media: Media
    options: VideoOptions
    question: str
    history: tuple[tuple[str, str], ...]
    stream: bool
    include_usage: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    json_schema: JsonSchema | None


def parse_chat(body: object, max_images: int) -> ChatRequest:
    """Reads a request's body.

    Raises:
        ApiError: A key is unknown, or a value cannot be what it is.
    """
    data = as_object(body, "the body")
    for key in data:
        if key in _NEUTRAL:
            if not any(_same(data[key], value) for value in _NEUTRAL[key]):
                raise ApiError(400, f"{key} is {shown(data[key])}, which is not supported; leave it out", key)
        elif key not in _KNOWN | _IGNORED:
            raise ApiError(400, f"unknown key {key[:60]!r}", key[:60])
    media, turns = _read_messages(data.get("messages"), max_images)
    tokens = "max_tokens" if data.get("max_completion_tokens") is None else "max_completion_tokens"
    stream_options = as_object(data.get("stream_options") or {}, "stream_options", {"include_usage"})
    return ChatRequest(
        model=_take(data, "model", "", _A_TEXT),
        media=media,
        options=parse_options(data),
        question=turns[-1][0],
        history=tuple((question, answer) for question, answer in turns[:-1] if answer is not None),
        stream=_take(data, "stream", False, _A_FLAG),
        include_usage=_take(stream_options, "include_usage", False, _A_FLAG),
        max_new_tokens=_take(data, tokens, 128, _A_LENGTH),
        temperature=_take(data, "temperature", 0.0, _A_TEMPERATURE),
        top_p=_take(data, "top_p", 1.0, _A_SHARE),
        seed=_take(data, "seed", None, _A_SEED),
        stop=_read_stop(data.get("stop")),
        json_schema=_read_format(data.get("response_format")),
    )


def parse_options(data: Mapping[str, Any]) -> VideoOptions:
    """What a body says of a video's frames and tokens; vLLM's ``media_io_kwargs.video`` is another place for it.

    Raises:
        ApiError: A value is out of range.
    """
    kwargs = as_object(data.get("media_io_kwargs") or {}, "media_io_kwargs", {"video"})
    video = as_object(kwargs.get("video") or {}, "media_io_kwargs: video", {"num_frames", "fps"})
    ratio = _take(data, "retention_ratio", None, _A_SHARE)
    if ratio is not None:
        try:
            ratio = PruneParams(retention_ratio=ratio).retention_ratio
        except TangoError as error:
            raise ApiError(400, f"{error.message}; {error.hint}", "retention_ratio") from error
    frames = _take(data, "frames", None, _A_COUNT) or _take(video, "num_frames", None, _A_COUNT)
    fps = _take(data, "fps", None, _A_RATE) or _take(video, "fps", None, _A_RATE)
    return VideoOptions(
        frames,
        fps,
        _take(data, "max_pixels", None, _A_COUNT),
        ratio,
        _take(data, "prune", True, _A_FLAG),
        _take(data, "seconds", None, _A_DURATION),
    )


def as_object(value: object, name: str, keys: Collection[str] | None = None) -> Mapping[str, Any]:
    """A value that must be an object, with no other keys.

    Raises:
        ApiError: It is something else, or has one.
    """
    if not isinstance(value, dict):
        raise ApiError(400, f"{name} is {shown(value)}, not an object", name)
    for key in value:
        if keys is not None and key not in keys:
            raise ApiError(400, f"{name} has an unknown key {key[:60]!r}", name)
    return value


def take_text(data: Mapping[str, Any], key: str, default: _T) -> Any | _T:
    """The text of a key.

    Raises:
        ApiError: It is none.
    """
    return _take(data, key, default, _A_TEXT)


@dataclass(frozen=True)
class _Rule:
    """What a value may be.

    Attributes:
        wanted: It in words, after "not".
        holds: Whether a value is that.
    """

    wanted: str
    holds: Callable[[Any], bool]


_A_TEXT = _Rule(f"a text of up to {_TEXT} characters", lambda v: isinstance(v, str) and len(v) <= _TEXT)
_A_FLAG = _Rule("true or false", lambda v: isinstance(v, bool))
_A_COUNT = _Rule("a positive integer", lambda v: is_integer(v) and 1 <= v <= 1 << 31)
_A_RATE = _Rule("a number above 0 and at most 1000", lambda v: is_number(v) and 0 < v <= 1000)
_A_SHARE = _Rule("a number above 0 and at most 1", lambda v: is_number(v) and 0 < v <= 1)
_A_LENGTH = _Rule(f"an integer from 1 to {1 << 20}", lambda v: is_integer(v) and 1 <= v <= 1 << 20)
_A_TEMPERATURE = _Rule("a number from 0 to 100", lambda v: is_number(v) and 0 <= v <= 100)
_A_SEED = _Rule("an integer from 0 to 2^63 - 1", lambda v: is_integer(v) and 0 <= v < 1 << 63)
_A_DURATION = _Rule("a number of seconds above 0 and at most 3600", lambda v: is_number(v) and 0 < v <= 3600)


def _same(value: object, other: object) -> bool:
    """Whether two values are equal in JSON: 0 is 0.0, but not false."""
    return value == other and (type(value) is type(other) or (is_number(value) and is_number(other)))


def _take(data: Mapping[str, Any], key: str, default: _T, rule: _Rule) -> Any | _T:
    value = data.get(key)
    if value is None:
        return default
    if not rule.holds(value):
        raise ApiError(400, f"{key} is {shown(value)}, not {rule.wanted}", key)
    return value


def _read_stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or len(texts) > _STOPS or not all(_A_TEXT.holds(text) and text for text in texts):
        raise ApiError(400, f"stop is {shown(value)}, not a text or up to {_STOPS} of them", "stop")
    return tuple(texts)


def _read_format(value: object) -> Mapping[str, Any] | None:
    """The schema that a ``response_format`` asks for."""
    if value is None:
        return None
    name = "response_format"
    data = as_object(value, name, {"type", "json_schema"})
    if data.get("type") == "text":
        return None
    if data.get("type") == "json_object":
        return ANY_OBJECT
    if data.get("type") != "json_schema":
        raise ApiError(400, f"{name} is {shown(value)}; its type is text, json_object or json_schema", name)
    inner = as_object(data.get("json_schema"), f"{name}: json_schema", {"name", "description", "schema", "strict"})
    return as_object(inner.get("schema"), f"{name}: json_schema: schema")


def _read_messages(value: object, max_images: int) -> tuple[Media, list[tuple[str, str | None]]]:
    """The video, and turns of a message with its answer; the last has none yet."""
    if not isinstance(value, list) or not 1 <= len(value) <= _MESSAGES:
        raise ApiError(400, "messages is not a list of messages", "messages")
    media: Media | None = None
    turns: list[tuple[str, str | None]] = []
    system: list[str] = []
    length = 0
    for i, item in enumerate(value):
        where = f"messages[{i}]"
        message = as_object(item, where, {"role", "content", "name", "refusal", "tool_calls", "audio", "annotations"})
        role = message.get("role")
        text, found = _read_content(message.get("content"), f"{where}: content", max_images)
        length += len(text)
        if length > _TEXT:
            raise ApiError(400, "the messages are too long", "messages")
        if found is not None:
            if role != "user" or turns[1:] or (turns and turns[0][1] is not None):
                raise ApiError(400, "the video belongs into the first message of the user", where)
            if media is not None:
                raise ApiError(400, "there is more than one video", where)
            media = found
        if role in ("system", "developer") and not turns:
            system.append(text)
        elif role == "user":
            if turns and turns[-1][1] is None:  # two in a row are one
                text = "\n".join(filter(None, (turns.pop()[0], text)))
            turns.append((text, None))
        elif role == "assistant" and turns and turns[-1][1] is None:
            turns[-1] = (turns[-1][0], text)
        else:
            raise ApiError(400, f"{where} has the role {shown(role)}, which is not supported there", where)
    if media is None:
        raise ApiError(400, "there is no video: give a video_url, or image_urls as its frames", "messages")
    if turns[-1][1] is not None or not turns[-1][0].strip():
        raise ApiError(400, "the last message asks nothing", "messages")
    turns[0] = ("\n".join([*filter(None, system), turns[0][0]]), turns[0][1])
    return media, turns


def _read_content(value: object, where: str, max_images: int) -> tuple[str, Media | None]:
    """The text of a message, and its video."""
    if value is None:
        return "", None
    if isinstance(value, str):
        return value, None
    if not isinstance(value, list):
        raise ApiError(400, f"{where} is {shown(value)}, not a text or a list", where)
    texts: list[str] = []
    videos: list[str] = []
    images: list[tuple[str, float | None]] = []
    for i, item in enumerate(value):
        place = f"{where}[{i}]"
        part = as_object(item, place)
        kind = part.get("type")
        if kind == "text" and _A_TEXT.holds(part.get("text")):
            texts.append(part["text"])
        elif kind == "video_url":
            videos.append(_read_url(part.get(kind), place, {"url"})[0])
        elif kind == "image_url":
            images.append(_read_url(part.get(kind), place, {"url", "detail", "seconds"}))
        else:
            raise ApiError(400, f"{place} is {shown(part)}, which is not supported", place)
    return "\n".join(texts), _one_video(videos, images, where, max_images)


def _read_url(value: object, where: str, keys: Collection[str]) -> tuple[str, float | None]:
    data: Mapping[str, Any] = {"url": value} if isinstance(value, str) else as_object(value, where, keys)
    url, seconds = data.get("url"), data.get("seconds")
    if not isinstance(url, str) or not url:
        raise ApiError(400, f"{where} has no url", where)
    if seconds is None:
        return url, None
    if not is_number(seconds) or not abs(seconds) <= _SECONDS:
        raise ApiError(400, f"{where}: seconds is {shown(seconds)}, not a number from -1e12 to 1e12", where)
    return url, float(seconds)


def _one_video(
    videos: Sequence[str], images: Sequence[tuple[str, float | None]], where: str, max_images: int
) -> Media | None:
    if not videos and not images:
        return None
    if len(videos) > 1 or (videos and images):
        raise ApiError(400, "there is more than one video", where)
    if videos:
        return Media((videos[0],))
    if len(images) > max_images:
        raise ApiError(400, f"there are {len(images)} images; at most {max_images} are taken", where)
    seconds = [at for _, at in images if at is not None]
    if seconds and len(seconds) < len(images):
        raise ApiError(400, "some images have seconds, others not", where)
    if any(later <= earlier for earlier, later in pairwise(seconds)):
        raise ApiError(400, "the images' seconds do not ascend", where)
    return Media(tuple(url for url, _ in images), True, tuple(seconds) or None)
