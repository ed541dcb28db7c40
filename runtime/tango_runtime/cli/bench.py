"""`tango bench`: time of each stage of a bundle on this machine, time to the first token, and memory."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tango_plugins import TangoError
from tango_runtime.bench.conditions import gpu_state, machine, without_folder
from tango_runtime.bench.measure import (
    BUDGET,
    CLIP,
    DEVICE_METRIC,
    EVENT_TIMED,
    HOST_METRIC,
    Bench,
    Case,
    Measured,
    Samples,
    Setting,
    cold_start,
    make_clip,
    require_room,
    spread,
)
from tango_runtime.bench.sampling import compare_sampling, cores
from tango_runtime.bundle import Bundle
from tango_runtime.cli.args import (
    STDOUT,
    add_backend,
    add_bundle,
    add_count,
    add_frame,
    add_frames,
    add_json,
    add_nvdec,
    add_pruning,
    add_sampling_of_frames,
    add_seed,
    write_json,
)
from tango_runtime.cli.command import Command
from tango_runtime.util.console import OnProgress, progress, status
from tango_runtime.util.files import check_apart
from tango_runtime.util.units import megabytes
from tango_runtime.video import open_source

_COLD_STARTS = 3
_MAX_PIXELS = 8192  # per side
_CLOCKS = {
    True: f"{', '.join(EVENT_TIMED)} by CUDA events in the backend's stream, the rest by the host's clock",
    False: "by the host's clock",
}


@dataclass
class _Result:
    """A case and its measurements: samples by system, or why there are none."""

    case: Case
    measured: Measured | None = None
    systems: dict[str, Samples] = field(default_factory=dict)
    errors: dict[str, TangoError] = field(default_factory=dict)


@dataclass
class _Results:
    """Everything that is printed and written at the end."""

    bundle: Bundle
    setting: Setting
    cases: list[_Result]
    conditions: dict[str, Any] = field(default_factory=dict)
    cold_starts: list[dict[str, float]] = field(default_factory=list)
    clock: str = ""
    sampling: dict[str, list[float] | str] = field(default_factory=dict)


def _configure(parser: argparse.ArgumentParser) -> None:
    default = Setting()
    add_bundle(parser)
    add_backend(parser)
    add_nvdec(parser)
    add_frames(parser)
    add_frame(parser, "what follows from the clip's")
    parser.add_argument("--video", metavar="FILE", help="video file to measure with (default: a generated clip)")
    add_sampling_of_frames(parser)
    add_pruning(parser)
    parser.add_argument("--only-pruned", action="store_true", help="do not run unpruned (default: run both)")
    parser.add_argument(
        "--source-size",
        type=_size,
        nargs="+",
        metavar="WIDTHxHEIGHT",
        help="size of the clip's frames before resizing (default: the bundle's, which needs no resizing)",
    )
    add_count(parser, "--decode-tokens", "tokens to generate after the first", default.decode_tokens)
    add_count(parser, "--warm-up", "answers before measuring", default.warm_up)
    add_count(parser, "--repeats", "answers to measure", default.repeats)
    add_seed(parser, default.seed)
    parser.add_argument(
        "--cold-start", action="store_true", help="also measure new processes from their start to the first token"
    )
    parser.add_argument(
        "--compare-torch",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="also run transformers, with random weights of the checkpoint's shapes (default: the bundle's checkpoint)",
    )
    parser.add_argument(
        "--torch-compile",
        action="store_true",
        help="with --compare-torch, also compile transformers' vision tower and prefill",
    )
    add_json(parser)


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = map(int, text.split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 1920x1080") from error
    if not (1 <= width <= _MAX_PIXELS and 1 <= height <= _MAX_PIXELS):
        raise argparse.ArgumentTypeError(f"{text!r} has a side outside 1 to {_MAX_PIXELS} pixels")
    return width, height


def _run(args: argparse.Namespace) -> int:
    counts = args.decode_tokens, args.warm_up, args.repeats
    video = args.video, args.sampling, args.nvdec
    setting = Setting(args.frames, args.retention_ratio, *counts, args.seed, args.frame, *video)
    _check(args)
    bundle = Bundle.load(args.bundle)
    results = _Results(bundle, setting, [_Result(case) for case in _cases(args, bundle)])
    require_room(bundle, setting, results.cases[0].case)
    results.conditions = {"machine": machine(), "gpu_before": gpu_state()}
    if args.cold_start:  # before anything else takes memory
        results.cold_starts = _start_cold(args, setting, results.cases[0].case)
    bench = Bench(bundle, args.backend, setting)
    status(f"backend: {bench.description}")
    _measure(bench, results)
    if args.video:
        results.sampling = compare_sampling(Path(args.video), setting.frames_of(bundle), setting.repeats)
    results.conditions |= {"gpu_after": gpu_state(), "backend": bench.description, "load_ms": bench.load_ms}
    results.clock = _CLOCKS[bench.on_device]
    on_device = bench.on_device
    del bench  # frees its memory for transformers
    if args.compare_torch is not None:
        _compare(args.compare_torch or bundle.manifest.source.checkpoint, results, on_device, args.torch_compile)
    if args.json:  # before it is printed: the reader of standard output may have closed it
        write_json(args.json, _as_json(results))
    _print(results, table=args.json != STDOUT)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Finds what would otherwise fail only after everything has been measured."""
    checkpoint = Path(args.compare_torch) if args.compare_torch else None
    video = Path(args.video) if args.video else None
    check_apart({"--json": args.json}, {"the bundle": args.bundle, "--compare-torch": checkpoint, "--video": video})
    if args.video and (args.source_size or args.compare_torch is not None):
        raise TangoError(
            "--video was given with --source-size or --compare-torch, which are for generated clips", "drop one of them"
        )
    if args.sampling != "exact" and not args.video:
        raise TangoError("only video files have keyframes", "name one: --video FILE")
    if args.nvdec and not args.video:
        raise TangoError("a GPU decodes video files", "name one: --video FILE")
    if args.no_prune and args.only_pruned:
        raise TangoError("--no-prune and --only-pruned are mutually exclusive", "drop one of them")
    if args.torch_compile and args.compare_torch is None:
        raise TangoError("--torch-compile compiles what --compare-torch runs", "add --compare-torch")
    if args.compare_torch is not None and not (find_spec("torch") and find_spec("transformers")):
        raise TangoError("--compare-torch needs torch and transformers", "pip install 'tango-edge[validate]'")


