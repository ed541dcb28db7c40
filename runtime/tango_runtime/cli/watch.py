"""`tango watch`: the same question about the last seconds of a stream, again and again."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from itertools import islice
from typing import Any

from tango_plugins import TangoError
from tango_runtime.cli.args import (
    add_backend,
    add_bundle,
    add_count,
    add_every,
    add_frame_size,
    add_json_schema,
    add_pruning,
    add_sampling,
    positive_float,
    sampling_options,
)
from tango_runtime.cli.command import Command
from tango_runtime.pipeline.answer import Answer
from tango_runtime.pipeline.video_llm import VideoLLM
from tango_runtime.util.console import status

#: The exit code where ``--alert`` ended the watch.
_ALERTED = 1


def _configure(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument(
        "source",
        help="stream to watch: rtsp://, http://, https://, /dev/video0, gst:PIPELINE, csi:0, - for standard input; "
        "or a file or folder",
    )
    parser.add_argument("question", help="question about the video")
    add_count(parser, "--window", "frames that an answer is about", note="the bundle's")
    parser.add_argument(
        "--rate", type=positive_float, default=1.0, metavar="FPS", help="frames a second taken (default: %(default)s)"
    )
    add_every(parser)
    add_count(parser, "--count", "stop after N answers", note="never")
    parser.add_argument("--jsonl", action="store_true", help="write each answer as a line of JSON")
    parser.add_argument(
        "--alert",
        type=_text,
        metavar="TEXT",
        help="stop with exit code 1 at the first answer that has this text in it, as a word of its own",
    )
    parser.add_argument(
        "--alert-command",
        type=_command,
        metavar="COMMAND",
        help="run this command in place of stopping, with the answer's line of JSON on its standard input",
    )
    add_frame_size(parser)
    add_pruning(parser)
    add_sampling(parser)
    add_json_schema(parser)
    add_backend(parser)


def _text(text: str) -> str:
    """Text that is not empty: every answer has that in it."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no text")
    return text


def _command(text: str) -> list[str]:
    """A command's words; an error where it cannot be run, hours before the first alert."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise _not_run(text, error) from error
    if not words or shutil.which(words[0]) is None:
        raise _not_run(text, "there is no such program")
    return words


def _not_run(command: str, why: object) -> TangoError:
    return TangoError(f"the command {command!r} cannot be run: {why}", "check --alert-command")


def _run(args: argparse.Namespace) -> int:
    if args.alert_command and not args.alert:
        raise TangoError("--alert-command was given without --alert", "say on which text: --alert yes")
    llm = VideoLLM(args.bundle, backend=args.backend)
    status(f"backend: {llm.backend}" + (f" ({llm.fallback_reason})" if llm.fallback_reason else ""))
    for answer in islice(_answers(llm, args), args.count):
        alert = args.alert is not None and _mentions(answer.text, args.alert)
        line = json.dumps(_as_json(answer, alert), ensure_ascii=False)
        print(line if args.jsonl else _as_text(answer, alert), flush=True)
        if alert and args.alert_command:
            _call(args.alert_command, line)
        elif alert:
            return _ALERTED
    return 0


def _answers(llm: VideoLLM, args: argparse.Namespace) -> Iterator[Answer]:
    return llm.watch(
        args.source,
        args.question,
        window=args.window,
        step=args.every,
        fps=args.rate,
        frame_size=args.frame,
        max_pixels=args.max_pixels,
        retention_ratio=args.retention_ratio,
        prune=not args.no_prune,
        json_schema=args.json_schema,
        **sampling_options(args),
    )


def _mentions(answer: str, text: str) -> bool:
    """Whether an answer has a text in it, not as a part of a longer word, in whatever case."""
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.IGNORECASE) is not None


def _as_text(answer: Answer, alert: bool) -> str:
    """One line: when, what, and what it took."""
    live = answer.live
    assert live is not None
    figures = [f"kept {answer.kept}/{answer.total}", f"first token {answer.first_token_ms:.0f} ms"]
    figures += [] if live.lag is None else [f"lag {live.lag:.2f} s"]
    figures += [f"{live.dropped} frames dropped"] if live.dropped else []
    said = " ".join(answer.text.split())
    return f"[{live.begin:.1f}-{live.end:.1f} s] {'ALERT ' if alert else ''}{said}  ({', '.join(figures)})"


def _as_json(answer: Answer, alert: bool) -> dict[str, Any]:
    live = answer.live
    assert live is not None
    return {
        "begin": live.begin,
        "end": live.end,
        "frames": live.frames,
        "answer": answer.text,
        "finish": answer.finish,
        "alert": alert,
        "kept": answer.kept,
        "total": answer.total,
        "lag_seconds": live.lag,
        "dropped": live.dropped,
        "gaps": live.gaps,
        "stages_ms": answer.stages,
    }


def _call(command: list[str], line: str) -> None:
    """Runs the command of an alert to its end; one that fails is reported, and the watch goes on."""
    try:
        code = subprocess.run(command, input=f"{line}\n".encode(), check=False).returncode
    except OSError as error:
        raise _not_run(shlex.join(command), error) from error
    if code:
        status(f"warning: {shlex.join(command)!r} ended with {code}")


WATCH = Command(_configure, _run)
