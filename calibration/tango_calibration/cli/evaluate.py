"""`tango evaluate`."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tango_calibration.data.dataset import Video, read_folder, synthetic
from tango_calibration.evaluation import results
from tango_calibration.evaluation.evaluate import BundleEvaluator, check_room, evaluate_in_parallel, trials_of
from tango_calibration.evaluation.methods import METHODS, tango_params
from tango_calibration.evaluation.scores import Scores
from tango_plugins import TangoError
from tango_runtime.backends.registry import BACKENDS
from tango_runtime.bundle import MANIFEST, Bundle, sha256
from tango_runtime.cli.main import Command
from tango_runtime.util.console import progress, status
from tango_runtime.util.files import check_output

SYNTHETIC = "synthetic"


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder that tango-export made")
    parser.add_argument(
        "--data", default=SYNTHETIC, help="folder with a questions.jsonl, or generated clips (default: %(default)s)"
    )
    parser.add_argument("--videos", type=int, help="how many (default: all of a folder, 100 generated clips)")
    parser.add_argument("--questions", type=int, help="most about one generated clip (default: 8)")
    parser.add_argument("--frames", type=int, help="frames of a video (default: the bundle's)")
    parser.add_argument(
        "--retention-ratio",
        type=float,
        nargs="+",
        default=[0.05, 0.1, 0.15, 0.2],
        metavar="R",
        help="fractions of video tokens asked for; the table tells what was kept (default: 0.05 0.1 0.15 0.2)",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        default=list(METHODS),
        metavar="M",
        help=f"ways to choose them, beside all and none of them (default: {' '.join(METHODS)})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of generated clips and random choices (default: 0)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=16, help="most tokens of an answer (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, each on one core if several (default: 1)")
    parser.add_argument(
        "--backend", default="auto", choices=["auto", *BACKENDS], help="what runs the graphs (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write results.json, results.md, accuracy.png")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Refuses a count below 1 among the named arguments, and a seed below 0."""
    for name in names:
        if (value := getattr(args, name)) is not None and value < 1:
            raise TangoError(f"--{name.replace('_', '-')} is {value}", "it must be at least 1")
    if args.seed < 0:
        raise TangoError(f"--seed is {args.seed}", "it must be at least 0")


def _evaluate(args: argparse.Namespace) -> int:
    check_counts(args, "videos", "questions", "frames", "jobs", "max_new_tokens")
    bundle = Bundle.load(args.bundle)
    params = bundle.manifest.params
    trials = trials_of(args.method, [params.at(ratio).retention_ratio for ratio in args.retention_ratio])
    if args.output:
        check_output(args.output, overwrite=args.overwrite, holding=results.RESULTS)
        results.require_matplotlib()
    videos = _videos(args, bundle)
    check_room(bundle, videos)
    threads = 1 if args.jobs > 1 else 0
    open_reader = partial(
        BundleEvaluator, args.bundle, args.backend, max_new_tokens=args.max_new_tokens, threads=threads
    )
    engines: list[str] = []
    with progress("videos", len(videos)) as on_progress:
        records = evaluate_in_parallel(
            open_reader, videos, trials, params, on_progress, jobs=args.jobs, seed=args.seed, opened=engines.append
        )
    scores = Scores(records)
    summaries = [scores.summary(trial) for trial in trials]
    print("\n".join([*results.overall(summaries), *results.by("type", summaries)]))
    if args.output:
        conditions = _conditions(args, bundle, videos, engines)
        results.write(args.output, conditions, videos, records, summaries, overwrite=args.overwrite)
        status(f"results: {args.output}")
    return 0


def _videos(args: argparse.Namespace, bundle: Bundle) -> list[Video]:
    frames = args.frames or bundle.manifest.video.frames
    if args.data == SYNTHETIC:
        return synthetic(args.videos or 100, seed=args.seed, questions=args.questions or 8, frames=frames)
    if args.questions:
        raise TangoError("--questions is for generated clips", "a folder has those of its questions.jsonl")
    return read_folder(Path(args.data), frames)[: args.videos]


def _conditions(
    args: argparse.Namespace, bundle: Bundle, videos: Sequence[Video], engines: Sequence[str]
) -> dict[str, Any]:
    """What the results hold for."""
    manifest = bundle.manifest
    used = tango_params(manifest.params)
    ratios = list(dict.fromkeys(used.at(ratio).retention_ratio for ratio in args.retention_ratio))
    return {
        "bundle": f"{bundle.path.resolve().name}: {manifest.family}, {manifest.dtype}",
        "sha256 of its bundle.json": sha256(bundle.path / MANIFEST),
        "parameters of tango": {
            **asdict(used),
            "retention_ratio": ratios,
            "segment_threshold": [used.at(ratio).tau_segment for ratio in ratios],
            "sink_positions": used.sinks,
        },
        "data": SYNTHETIC if args.data == SYNTHETIC else Path(args.data).resolve().name,
        "seed": args.seed,
        "videos": len(videos),
        "questions": sum(len(video.questions) for video in videos),
        "frames": args.frames or manifest.video.frames,
        "max_new_tokens": args.max_new_tokens,
        "engine": ", ".join(engines),
        "jobs": args.jobs,
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "versions": {
            "tango-edge": version("tango-edge"),
            "numpy": np.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


EVALUATE = Command(_configure, _evaluate)