def _cases(args: argparse.Namespace, bundle: Bundle) -> list[Case]:
    """Pruned cases first: the peak of memory only grows, and theirs is lower."""
    height, width = bundle.manifest.video.size
    if args.video:
        height, width = open_source(args.video, sampling=args.sampling).frame_size or (height, width)
    prunes = [*([] if args.no_prune else [True]), *([] if args.only_pruned else [False])]
    return [Case(prune, *size) for prune, size in itertools.product(prunes, args.source_size or [(width, height)])]


def _start_cold(args: argparse.Namespace, setting: Setting, case: Case) -> list[dict[str, float]]:
    with progress("cold start", _COLD_STARTS) as on_progress:
        started = []
        for _ in range(_COLD_STARTS):
            started.append(cold_start(args.bundle, args.backend, setting, case))
            on_progress(1)
    return started


def _measure(bench: Bench, results: _Results) -> None:
    def measure(result: _Result, on_progress: OnProgress) -> Samples:
        result.measured = bench.measure(result.case, on_progress)
        return result.measured.milliseconds

    _each(results, "tango", results.cases, measure)
    if not any(result.measured for result in results.cases):
        raise results.cases[0].errors["tango"]


def _compare(checkpoint: str, results: _Results, on_device: bool, compiles: bool) -> None:
    from tango_runtime.bench.peer import Peer, Shape  # imported here: it takes seconds, and a device has no torch

    measured, setting = [result for result in results.cases if result.measured], results.setting
    try:
        peer = Peer(checkpoint, results.bundle.manifest, setting, on_device, compiles)
    except TangoError as error:  # keep what has been measured
        for result in measured:
            result.errors["transformers"] = error
        return
    status(f"peer: {peer.description}")
    results.conditions["peer"] = peer.description
    if compiles:
        results.conditions["torch_compile"] = peer.compilations  # grows with every case
    for system, run in peer.systems.items():

        def measure(result: _Result, on_progress: OnProgress, run: Callable[..., Samples] = run) -> Samples:
            assert result.measured
            clip = make_clip(result.case, setting.frames_of(results.bundle), setting.seed)
            video = results.bundle.manifest.video
            return run(Shape.of(clip, result.measured, video, setting), on_progress)

        _each(results, system, measured, measure)


def _each(
    results: _Results, system: str, cases: list[_Result], measure: Callable[[_Result, OnProgress], Samples]
) -> None:
    """Measures the cases one after the other; one that fails does not stop the others."""
    answers = len(cases) * (results.setting.warm_up + results.setting.repeats)
    with progress(f"measuring {system}", answers) as on_progress:
        for result in cases:
            try:
                result.systems[system] = measure(result, on_progress)
            except TangoError as error:  # its traceback would keep the backend alive
                result.errors[system] = TangoError(error.message, error.hint)


# Output.


