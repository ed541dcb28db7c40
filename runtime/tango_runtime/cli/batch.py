"""`tango batch`: questions about many videos, answered into a file that any interrupted run can go on with."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from tango_plugins import TangoError
from tango_runtime.batch.answers import AnswerFile, ErrorFile, error_path
from tango_runtime.batch.decoding import default_count
from tango_runtime.batch.questions import read_questions
from tango_runtime.batch.ray_pool import Pool, connected
from tango_runtime.batch.run import Usage, answer_here, answer_on_ray, missing, write
from tango_runtime.batch.tables import require_pyarrow, write_rows
from tango_runtime.batch.worker import Outcome, SamplingOptions, Settings, Task, Worker
from tango_runtime.cli.args import (
    add_backend,
    add_bundle,
    add_output,
    add_pruning,
    add_ray,
    add_sampling,
    add_video_options,
    new_file,
    non_negative_int,
    positive_int,
    sampling_options,
    video_options,
)
from tango_runtime.cli.command import Command
from tango_runtime.util.console import progress, status
from tango_runtime.util.files import check_apart
from tango_runtime.video.shape import FrameOptions

_PARQUET = ".parquet"


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
        metavar="N",
        help="number of processes that decode videos ahead of a model (default: half of its cores, at most 8)",
    )
    parser.add_argument(
        "--gpu-decoders",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="number of further processes that decode video files on the GPU where it can, best as many as it has "
        "NVDEC units; frames of damaged files may differ (default: %(default)s)",
    )
    add_ray(parser)
    parser.add_argument(
        "--models-per-gpu",
        type=positive_int,
        default=1,
        metavar="N",
        help="workers that share a GPU of the Ray cluster, each with its own model there: one computes while another "
        "waits for the host (default: %(default)s)",
    )


def _run(args: argparse.Namespace) -> int:
    if args.models_per_gpu > 1 and args.ray is None:
        raise TangoError("--models-per-gpu is for workers of a Ray cluster", "add --ray local for this machine")
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
    bundles = tuple(folder.absolute() for folder in args.bundle)  # a node may stand elsewhere
    return Settings(bundles, kept, FrameOptions(**options), SamplingOptions(**sampling_options(args)))


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
            write(outcomes, tasks, file, errors, on_progress)
        status(f"{note()}, {usage.seconds:.1f} s")


@contextmanager
def _outcomes(
    args: argparse.Namespace, settings: Settings, tasks: list[Task]
) -> Iterator[tuple[Iterator[Outcome], Usage]]:
    """Answers as they come, and how busy the models are."""
    usage = Usage()
    if args.ray is not None:
        open_worker = partial(_open_worker, settings, args.backend, args.decoders, args.gpu_decoders)

        def on_open(description: str) -> None:
            if pool.workers == 1:  # until then nothing could be answered
                usage.restart()
            status(f"worker: {description}")

        pool: Pool[Task, Outcome] = Pool(open_worker, on_open, args.models_per_gpu)
        with connected(args.ray):
            yield answer_on_ray(pool, tasks, usage), usage
        return
    in_software = default_count() if args.decoders is None else args.decoders
    counts = (min(count, len(tasks)) for count in (in_software, args.gpu_decoders))  # more would only wait
    with closing(_open_worker(settings, args.backend, *counts)) as worker:
        for task in tasks[: worker.early]:
            worker.add(task)
        worker.load()
        status(f"backend: {worker.description}")
        usage.restart()
        yield answer_here(worker, tasks[worker.early :], usage), usage


def _open_worker(settings: Settings, backend: str, decoders: int | None, gpu_decoders: int, models: int = 1) -> Worker:
    """A worker on a machine that it shares with so many models."""
    in_software = default_count(models) if decoders is None else decoders
    return Worker(settings, backend, decoders=in_software, gpu_decoders=gpu_decoders)


BATCH = Command(_configure, _run)
