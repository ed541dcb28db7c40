"""`tango run`."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from tango_plugins import TangoError
from tango_runtime.backends.registry import BACKENDS
from tango_runtime.cli.main import Command
from tango_runtime.pipeline.answer import Answer
from tango_runtime.pipeline.video_llm import VideoLLM
from tango_runtime.util.console import progress, status


def _configure_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder that tango-export made")
    parser.add_argument("video", help="video file, or folder of images")
    parser.add_argument("question", help="what to ask about it")
    parser.add_argument("--frames", type=int, help="frames sampled from the video (default: the bundle's)")
    parser.add_argument(
        "--retention-ratio",
        type=float,
        help="fraction of video tokens kept (default: the bundle's)",
    )
    parser.add_argument("--no-prune", action="store_true", help="keep all (a ratio of 1 merges what stands still)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="most tokens of the answer (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of the sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="seed of the sampling")
    parser.add_argument("--fps", type=float, help="frames a second of a folder of images (default: 1)")
    parser.add_argument(
        "--backend", default="auto", choices=["auto", *BACKENDS], help="what runs the graphs (default: %(default)s)"
    )
    parser.add_argument("--report", type=Path, metavar="OUT.html", help="write what was kept as a web page")
    parser.add_argument("--picture", type=Path, metavar="OUT.png", help="write what was kept as a picture")


def _run(args: argparse.Namespace) -> int:
    if args.no_prune and args.retention_ratio is not None:
        raise TangoError("--no-prune and --retention-ratio exclude each other", "leave one of them away")
    for file in (args.report, args.picture):
        if file and not file.resolve().parent.is_dir():
            raise TangoError(f"there is no folder {file.resolve().parent}", "make it, or name another file")
        if file and file.is_dir():
            raise TangoError(f"{file} is a folder", "name a file in it")
    llm = VideoLLM(args.bundle, backend=args.backend)
    status(f"backend: {llm.backend}" + (f" ({llm.fallback_reason})" if llm.fallback_reason else ""))
    with progress("vision", args.frames or llm.bundle.manifest.video.frames) as on_progress:
        stream = llm.stream(
            args.video,
            args.question,
            frames=args.frames,
            retention_ratio=args.retention_ratio,
            prune=not args.no_prune,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            fps=args.fps,
            on_progress=on_progress,
        )
        first = next(stream, "")
    for piece in itertools.chain([first], stream):
        print(piece, end="", flush=True)
    print(flush=True)
    _print_figures(stream.answer)
    _write_reports(llm, stream.answer, args)
    return 0


def _print_figures(answer: Answer) -> None:
    status("")
    status(f"kept {answer.kept} / {answer.total} video tokens ({answer.kept / answer.total:.1%})")
    status(f"prompt {answer.prompt_tokens} tokens, answer {len(answer.ids)} tokens (ended by {answer.finish})")
    for name, ms in answer.stages.items():
        status(f"  {name:<8}{ms:10.1f} ms")
    status(f"first token after {answer.first_token_ms:.1f} ms, then {answer.tokens_per_second:.1f} tokens/s")


def _write_reports(llm: VideoLLM, answer: Answer, args: argparse.Namespace) -> None:
    report = llm.report(answer, Path(args.video).name)
    if args.report:
        report.write(args.report)
        status(f"report: {args.report}")
    if args.picture:
        report.picture(args.picture)
        status(f"picture: {args.picture}")


RUN = Command(_configure_run, _run)
