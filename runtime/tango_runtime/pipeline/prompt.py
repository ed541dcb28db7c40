"""Chat template and tokenizer → the token ids around the video, and ids → text, without transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tango_plugins import TangoError
from tango_runtime.bundle import Bundle
from tango_runtime.video import Clock

#: Stands for an earlier answer where a chat is rendered: its token ids are known already.
_ANSWER = "\ue000answer\ue000"

#: What a decoder puts for bytes that are no UTF-8, so also for a character whose other bytes are still to come.
_REPLACEMENT = "\ufffd"


class Prompt:
    """Turns a question about one video into token ids, and token ids into text.

    Args:
        tokenizer: Path of a tokenizer.json.
        template: Source of a chat template (Jinja), rendered as transformers does.
        placeholder: What the template renders for the video: ``<video>`` (llava-hf) or ``<image>`` (lmms-lab).

    Raises:
        TangoError: The tokenizer cannot be read, or the template has an error or does not render the placeholder
            exactly once.
    """

    def __init__(self, tokenizer: str | Path, template: str, placeholder: str) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the tokenizers library raises no narrower type
            raise TangoError(
                f"{tokenizer} cannot be read as a tokenizer: {error}", "export the bundle again"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        special = (token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special)
        self._reserved = (placeholder, *special)
        self._placeholder = placeholder
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateError as error:
            raise TangoError(f"the chat template has an error: {error}", "fix chat_template.jinja") from error
        self._around_video("?")

    @classmethod
    def of(cls, bundle: Bundle) -> Prompt:
        """The prompt of a bundle: its tokenizer, its chat template, its placeholder."""
        template = bundle.text("chat_template.jinja")
        return cls(bundle.file("tokenizer.json"), template, bundle.manifest.prompt.placeholder)

    def encode(self, question: str, about: str = "") -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Encodes one user turn, the video and a question, up to where the answer begins.

        Each side is encoded by itself, as if the placeholder were a special token; the template writes the only
        special tokens there are.

        Args:
            question: Plain text.
            about: What the prompt says of the video before the question; see :func:`describe`.

        Returns:
            (ids before the video, ids after the video), int64 [T0] and [T1].

        Raises:
            TangoError: The question contains the placeholder or the text of a special token, which the tokenizer
                could not distinguish from the template's own.
        """
        self._check_question(question)
        before, after = self._around_video(about + question)
        return self._ids(before), self._ids(after)

    def follow_up(self, messages: Sequence[str]) -> NDArray[np.int64]:
        """Encodes what follows the latest answer of a chat, up to where the next answer begins.

        Args:
            messages: The user's messages so far, the new one last; at least two. The first is about the video.

        Returns:
            Token ids [T] int64: the end of the turn before, and the new message.

        Raises:
            TangoError: The new message contains the text of a special token, or the template does not render earlier
                answers.
        """
        self._check_question(messages[-1])
        turns: list[dict[str, Any]] = []
        for message in messages:
            video = [] if turns else [{"type": "video"}]
            turns.append({"role": "user", "content": [*video, {"type": "text", "text": message}]})
            turns.append({"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]})
        parts = self._render(turns[:-1]).split(_ANSWER)
        if len(parts) != len(messages):
            raise TangoError(
                "the chat template does not render earlier answers", "ask questions one by one: session.ask(question)"
            )
        return self._ids(parts[-1])

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """The text of token ids, special tokens left out. Bytes that are no UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Decodes token ids as they come.

        A character comes out once all its bytes are there. The pieces put together are `decode` of all the ids, so
        U+FFFD appears only for bytes that cannot become a character any more.

        Args:
            ids: Token ids; may be an endless or slow iterator, each id is taken when it is needed.

        Yields:
            Pieces of text, none of them empty.
        """
        # The last piece's ids stay as context: some decoders treat the first token of a text differently.
        context: list[int] = []
        pending: list[int] = []
        for token in ids:
            pending.append(token)
            piece = self._piece(context, pending)
            if piece and not piece.endswith(_REPLACEMENT):
                yield piece
                context, pending = pending, []
        if piece := self._piece(context, pending):
            yield piece

    def _piece(self, context: list[int], pending: list[int]) -> str:
        return self.decode(context + pending)[len(self.decode(context)) :]

    def _ids(self, text: str) -> NDArray[np.int64]:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def _check_question(self, question: str) -> None:
        if not isinstance(question, str):
            raise TangoError(f"the question is not text, but {type(question).__name__}", "give a string")
        if any("\ud800" <= character <= "\udfff" for character in question):
            raise TangoError("the question is not valid Unicode", "give it as UTF-8 text")
        for token in (*self._reserved, _ANSWER):
            if token in question:
                raise TangoError(f"the question contains {token}", "leave it out; it is reserved for the prompt itself")

    def _render(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self._template.render(messages=messages, tools=None, documents=None, add_generation_prompt=True)
        except Exception as error:  # a template is a program: it may divide by zero
            raise TangoError(f"the chat template cannot be rendered: {error}", "fix chat_template.jinja") from error

    def _around_video(self, question: str) -> tuple[str, str]:
        content = [{"type": "video"}, {"type": "text", "text": question}]
        text = self._render([{"role": "user", "content": content}])
        if text.count(self._placeholder) != 1:
            raise TangoError(
                f"the chat template renders {self._placeholder} {text.count(self._placeholder)} times, not once",
                "fix chat_template.jinja, or the placeholder in bundle.json",
            )
        before, after = text.split(self._placeholder)
        return before, after


def describe(form: str | None, clock: Clock) -> str:
    """What a prompt says of its video.

    Args:
        form: ``video_text`` of the bundle's :class:`tango_runtime.bundle.PromptSpec`.
        clock: When its frames are.

    Raises:
        TangoError: The text says how long the video is, and that is not known.
    """
    if form is None:
        return ""
    if clock.duration is None:
        raise TangoError(
            "the source has no duration, which this model's prompts state", "give its FrameSource a duration in seconds"
        )
    times = ",".join(f"{seconds:.2f}s" for seconds in clock.seconds)
    return form.format(duration=clock.duration, frames=len(clock.seconds), times=times)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here its body is rendered and the tag dropped."""

    tags = {"generation"}  # noqa: RUF012 the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)  # names set inside stay inside, as in transformers


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates of the hub are written for: transformers' settings, filters and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
