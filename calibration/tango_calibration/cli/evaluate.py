"""`tango evaluate`: accuracy of a bundle, pruned and unpruned, with Tango and with baselines."""

from __future__ import annotations

import argparse
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tango_calibration.cli.args import add_data, add_videos
from tango_calibration.data.dataset import SYNTHETIC, Video, read_folder, synthetic
from tango_calibration.evaluation import results
from tango_calibration.evaluation.answers import read_answers, records_of
from tango_calibration.evaluation.evaluate import (
    BundleEvaluator,
    Record,
    Trial,
    check_room,
    evaluate_in_parallel,
    trials_of,
)
from tango_calibration.evaluation.methods import METHODS, tango_params
from tango_calibration.evaluation.scores import Scores
from tango_calibration.parallel import threads_of
from tango_plugins import PruneParams, TangoError
from tango_plugins.version import package_version
from tango_runtime.batch.answers import Answered
from tango_runtime.bundle import MANIFEST, Bundle, Manifest, sha256
from tango_runtime.cli.args import (
    add_backend,
    add_bundle,
    add_count,
    add_frame_size,
    add_frames,
    add_jobs,
    add_max_new_tokens,
    add_output,
    add_overwrite,
    add_ray,
    add_retention_ratio,
    add_sampling_of_frames,
    add_seed,
)
from tango_runtime.cli.command import Command
from tango_runtime.util.console import progress, status
from tango_runtime.util.files import check_apart, check_output

_log = logging.getLogger(__name__)

_CLIPS, _QUESTIONS = 100, 8


def _configure(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser, nargs="?")
    parser.add_argument(
        "--answers",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="score answers of tango batch to the questions of --data, in place of asking a bundle",
    )
    add_data(parser)
    add_videos(parser, note=f"all of a folder, {_CLIPS} generated clips")
    add_count(parser, "--questions", "maximum number of questions per generated clip", note=str(_QUESTIONS))
    add_frames(parser)
    add_sampling_of_frames(parser)
    add_frame_size(parser)
    add_retention_ratio(parser, "0.05 0.1 0.15 0.2", nargs="+", default=[0.05, 0.1, 0.15, 0.2])
    parser.add_argument(
        "--method",
        nargs="+",
        default=list(METHODS),
        metavar="METHOD",
        help=f"pruning methods to compare, beside keeping all tokens and none (default: {' '.join(METHODS)})",
    )
    add_seed(parser, 0)
    add_max_new_tokens(parser, 16)
    add_jobs(parser, 1)
    add_ray(parser)
    add_backend(parser)
    add_output(parser, "FOLDER", "results.json, results.md and accuracy.png; default: none")
    add_overwrite(parser)


def _run(args: argparse.Namespace) -> int:
    if (args.bundle is None) == (args.answers is None):
        raise TangoError("either a bundle or --answers is needed", "give a bundle to be asked, or answers to be scored")
    return _evaluate(args) if args.answers is None else _score(args)


def _score(args: argparse.Namespace) -> int:
    inputs = {f"the answers {file}": file for file in args.answers}
    check_apart({"--output": args.output}, inputs | {"--data": Path(args.data)})
    if args.data == SYNTHETIC:
        raise TangoError("--answers needs the questions that were answered", "name their folder or table: --data")
    _check_output(args)
    videos, answers = read_folder(Path(args.data), 1, videos=False), read_answers(args.answers)
    if args.output and len(answers) > 1:
        raise TangoError(f"--output is for one bundle, these are {', '.join(answers)}", "leave --output out")
    incomplete = False
    for bundle, mine in answers.items():
        records, left_out = records_of(mine, videos)
        incomplete |= bool(left_out)
        scores = Scores(records)
        summaries = [scores.summary(trial) for trial in scores.trials]
        if args.output:
            conditions = _scoring_conditions(args, mine, records)
            asked = [video.only({record.question for record in records}) for video in videos]
            results.write(
                args.output, conditions, [v for v in asked if v.ids], records, summaries, overwrite=args.overwrite
            )
            status(f"results: {args.output}")
        print(f"# {bundle}", "", *results.overall(summaries), *results.by("type", summaries), sep="\n")
        if left_out:
            _log.warning("%s: %d questions without an answer in every trial are left out", bundle, len(left_out))
    if not answers:
        raise TangoError("the files have no answers", "answer the questions first: tango batch")
    return 1 if incomplete else 0


