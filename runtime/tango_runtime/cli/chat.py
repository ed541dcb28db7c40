"""`tango chat`: questions about one video, one after the other, at a prompt or from a pipe."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tango_plugins import TangoError
from tango_runtime.cli.args import (
    add_backend,
    add_bundle,
    add_json_schema,
    add_nvdec,
    add_pruning,
    add_sampling,
    add_video,
    page_file,
    positive_int,
    ratio,
    sampling_options,
    video_options,
)
from tango_runtime.cli.command import Command
from tango_runtime.cli.run import speed
from tango_runtime.pipeline.answer import Answer
from tango_runtime.pipeline.encoded import EncodedVideo
from tango_runtime.pipeline.session import Session
from tango_runtime.pipeline.video_llm import VideoLLM
from tango_runtime.util.console import progress, status
from tango_runtime.util.files import check_apart
from tango_runtime.video.address import STDIN, is_live, source_name

_T = TypeVar("_T")

_PROMPT = "> "


def _configure(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add_video(parser)
    add_pruning(parser)
    add_sampling(parser)
    add_json_schema(parser)
    add_backend(parser)
    add_nvdec(parser)


def _run(args: argparse.Namespace) -> int:
    if args.video == STDIN:
        raise TangoError("standard input cannot be the video: questions are read from it", "give a file or an address")
    llm = VideoLLM(args.bundle, backend=args.backend, nvdec=args.nvdec)
    status(f"backend: {llm.backend}" + (f" ({llm.fallback_reason})" if llm.fallback_reason else ""))
    chat = _Chat(llm, args)
    try:
        for line in _lines():
            chat.take(line)
            if chat.ended:
                break
    finally:
        chat.close()
    return 0


def _lines() -> Iterator[str]:
    """What the user enters, without surrounding blanks, to the end of the input; a line may be no text."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that it is an error of this line, not the end of the chat
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with suppress(ImportError):  # line editing and history
        import readline  # noqa: F401
    with suppress(EOFError):
        while True:
            yield input(_PROMPT).strip()


class _Chat:
    """A session, and what may be changed of it.

    Attributes:
        ended: The user asked to leave.
    """

    def __init__(self, llm: VideoLLM, args: argparse.Namespace) -> None:
        self.ended = False
        self._llm, self._args = llm, args
        self._last: Answer | None = None
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/ratio": (self._set_ratio, "RATIO: keep another fraction of the tokens, and forget earlier messages"),
            "/frames": (self._set_frames, "N: sample another number of frames, and forget earlier messages"),
            "/new": (self._begin_anew, "forget earlier messages"),
            "/report": (self._report, "OUT.html: write a web page that shows the tokens kept"),
            "/help": (self._help, "this list"),
            "/quit": (self._quit, "leave, as the end of the input does"),
        }
        self._video = self._encode()
        self._session = self._prune(self._video)

    def take(self, line: str) -> None:
        """Answers a message, or does what a line with a slash asks; an error is shown, and the chat goes on."""
        try:
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)
        except TangoError as error:
            status(f"error: {error.message}\nhint: {error.hint}")

    def close(self) -> None:
        """Gives the session back."""
        self._session.close()

    def _encode(self) -> EncodedVideo:
        """Sees the video, which is pruned at any ratio afterwards."""
        args = self._args
        options = {
            name: value for name, value in video_options(args).items() if name not in ("retention_ratio", "prune")
        }
        with progress("vision", args.frames or self._llm.bundle.manifest.video.frames) as on_progress:
            return self._llm.encode(args.video, on_progress=on_progress, **options)

    def _prune(self, video: EncodedVideo) -> Session:
        args = self._args
        session = self._llm.session(video, retention_ratio=args.retention_ratio, prune=not args.no_prune)
        status(f"kept {session.kept} / {session.total} video tokens; /help lists commands")
        return session

    def _answer(self, message: str) -> None:
        options = sampling_options(self._args)
        stream = self._session.stream(message, chat=True, json_schema=self._args.json_schema, **options)
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()
            status("\ninterrupted: this message and its answer are forgotten")
            return
        print(flush=True)
        self._last = answer = stream.answer
        status(speed(answer))

    def _command(self, line: str) -> None:
        name, _, value = line.partition(" ")
        if name not in self._commands:
            raise TangoError(f"there is no command {name}", f"commands are {', '.join(self._commands)}")
        self._commands[name][0](value.strip())

    def _set_ratio(self, value: str) -> None:
        self._begin(retention_ratio=_parsed(ratio, value), no_prune=False)

    def _set_frames(self, value: str) -> None:
        self._begin(frames=_parsed(positive_int, value))

    def _begin_anew(self, value: str) -> None:
        self._begin()

    def _begin(self, **changed: object) -> None:
        """Opens a session, with other settings if they are given; the old one stays where the new one cannot be had."""
        before = dict(vars(self._args))
        vars(self._args).update(changed)
        try:
            video = self._encode() if "frames" in changed else self._video
            session = self._prune(video)
        except TangoError:
            vars(self._args).update(before)
            raise
        self._session.close()
        self._video, self._session, self._last = video, session, None

    def _report(self, value: str) -> None:
        if self._last is None:
            raise TangoError("there is no answer to report yet", "ask a question first")
        file = _parsed(page_file, value)
        video = None if is_live(self._args.video) else Path(self._args.video)
        check_apart({"the report": file}, {"the bundle": self._args.bundle, "the video": video})
        self._llm.report(self._last, source_name(self._args.video)).write(file)
        status(f"report: {file}")

    def _help(self, value: str) -> None:
        for name, (_, what) in self._commands.items():
            status(f"{name:<8} {what}")

    def _quit(self, value: str) -> None:
        self.ended = True


def _parsed(parse: Callable[[str], _T], value: str) -> _T:
    try:
        return parse(value)
    except argparse.ArgumentTypeError as error:
        raise TangoError(str(error), "see: /help") from error


CHAT = Command(_configure, _run)
