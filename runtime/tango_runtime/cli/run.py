"""`tango run`: one question about one video."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

from tango_runtime.cli.args import (
    add_backend,
    add_bundle,
    add_json_schema,
    add_nvdec,
    add_pruning,
    add_sampling,
    add_video,
    page_file,
    picture_file,
    sampling_options,
    video_options,
)
from tango_runtime.cli.command import Command
from tango_runtime.pipeline.answer import Answer
from tango_runtime.pipeline.video_llm import VideoLLM
from tango_runtime.util.console import progress, status
from tango_runtime.util.files import check_apart
from tango_runtime.video.address import is_live, source_name


def _configure(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add_video(parser)
    parser.add_argument("question", help="question about the video")
    add_pruning(parser)
    add_sampling(parser)
    add_json_schema(parser)
    add_backend(parser)
    add_nvdec(parser)
    parser.add_argument(
        "--report", type=page_file, metavar="OUT.html", help="write a web page that shows the kept tokens"
    )
    parser.add_argument(
        "--picture", type=picture_file, metavar="OUT.png", help="write a picture that shows the kept tokens"
    )


def _run(args: argparse.Namespace) -> int:
    outputs = {"--report": args.report, "--picture": args.picture}
    live = is_live(args.video)
    check_apart(outputs, {"the bundle": args.bundle, "the video": None if live else Path(args.video)})
    llm = VideoLLM(args.bundle, backend=args.backend, nvdec=args.nvdec)
    status(f"backend: {llm.backend}" + (f" ({llm.fallback_reason})" if llm.fallback_reason else ""))
    frames = args.frames or llm.bundle.manifest.video.frames
    if live:
        status(f"taking {frames} frames of {source_name(args.video)}, {args.fps or 1:g} a second")
    with progress("vision", frames) as on_progress:
        stream = llm.stream(
            args.video,
            args.question,
            on_progress=on_progress,
            **video_options(args),
            json_schema=args.json_schema,
            **sampling_options(args),
        )
        first = next(stream, "")
    pieces = itertools.chain([first], stream, ["\n"])
    unprinted = _print_pieces(pieces, to_the_end=any(outputs.values()))
    _print_figures(stream.answer)
    _write_reports(llm, stream.answer, args)
    if unprinted:
        raise unprinted
    return 0


def _print_pieces(pieces: Iterable[str], *, to_the_end: bool) -> OSError | None:
    """Prints an answer as it comes.

    Args:
        pieces: Its pieces.
        to_the_end: Take the other pieces, too, where one cannot be printed: a report needs them.

    Returns:
        The error of the first piece that could not be printed.
    """
    failure = None
    for piece in pieces:
        try:
            if failure is None:
                print(piece, end="", flush=True)
        except OSError as error:
            if not to_the_end:
                raise
            failure = error
    return failure


def _print_figures(answer: Answer) -> None:
    status("")
    if answer.sampling:
        status(f"sampled {answer.sampling}")
    ends = f", {answer.rows - answer.kept} row ends" if answer.rows > answer.kept else ""
    status(f"kept {answer.kept} / {answer.total} video tokens ({answer.kept / answer.total:.1%}){ends}")
    if answer.thinned is not None:
        status(f"upper layers of the decoder: {answer.thinned} of these {answer.rows} positions")
    status(f"prompt {answer.prompt_tokens} tokens, answer {len(answer.ids)} tokens (finish reason: {answer.finish})")
    for name, ms in answer.stages.items():
        status(f"  {name:<8}{ms:10.1f} ms")
    status(speed(answer))


def speed(answer: Answer) -> str:
    """The times to the first token and per second thereafter; an answer of one token has no rate."""
    rate = f", then {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
    return f"first token after {answer.first_token_ms:.1f} ms{rate}"


def _write_reports(llm: VideoLLM, answer: Answer, args: argparse.Namespace) -> None:
    report = llm.report(answer, source_name(args.video))
    if args.report:
        report.write(args.report)
        status(f"report: {args.report}")
    if args.picture:
        report.picture(args.picture)
        status(f"picture: {args.picture}")


RUN = Command(_configure, _run)
