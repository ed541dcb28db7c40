"""`tango bench`: how long each stage of a bundle takes here, how long the first token, and how much memory it takes."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tango_plugins import TangoError
from tango_runtime.backends.registry import BACKENDS
from tango_runtime.bench.conditions import gpu_state, machine, placeless
from tango_runtime.bench.measure import (
    BUDGET,
    CLIP,
    DEVICE_METRIC,
    HOST_METRIC,
    MARKED,
    Bench,
    Case,
    Measured,
    Samples,
    Setting,
    cold_start,
    make_clip,
    spread,
)
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import Command
from tango_runtime.util.console import OnProgress, progress, status
from tango_runtime.util.locking import staged_file

_COLD_STARTS = 3
_MOST_PIXELS = 8192  # of a side
_CLOCKS = {
    True: f"{', '.join(MARKED)} between CUDA events in the engine's stream, the rest by the host's clock",
    False: "by the host's clock",
}


@dataclass
class _Result:
    """A case and what came of it: by system, samples or why there are none."""

    case: Case
    measured: Measured | None = None
    systems: dict[str, Samples] = field(default_factory=dict)
    refused: dict[str, TangoError] = field(default_factory=dict)


@dataclass
class _Report:
    """All that is told in the end."""

    bundle: Bundle
    setting: Setting
    results: list[_Result]
    conditions: dict[str, Any] = field(default_factory=dict)
    cold_starts: list[dict[str, float]] = field(default_factory=list)
    clock: str = ""


def _configure(parser: argparse.ArgumentParser) -> None:
    default = Setting()
    parser.add_argument("bundle", type=Path, help="folder that tango-export made")
    parser.add_argument(
        "--backend", default="auto", choices=["auto", *BACKENDS], help="what runs the graphs (default: %(default)s)"
    )
    parser.add_argument("--frames", type=int, help="frames of the clip (default: the bundle's)")
    parser.add_argument("--retention-ratio", type=float, help="fraction of video tokens kept (default: the bundle's)")
    parser.add_argument("--only", choices=("pruned", "unpruned"), help="measure one of them (default: both)")
    parser.add_argument(
        "--source-size",
        type=_size,
        nargs="+",
        metavar="WIDTHxHEIGHT",
        help="frames before they are resized (default: as the bundle takes them, so that none is)",
    )
    for name, what in (
        ("decode-tokens", "tokens behind the first"),
        ("warm-up", "answers that do not count"),
        ("repeats", "answers that count"),
        ("seed", "of the clip"),
    ):
        preset = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=preset, help=f"{what} (default: %(default)s)")
    parser.add_argument("--cold-start", action="store_true", help="also start new processes, up to their first token")
    parser.add_argument(
        "--compare-torch",
        nargs="?",
        const="",
        metavar="CHECKPOINT",
        help="also run transformers, with random weights of the checkpoint's shapes (default: the bundle's checkpoint)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and conditions")


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = map(int, text.split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, as 1920x1080 is") from error
    if not (1 <= width <= _MOST_PIXELS and 1 <= height <= _MOST_PIXELS):
        raise argparse.ArgumentTypeError(f"{text!r} has a side out of 1 to {_MOST_PIXELS} pixels")
    return width, height


def _run(args: argparse.Namespace) -> int:
    setting = Setting(args.frames, args.retention_ratio, args.decode_tokens, args.warm_up, args.repeats, args.seed)
    _check(args)
    bundle = Bundle.load(args.bundle)
    results = [_Result(case) for case in _cases(args, bundle)]
    report = _Report(bundle, setting, results)
    report.conditions = {"machine": machine(), "gpu_before": gpu_state()}
    if args.cold_start:  # before anything else takes memory
        report.cold_starts = _start_cold(args, setting, results[0].case)
    bench = Bench(bundle, args.backend, setting)
    status(f"engine: {bench.description}")
    _measure(bench, report)
    report.conditions |= {"gpu_after": gpu_state(), "engine": bench.description, "load_ms": bench.load_ms}
    report.clock = _CLOCKS[bench.on_device]
    on_device = bench.on_device
    del bench  # its memory is transformers' now
    if args.compare_torch is not None:
        _compare(args.compare_torch or bundle.manifest.source.checkpoint, report, on_device)
    _print(report)
    if args.json:
        with staged_file(args.json) as (partial, _):
            partial.write_text(json.dumps(_as_json(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(args.json)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses what would otherwise be refused when all has been measured."""
    if args.json and not args.json.resolve().parent.is_dir():
        raise TangoError(f"there is no folder {args.json.resolve().parent}", "make it, or name another file")
    if args.json and args.json.is_dir():
        raise TangoError(f"{args.json} is a folder", "name a file in it")
    if args.compare_torch is not None and not (find_spec("torch") and find_spec("transformers")):
        raise TangoError("--compare-torch needs torch and transformers", "pip install 'tango-edge[validate]'")


def _cases(args: argparse.Namespace, bundle: Bundle) -> list[Case]:
    """Pruned ones first: memory grows to a peak, and theirs is the lower."""
    edge = bundle.manifest.video.size[0]
    prunes = [True, False] if args.only is None else [args.only == "pruned"]
    return [Case(prune, *size) for prune, size in itertools.product(prunes, args.source_size or [(edge, edge)])]


def _start_cold(args: argparse.Namespace, setting: Setting, case: Case) -> list[dict[str, float]]:
    with progress("cold start", _COLD_STARTS) as on_progress:
        started = []
        for _ in range(_COLD_STARTS):
            started.append(cold_start(args.bundle, args.backend, setting, case))
            on_progress(1)
    return started


