"""`tango run` and `tango inspect`."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tango_plugins import TangoError
from tango_runtime.bundle import Bundle, Manifest, TensorSpec
from tango_runtime.chain import Answer, VideoLLM
from tango_runtime.cli import Command
from tango_runtime.progress import note, progress
from tango_runtime.stages import ENGINES


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
        "--engine", default="auto", choices=["auto", *ENGINES], help="what runs the graphs (default: %(default)s)"
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
    llm = VideoLLM(args.bundle, engine=args.engine)
    note(f"engine: {llm.engine}" + (f" ({llm.why})" if llm.why else ""))
    with progress("vision", args.frames or llm.bundle.manifest.video.frames) as advance:
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
            advance=advance,
        )
        first = next(stream, "")
    for piece in itertools.chain([first], stream):
        print(piece, end="", flush=True)
    print(flush=True)
    _print_figures(stream.answer)
    _write_reports(llm, stream.answer, args)
    return 0


def _print_figures(answer: Answer) -> None:
    note("")
    note(f"kept {answer.kept} / {answer.total} video tokens ({answer.kept / answer.total:.1%})")
    note(f"prompt {answer.prompt_tokens} tokens, answer {len(answer.ids)} tokens (ended by {answer.finish})")
    for name, ms in answer.stages.items():
        note(f"  {name:<8}{ms:10.1f} ms")
    note(f"first token after {answer.first_token_ms:.1f} ms, then {answer.tokens_per_second:.1f} tokens/s")


def _write_reports(llm: VideoLLM, answer: Answer, args: argparse.Namespace) -> None:
    report = llm.report(answer, Path(args.video).name)
    if args.report:
        report.write(args.report)
        note(f"report: {args.report}")
    if args.picture:
        report.picture(args.picture)
        note(f"picture: {args.picture}")


def _configure_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder that tango-export made")
    parser.add_argument("--verify", action="store_true", help="compare every file's SHA-256")


def _inspect(args: argparse.Namespace) -> int:
    manifest = Bundle.load(args.bundle, verify=args.verify).manifest
    video, decoder, params = manifest.video, manifest.decoder, manifest.params
    facts = {
        "bundle": f"{args.bundle}: {manifest.family}, {manifest.dtype}",
        "source": f"{manifest.source.checkpoint}, salience of {manifest.source.siglip}, by {manifest.source.exporter}",
        "video": f"{video.frames} frames of {video.size}x{video.size}, {video.tokens_per_frame} tokens each",
        "prune": f"retention ratio {params.retention_ratio}, budget {params.budget}, merge order {params.merge_order}",
        "decoder": f"{decoder.layers} layers, width {decoder.width}, context {decoder.context}",
        "files": "SHA-256 of every file is as in bundle.json" if args.verify else "sizes are as in bundle.json",
    }
    console = Console(soft_wrap=True)
    for name, fact in facts.items():
        console.print(f"{name:<9}{fact}", markup=False, highlight=False)
    console.print(_graph_table(manifest))
    return 0


def _graph_table(manifest: Manifest) -> Table:
    table = Table("graph", "inputs", "outputs", "opset", "engines", "MB", box=None, header_style="bold")
    for name, graph in manifest.graphs.items():
        size = sum(spec.size for file, spec in manifest.files.items() if file.startswith(graph.file))
        tensors = _tensors(graph.inputs), _tensors(graph.outputs)
        table.add_row(name, *tensors, str(graph.opset), "\n".join(graph.engines), f"{size / 1e6:.1f}")
    return table


def _tensors(tensors: tuple[TensorSpec, ...], most: int = 3) -> str:
    lines = [f"{t.name} {t.dtype} {list(t.shape)}".replace("'", "") for t in tensors[:most]]
    return "\n".join(lines + ([f"and {len(tensors) - most} more"] if len(tensors) > most else []))


RUN = Command(_configure_run, _run)
INSPECT = Command(_configure_inspect, _inspect)