def _print(results: _Results, *, table: bool) -> None:
    console = Console(soft_wrap=True, markup=False)
    for result in results.cases:
        if result.measured and table:
            console.print(_table(result, result.measured, results.setting))
        for system, error in result.errors.items():
            status(f"{system}, {result.case.name}: not measured: {error.message} ({error.hint})")
    status("")
    for line in _notes(results):
        status(line)


def _table(result: _Result, measured: Measured, setting: Setting) -> Table:
    """Milliseconds of one case: the pipeline's p50, p90 and minimum, and the median of each system compared with it."""
    peers = [system for system in result.systems if system != "tango"]
    table = Table(title=_title(result.case, measured), caption=_memory(measured), box=None, header_style="bold")
    table.title_justify = table.caption_justify = "left"
    table.add_column("ms")
    for name in ("p50", "p90", "min", *(f"{system} p50" for system in peers)):
        table.add_column(name, justify="right")
    labels = {"decode": "decode, per token", "answer": f"answer, {1 + setting.decode_tokens} tokens"}
    for stage, samples in measured.milliseconds.items():
        found = spread(samples)
        others = [_median(result.systems[system].get(stage)) for system in peers]
        table.add_row(labels.get(stage, stage), *(_ms(found[name]) for name in ("p50", "p90", "min")), *others)
    return table


def _title(case: Case, measured: Measured) -> str:
    budget = f" ({BUDGET} budget)" if case.prune else ""
    kept = f"kept {measured.kept} of {measured.total} tokens{budget}"
    upper = "" if measured.thinned is None else f", {measured.thinned} of the video's {measured.rows} in upper layers"
    return f"\n{case.name}: {kept}, prompt of {measured.prompt_tokens} positions{upper}"


def _memory(measured: Measured) -> str:
    device = measured.device_memory
    on_gpu = "" if device is None else f"{megabytes(device)} on the GPU (without the CUDA context), "
    return f" peak memory so far: {on_gpu}{megabytes(measured.host_memory)} on the host"


def _median(samples: list[float] | None) -> str:
    return _ms(spread(samples)["p50"]) if samples else "–"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _notes(results: _Results) -> Iterator[str]:
    yield f"milliseconds: {results.clock}"
    yield f"backend loaded in {results.conditions['load_ms']:.0f} ms"
    if results.cold_starts:
        names = ("import", "load", "first token", "total")
        medians = {name: spread([started[name] for started in results.cold_starts])["p50"] for name in names}
        times = ", ".join(f"{name} {ms:.0f}" for name, ms in medians.items())
        yield f"cold start, median of {len(results.cold_starts)} processes, ms: {times}"
    if results.sampling:
        yield f"sampling alone, to RGB frames on the host, {cores()} cores, median ms: " + ", ".join(
            f"{name} {found if isinstance(found, str) else _ms(spread(found)['p50'])}"
            for name, found in results.sampling.items()
        )
    for found in results.conditions.get("torch_compile", []):
        counts = f"graphs: {found['graphs']}, graph breaks: {found['graph_breaks']}"
        yield f"{found['system']}: {found['part']} compiled before measuring, in {found['seconds']:.1f} s; {counts}"
    processes = results.conditions["gpu_before"].get("processes")
    if processes:
        yield f"other processes were on the GPU: {'; '.join(processes)}"


def _as_json(results: _Results) -> dict[str, Any]:
    manifest, setting = results.bundle.manifest, results.setting
    video = Path(setting.video).name if setting.video else None
    return {
        "conditions": results.conditions,
        "bundle": {
            "name": results.bundle.path.resolve().name,
            "family": manifest.family,
            "dtype": manifest.dtype,
            "precision": {name: manifest.precision(name) for name in ("vision", *manifest.decoders)},
            "decoder": asdict(manifest.decoder),
            "source": {name: value and without_folder(value) for name, value in vars(manifest.source).items()},
        },
        "setting": vars(setting) | {"video": video, "budget": BUDGET, "batch": 1, "clip": CLIP},
        "metrics": {"milliseconds": results.clock, "device_memory": DEVICE_METRIC, "host_memory": HOST_METRIC},
        "cold_starts": results.cold_starts,
        "sampling_alone": {
            name: found if isinstance(found, str) else spread(found) for name, found in results.sampling.items()
        },
        "cases": [_case(result) for result in results.cases],
    }


def _case(result: _Result) -> dict[str, Any]:
    measured = vars(result.measured) if result.measured else {}
    return {
        "name": result.case.name,
        **vars(result.case),
        **{name: value for name, value in measured.items() if name != "milliseconds"},
        "milliseconds": {
            system: {stage: spread(values) for stage, values in samples.items()}
            for system, samples in result.systems.items()
        },
        "not_measured": {system: {"error": e.message, "hint": e.hint} for system, e in result.errors.items()},
    }


BENCH = Command(_configure, _run)
