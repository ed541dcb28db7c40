"""Chat template and tokenizer → the token ids around the video, and ids → text, without transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tango_plugins import TangoError
from tango_runtime.bundle import Bundle
from tango_runtime.pipeline.chat_template import ChatTemplate
from tango_runtime.util.errors import first_line
from tango_runtime.video import Clock

#: What a decoder puts for bytes that are no UTF-8, so also for a character whose other bytes are still to come.
_REPLACEMENT = "\ufffd"


class Prompt:
    """Turns a question about one video into token ids, and token ids into text.

    Args:
        tokenizer: Text of a tokenizer.json.
        template: Source of a chat template (Jinja), rendered as transformers does.
        placeholder: What the template renders for the video: ``<video>`` (llava-hf) or ``<image>`` (lmms-lab).

    Raises:
        TangoError: The tokenizer cannot be read, knows no token or takes the spaces beside the placeholder, or the
            template has an error; see :class:`ChatTemplate`.
    """

    def __init__(self, tokenizer: str, template: str, placeholder: str) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer)
        except Exception as error:  # the tokenizers library raises no narrower type
            raise TangoError(
                f"tokenizer.json cannot be read as a tokenizer: {first_line(error)}", "export the bundle again"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):  # of training: another prompt each time
            self._tokenizer.model.dropout = None
        tokens = self._tokenizer.get_added_tokens_decoder().values()
        if any(token.content == placeholder and (token.lstrip or token.rstrip) for token in tokens):
            raise TangoError(
                f"tokenizer.json's {placeholder} takes the spaces beside it, which is not supported",
                "set lstrip and rstrip of that token to false, or give the original checkpoint",
            )
        self._reserved = (placeholder, *(token.content for token in tokens if token.special))
        self._template = ChatTemplate(template, placeholder)
        if not len(self.encode("?")[1]):
            raise TangoError("tokenizer.json gives no tokens for a question", "export the bundle again")

    @classmethod
    def of(cls, bundle: Bundle) -> Prompt:
        """The prompt of a bundle: its tokenizer, its chat template, its placeholder."""
        tokenizer, template = bundle.text("tokenizer.json"), bundle.text("chat_template.jinja")
        try:
            return cls(tokenizer, template, bundle.manifest.prompt.placeholder)
        except TangoError as error:
            raise TangoError(f"{bundle.path}: {error.message}", error.hint) from error

    @property
    def video_first(self) -> bool:
        """Whether the text before the video is the same for every question."""
        return np.array_equal(self.encode("?")[0], self.encode("What?")[0])

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
            TangoError: The question is blank, or contains the placeholder or the text of a special token, which the
                tokenizer could not distinguish from the template's own.
        """
        self._check_question(question)
        before, after = self._template.around_video(about + question)
        return self._ids(before), self._ids(after)

    def follow_up(self, message: str) -> NDArray[np.int64]:
        """Encodes what follows an answer of a chat, up to where the next answer begins.

        Args:
            message: The user's new message.

        Returns:
            Token ids [T] int64: the end of the turn before, and the new message.

        Raises:
            TangoError: The message is blank or contains the text of a special token, or the template does not render
                earlier answers.
        """
        self._check_question(message)
        return self._ids(self._template.follow_up(message))

    def encode_chat(
        self, history: Sequence[tuple[str, str]], question: str, about: str = ""
    ) -> tuple[NDArray[np.int64], list[int]]:
        """Encodes a chat about one video, up to where the answer to its last message begins.

        Args:
            history: Earlier messages with their answers.
            question: The last message.
            about: What the prompt says of the video before the first message.

        Returns:
            (ids before the video, ids after the video).

        Raises:
            TangoError: As :meth:`encode` and :meth:`follow_up`, of an answer too, which may be blank.
        """
        messages = [*(message for message, _ in history), question]
        before, after = self.encode(messages[0], about)
        text = after.tolist()
        for (_, answer), message in zip(history, messages[1:], strict=True):
            self._check_text(answer)
            text += [*self._ids(answer).tolist(), *self.follow_up(message).tolist()]
        return before, text

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
            The text that each id completes, which may be empty, and at the end what is left.
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
            else:
                yield ""
        if piece := self._piece(context, pending):
            yield piece

    def _piece(self, context: list[int], pending: list[int]) -> str:
        return self.decode(context + pending)[len(self.decode(context)) :]

    def _ids(self, text: str) -> NDArray[np.int64]:
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        except Exception as error:  # as of a vocabulary that lacks a word, and the token for unknown ones
            raise TangoError(
                f"tokenizer.json cannot encode {text[:60]!r}: {first_line(error)}", "export the bundle again"
            ) from error

    def _check_question(self, question: str) -> None:
        self._check_text(question)
        if not question.strip():
            raise TangoError("the question is empty", "ask something about the video")

    def _check_text(self, text: str) -> None:
        if not isinstance(text, str):
            raise TangoError(f"the question is not text, but {type(text).__name__}", "give a string")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise TangoError("the question is not valid Unicode", "give it as UTF-8 text")
        for token in self._reserved:
            if token in text:
                raise TangoError(f"the question contains {token}", "leave it out; it is reserved for the prompt itself")


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