def _scoring_conditions(
    args: argparse.Namespace, answers: Sequence[Answered], records: Sequence[Record]
) -> dict[str, Any]:
    """The conditions that scores of answers are valid for."""
    return {
        "bundle": answers[0].bundle,
        "settings of the answers": answers[0].settings,
        "answers": [file.name for file in args.answers],
        "data": Path(args.data).resolve().name,
        "questions": len({record.question for record in records}),
        "versions": {"tango-edge": package_version(), "numpy": np.__version__},
    }


def _evaluate(args: argparse.Namespace) -> int:
    check_apart({"--output": args.output}, {"the bundle": args.bundle, "--data": Path(args.data)})
    bundle = Bundle.load(args.bundle)
    params = bundle.manifest.params
    trials = trials_of(args.method, [params.at(ratio).retention_ratio for ratio in args.retention_ratio])
    _check_output(args)
    videos = _videos(args, bundle)
    check_room(bundle, videos, frame_size=args.frame, max_pixels=args.max_pixels)
    records, backends, failures = _ask(args, params, videos, trials)
    if failures and not records:
        raise next(iter(failures.values()))
    videos = [video for video in videos if video.name not in failures]
    scores = Scores(records)
    summaries = [scores.summary(trial) for trial in trials]
    if args.output:  # before printing, which fails if the reader of standard output has closed it
        conditions = _conditions(args, bundle, videos, backends)
        if failures:
            conditions["videos left out"] = {name: error.message for name, error in failures.items()}
        results.write(args.output, conditions, videos, records, summaries, overwrite=args.overwrite)
        status(f"results: {args.output}")
    print(*results.overall(summaries), *results.by("type", summaries), sep="\n")
    for name, error in failures.items():
        _log.warning("%s is left out of these figures: %s", name, error)
    return 1 if failures else 0


def _ask(
    args: argparse.Namespace, params: PruneParams, videos: Sequence[Video], trials: Sequence[Trial]
) -> tuple[list[Record], list[str], dict[str, TangoError]]:
    """Returns the records, descriptions of the backends, and the errors of videos that could not be evaluated."""
    open_evaluator = partial(
        BundleEvaluator,
        args.bundle.absolute(),  # a Ray node may have another working directory
        args.backend,
        max_new_tokens=args.max_new_tokens,
        threads=threads_of(args.jobs, args.ray),
        frame_size=args.frame,
        max_pixels=args.max_pixels,
        sampling=args.sampling,
    )
    backends: list[str] = []
    failures: dict[str, TangoError] = {}
    with progress("videos", len(videos)) as on_progress:
        records = evaluate_in_parallel(
            open_evaluator,
            videos,
            trials,
            params,
            on_progress,
            jobs=args.jobs,
            ray=args.ray,
            seed=args.seed,
            opened=backends.append,
            on_failure=lambda video, error: failures.update({video.name: error}),
        )
    return records, backends, failures


def _check_output(args: argparse.Namespace) -> None:
    """Checks that results can be written, before the work."""
    if args.output:
        check_output(args.output, overwrite=args.overwrite, holding=results.RESULTS)
        results.require_matplotlib()


def _videos(args: argparse.Namespace, bundle: Bundle) -> list[Video]:
    frames = args.frames or bundle.manifest.video.frames
    if args.data == SYNTHETIC:
        if args.sampling != "exact":
            raise TangoError("only video files have keyframes", "name a folder of them: --data FOLDER")
        return synthetic(args.videos or _CLIPS, seed=args.seed, questions=args.questions or _QUESTIONS, frames=frames)
    if args.questions:
        raise TangoError("--questions is for generated clips", "drop it: a folder comes with its own questions")
    folder = Path(args.data).absolute() if args.ray else Path(args.data)  # as in _ask()
    return read_folder(folder, frames)[: args.videos]


def _conditions(
    args: argparse.Namespace, bundle: Bundle, videos: Sequence[Video], backends: Sequence[str]
) -> dict[str, Any]:
    """The conditions that the results are valid for."""
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
        "sampling": args.sampling,
        "frame size": _frame_size(args, manifest),
        "max_new_tokens": args.max_new_tokens,
        "backend": ", ".join(backends),
        "jobs": args.jobs,
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "versions": {
            "tango-edge": package_version(),
            "numpy": np.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


def _frame_size(args: argparse.Namespace, manifest: Manifest) -> str:
    if manifest.video.budget is None or args.frame:
        height, width = args.frame or manifest.video.size
        return f"{height}x{width}"
    return f"by aspect ratio, at most {args.max_pixels or manifest.video.budget.max_pixels} pixels"


EVALUATE = Command(_configure, _run)
