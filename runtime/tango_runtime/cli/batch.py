"""`tango batch`: questions about many videos, answered into a file that any interrupted run can go on with."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tango_runtime.batch.answers import AnswerFile, ErrorFile, error_path
from tango_runtime.batch.questions import read_questions
from tango_runtime.batch.run import Usage, answer_here, missing, write
from tango_runtime.batch.tables import require_pyarrow, write_rows
from tango_runtime.batch.worker import Outcome, SamplingOptions, Settings, Task, VideoOptions, Worker
from tango_runtime.cli.args import (
    add_backend,
    add_bundle,
    add_output,
    add_pruning,
    add_sampling,
    add_video_options,
    new_file,
    non_negative_int,
    sampling_options,
    video_options,
)
from tango_runtime.cli.command import Command
from tango_runtime.util.console import progress, status
from tango_runtime.util.files import check_apart

_PARQUET = ".parquet"

#: Most processes that decode by default: FFmpeg has threads of its own in each.
_DECODERS = 8


def _configure(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser, nargs="+")
    parser.add_argument(
        "questions", type=Path, help="questions: a .jsonl or .parquet file, or a folder saved by Hugging Face datasets"
    )
    add_output(
        parser,
        "FILE",
        "answers as .jsonl, gone on with if it exists; .parquet is made from a .jsonl beside it",
        required=True,
    )
    parser.add_argument(
        "--video-folder",
        type=Path,
        metavar="FOLDER",
        help="folder that paths of videos are relative to (default: that of the questions)",
    )
    add_video_options(parser)
    add_pruning(parser, nargs="+")
    add_sampling(parser)
    add_backend(parser)
    parser.add_argument(
        "--decoders",
        type=non_negative_int,
        default=min(_DECODERS, max(len(os.sched_getaffinity(0)) // 2, 1)),
        metavar="N",
        help="number of processes that decode videos ahead (default: half of the cores, at most 8)",
    )


def _run(args: argparse.Namespace) -> int:
    answers, table = _outputs(args.output)
    outputs = {"--output": args.output, "the file of answers": answers if table else None}
    outputs["the file of errors"] = error_path(answers)
    inputs = {"the questions": args.questions} | {f"the bundle {folder}": folder for folder in args.bundle}
    check_apart(outputs, inputs)
    settings = _settings(args)
    trials = settings.trials()
    videos, failures = read_questions(args.questions, args.video_folder)
    with AnswerFile(answers, trials, videos) as file, ErrorFile(answers) as errors:
        for failure in failures:
            errors.append(failure)
        tasks = missing(videos, trials, file)
        status(f"{sum(map(len, tasks))} answers to give, about {len(tasks)} videos; {file.lines} are there")
        if tasks:
            _answer(args, settings, tasks, file, errors)
        status(f"answers: {answers} ({file.lines})")
        if errors.lines:
            status(f"errors: {errors.path} ({errors.lines})")
        if table:
            write_rows(table, file.rows())
            status(f"table: {table}")
        return 1 if errors.lines else 0


def _outputs(output: Path) -> tuple[Path, Path | None]:
    """The file of answers, and the table that is made from it."""
    if output.suffix != _PARQUET:
        return output, None
    require_pyarrow(output)
    return output.with_suffix(".jsonl"), new_file(str(output))


def _settings(args: argparse.Namespace) -> Settings:
    options = video_options(args)
    prune, ratios = options.pop("prune"), options.pop("retention_ratio")
    kept: tuple[float | None, ...] = tuple(ratios or ()) if prune else (None,)
    return Settings(tuple(args.bundle), kept, VideoOptions(**options), SamplingOptions(**sampling_options(args)))


def _answer(
    args: argparse.Namespace, settings: Settings, tasks: list[Task], file: AnswerFile, errors: ErrorFile
) -> None:
    with _outcomes(args, settings, tasks) as (outcomes, usage):
        begin = file.lines

        def note() -> str:
            rate = (file.lines - begin) / max(usage.seconds, 1e-9)
            wrong = f", {errors.lines} errors" if errors.lines else ""
            return f"{rate:.3g} answers/s, model busy {usage.share:.0%}{wrong}"

        with progress("answers", sum(map(len, tasks)), note=note) as on_progress:
            write(outcomes, file, errors, on_progress)
        status(f"{note()}, {usage.seconds:.1f} s")


@contextmanager
def _outcomes(
    args: argparse.Namespace, settings: Settings, tasks: list[Task]
) -> Iterator[tuple[Iterator[Outcome], Usage]]:
    """Answers as they come, and how busy the models are."""
    with closing(Worker(settings, args.backend, decoders=args.decoders)) as worker:
        status(f"backend: {worker.description}")
        usage = Usage()
        yield answer_here(worker, tasks, usage), usage


BATCH = Command(_configure, _run)