def _measure(bench: Bench, report: _Report) -> None:
    def measure(result: _Result, on_progress: OnProgress) -> Samples:
        result.measured = bench.measure(result.case, on_progress)
        return result.measured.milliseconds

    _each(report, "tango", report.results, measure)
    if not any(result.measured for result in report.results):
        raise report.results[0].refused["tango"]


def _compare(checkpoint: str, report: _Report, on_device: bool) -> None:
    from tango_runtime.bench.peer import Peer, Shape  # late: it takes seconds, and a device has no torch

    results, setting = [result for result in report.results if result.measured], report.setting
    try:
        peer = Peer(checkpoint, report.bundle.manifest, setting, on_device)
    except TangoError as error:  # what has been measured is not lost
        for result in results:
            result.refused["transformers"] = error
        return
    status(f"peer: {peer.description}")
    report.conditions["peer"] = peer.description
    for system, run in peer.systems.items():

        def measure(result: _Result, on_progress: OnProgress, run: Callable[..., Samples] = run) -> Samples:
            assert result.measured
            clip = make_clip(result.case, setting.frames_of(report.bundle), setting.seed)
            return run(Shape.of(clip, result.measured), on_progress)

        _each(report, system, results, measure)


def _each(
    report: _Report, system: str, results: list[_Result], measure: Callable[[_Result, OnProgress], Samples]
) -> None:
    """Measures the cases in turn; one that is refused does not keep the others from being measured."""
    with progress(
        f"measuring {system}", len(results) * (report.setting.warm_up + report.setting.repeats)
    ) as on_progress:
        for result in results:
            try:
                result.systems[system] = measure(result, on_progress)
            except TangoError as error:  # itself, it would hold on to the engine by its traceback
                result.refused[system] = TangoError(error.message, error.hint)


# What is told.


def _print(report: _Report) -> None:
    console = Console(soft_wrap=True)
    for result in report.results:
        if result.measured:
            console.print(_table(result, result.measured, report.setting))
        for system, error in result.refused.items():
            status(f"{system}, {result.case.name}: not measured: {error.message} ({error.hint})")
    status("")
    for line in _notes(report):
        status(line)


def _table(result: _Result, measured: Measured, setting: Setting) -> Table:
    """Milliseconds of one case: the chain's p50, p90 and least, and the median of what it is compared with."""
    peers = [system for system in result.systems if system != "tango"]
    table = Table(title=_title(result.case, measured), caption=_memory(measured), box=None, header_style="bold")
    table.title_justify = table.caption_justify = "left"
    table.add_column("ms")
    for name in ("p50", "p90", "min", *(f"{system} p50" for system in peers)):
        table.add_column(name, justify="right")
    labels = {"decode": "decode, a token", "answer": f"answer, {1 + setting.decode_tokens} tokens"}
    for stage, samples in measured.milliseconds.items():
        found = spread(samples)
        others = [_median(result.systems[system].get(stage)) for system in peers]
        table.add_row(labels.get(stage, stage), *(_ms(found[name]) for name in ("p50", "p90", "min")), *others)
    return table


def _title(case: Case, measured: Measured) -> str:
    budget = f" ({BUDGET} budget)" if case.prune else ""
    kept = f"kept {measured.kept} of {measured.total} tokens{budget}"
    return f"\n{case.name}: {kept}, prompt of {measured.prompt_tokens} positions"


def _memory(measured: Measured) -> str:
    device = measured.device_memory
    on_gpu = "" if device is None else f"{device / 1e6:.0f} MB on the GPU (without the CUDA context), "
    return f" peak memory so far: {on_gpu}{measured.host_memory / 1e6:.0f} MB on the host"


def _median(samples: list[float] | None) -> str:
    return _ms(spread(samples)["p50"]) if samples else "–"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _notes(report: _Report) -> Iterator[str]:
    yield f"milliseconds: {report.clock}"
    yield f"engine loaded in {report.conditions['load_ms']:.0f} ms"
    if report.cold_starts:
        names = ("import", "load", "first token", "total")
        medians = {name: spread([started[name] for started in report.cold_starts])["p50"] for name in names}
        told = ", ".join(f"{name} {ms:.0f}" for name, ms in medians.items())
        yield f"cold start, median of {len(report.cold_starts)} processes, ms: {told}"
    processes = report.conditions["gpu_before"].get("processes")
    if processes:
        yield f"other processes were on the GPU: {'; '.join(processes)}"


def _as_json(report: _Report) -> dict[str, Any]:
    manifest, setting = report.bundle.manifest, report.setting
    return {
        "conditions": report.conditions,
        "bundle": {
            "name": report.bundle.path.resolve().name,
            "family": manifest.family,
            "dtype": manifest.dtype,
            "decoder": vars(manifest.decoder),
            "source": {name: placeless(value) for name, value in vars(manifest.source).items()},
        },
        "setting": vars(setting) | {"budget": BUDGET, "batch": 1, "clip": CLIP},
        "metrics": {"milliseconds": report.clock, "device_memory": DEVICE_METRIC, "host_memory": HOST_METRIC},
        "cold_starts": report.cold_starts,
        "cases": [_case(result) for result in report.results],
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
        "not_measured": {system: {"error": e.message, "hint": e.hint} for system, e in result.refused.items()},
    }


BENCH = Command(_configure, _run)
