"""A checkpoint's chat template as the texts around the video, a question and an earlier answer."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from tango_plugins import TangoError
from tango_runtime.util.limited import limited_reply

#: Limits of rendering: seconds of processor time, seconds in all, bytes of memory. A template of the hub takes 0.1 s
#: and 20 MB, nearly all of it to start Python.
_PROCESSOR_S, _IN_ALL_S, _MEMORY = 4, 300, 512 << 20

#: Maximum number of characters of a template.
_LONGEST = 1 << 20

_RENDER = Path(__file__).with_name("render.py")

_FIX = "fix chat_template.jinja"

# What stands for a question while the template is rendered. Its inside has what a template might change or escape; the
# wide spaces around it are gone where a template strips the question.
_SPACE, _INSIDE, _ANSWER = "\u2003", '\ue000aA"<&>\\\n\ue000', "\ue000answer\ue000"
_QUESTION = re.compile(f"({_SPACE})?{re.escape(_INSIDE)}({_SPACE})?")

# What is left of a question that was written in another way, such as escaped for JSON.
_MARK = re.compile(r"\ue000|\\ue000", re.IGNORECASE)


class ChatTemplate:
    """A chat template (Jinja), rendered once, as transformers does, with marks in place of what users and models say.

    It is a program that may come from a stranger. So a process with limits renders it, and afterwards it is text.

    Args:
        source: The template.
        placeholder: What it renders for the video: ``<video>`` (llava-hf) or ``<image>`` (lmms-lab).

    Raises:
        TangoError: The template has an error, does not end, takes too much memory, does not render the placeholder
            exactly once, or alters the question by more than stripping it.
    """

    def __init__(self, source: str, placeholder: str) -> None:
        first, *later = _render(source, [_chat(turns) for turns in (1, 2, 3)])
        if error := first.get("error"):
            raise TangoError(f"the chat template {error}", _FIX)
        text = first["text"]
        if not placeholder or text.count(placeholder) != 1:
            raise TangoError(
                f"the chat template renders {placeholder!r} {text.count(placeholder)} times, not once",
                f"{_FIX}, or the placeholder in bundle.json",
            )
        rest, questions = _QUESTION.subn("", text)
        if not questions or _MARK.search(rest):
            raise TangoError("the chat template does not write the question as it is", _FIX)
        self._before, self._after = text.split(placeholder)
        self._turn = _turn_of(later)

    def around_video(self, question: str) -> tuple[str, str]:
        """The texts before and after the video of a first turn, up to where the answer begins."""
        return _with(self._before, question), _with(self._after, question)

    def follow_up(self, question: str) -> str:
        """The text from the end of an answer, over a further question, up to where the next answer begins.

        Raises:
            TangoError: The template does not render earlier answers, or each turn differently.
        """
        if self._turn is None:
            raise TangoError(
                "the chat template does not render earlier answers", "ask each question on its own, not in a chat"
            )
        return _with(self._turn, question)


def _chat(turns: int) -> list[dict[str, Any]]:
    """Messages of a chat, the first with the video, the last without its answer."""
    question = {"type": "text", "text": f"{_SPACE}{_INSIDE}{_SPACE}"}
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        messages.append({"role": "user", "content": [question] if turn else [{"type": "video"}, question]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]})
    return messages[:-1]


def _turn_of(replies: list[dict[str, str]]) -> str | None:
    """What follows the latest answer of chats of 2, 3, … turns; None if that is not one text with a question."""
    parts = [reply.get("text", "").split(_ANSWER) for reply in replies]
    whole = all(len(part) == turns for turns, part in enumerate(parts, 2))
    latest = {part[-1] for part in parts}
    return latest.pop() if whole and len(latest) == 1 and _QUESTION.search(parts[0][-1]) else None


def _with(text: str, question: str) -> str:
    """A rendered text with a question in place of the marks, stripped where the template strips it."""

    def put(mark: re.Match[str]) -> str:
        stripped = question if mark[1] else question.lstrip()
        return stripped if mark[2] else stripped.rstrip()

    return _QUESTION.sub(put, text)


def _render(source: str, chats: list[list[dict[str, Any]]]) -> list[dict[str, str]]:
    """The replies of render.py.

    Raises:
        TangoError: It does not end within its limits.
    """
    if len(source) > _LONGEST:
        raise TangoError(f"the chat template has {len(source)} characters", f"at most {_LONGEST} are read")
    limits = {"processor_s": _PROCESSOR_S, "in_all_s": _IN_ALL_S, "memory": _MEMORY}
    try:
        replies: list[dict[str, str]] = limited_reply(_RENDER, {"template": source, "chats": chats}, **limits)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        most = f"{_PROCESSOR_S} s of the processor, {_MEMORY >> 20} MB of memory"
        raise TangoError(f"the chat template cannot be rendered within {most}: {_ended(error)}", _FIX) from error
    return replies


def _ended(error: subprocess.SubprocessError) -> str:
    """How a process ended that did not reply."""
    if isinstance(error, subprocess.CalledProcessError) and error.returncode >= 0:
        return str(error.stderr).strip().rpartition("\n")[2]
    return "it was stopped"
