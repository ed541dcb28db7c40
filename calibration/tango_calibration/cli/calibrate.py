"""`tango calibrate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from tango_calibration.cli.args import SYNTHETIC, add_data, add_videos
from tango_calibration.data.dataset import Video, read_folder, synthetic
from tango_calibration.evaluation import results
from tango_calibration.evaluation.evaluate import check_room
from tango_calibration.quantization.calibrate import (
    Drop,
    Outcome,
    Overlap,
    Request,
    cache_folder,
    calibrate,
    check,
    drops,
)
from tango_calibration.quantization.observe import METHODS
from tango_calibration.quantization.quantize import Form
from tango_calibration.quantization.sensitivity import BUDGETS
from tango_plugins import TangoError
from tango_runtime.bundle import Bundle
from tango_runtime.cli.args import (
    add_bundle,
    add_frames,
    add_jobs,
    add_max_new_tokens,
    add_output,
    add_overwrite,
    add_precisions,
    add_seed,
    percent,
    positive_int,
)
from tango_runtime.cli.command import Command
from tango_runtime.util.console import status
from tango_runtime.util.files import check_output, staged_folder

REPORT = "calibration.json"

_UNITS = {"vision": "noise over signal of the outputs", "decoder": "nats between distributions of the next token"}
_FORMS: dict[Form | None, str] = {
    "w8a8": "8-bit weights and activations",
    "fp8": "8-bit weights and activations",
    "w4a16": "4-bit weights",
    "w8a16": "8-bit weights",
    None: "left as it was",
}
_COLOURS: dict[Form | None, str] = {
    "w8a8": "#0b4f8a",
    "fp8": "#0b4f8a",
    "w4a16": "#0b4f8a",
    "w8a16": "#e0a458",
    None: "#c8553d",
}
_QUESTIONS = 8


def _configure(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add_output(parser, "BUNDLE2", required=True)
    add_overwrite(parser)
    parser.add_argument(
        "--clips",
        required=True,
        metavar="FOLDER",
        help=f"folder of videos to observe, with or without a questions.jsonl; or {SYNTHETIC}",
    )
    add_precisions(parser, vision="int8", decoder="fp16")
    parser.add_argument(
        "--method",
        default="minmax",
        choices=METHODS,
        help="how 8-bit ranges are found; percentile and entropy clip large activations, at a price: in models/tiny "
        "vision has as much noise with percentile as with minmax, and 16 times as much with entropy "
        "(default: %(default)s)",
    )
    add_videos(parser, 16)
    add_frames(parser)
    add_max_new_tokens(parser, 16)
    add_seed(parser, 0)
    parser.add_argument(
        "--target",
        choices=["onnxruntime", "tensorrt"],
        help="what the new bundle is for: for tensorrt, INT8 weights are stored in fp32, as version 8 requires, and "
        "become 8 bits in the engine; fp8 is for TensorRT 10 and later only, and has not been tested there "
        "(default: onnxruntime; with fp8, tensorrt)",
    )
    parser.add_argument(
        "--min-overlap",
        type=percent,
        metavar="PERCENT",
        help="exclude layers of the vision tower until this share of the kept tokens is the same as before "
        "(default: no requirement)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="folder of cached observations (default: BUNDLE2.observed)"
    )
    parser.add_argument(
        "--report-dir", type=Path, metavar="FOLDER", help=f"write {REPORT}, calibration.md and layers.png to a folder"
    )
    parser.add_argument(
        "--evaluate", type=positive_int, metavar="N", help="ask both bundles N questions, and compare their accuracy"
    )
    add_data(parser)
    add_jobs(parser, 1)
    parser.add_argument(
        "--max-drop", type=float, metavar="POINTS", help="exit with 1 if accuracy drops by more percentage points"
    )


def _calibrate(args: argparse.Namespace) -> int:
    request = _request(args)
    bundle = check(request)
    if args.report_dir:
        check_output(args.report_dir, overwrite=args.overwrite, holding=REPORT)
        results.require_matplotlib()
    asked = _questions(args, bundle) if args.evaluate else []
    if asked:
        check_room(bundle, asked)
    status(f"observations: {cache_folder(request)}")
    outcome = calibrate(request)
    found = drops(request, asked, args.jobs) if asked else []
    lines = [*_summary(outcome), *_accuracy(found)]
    print("\n".join(lines))
    status(f"bundle: {args.output}")
    if args.report_dir:
        _report(args.report_dir, _conditions(request, bundle), outcome, found, overwrite=args.overwrite)
        status(f"report: {args.report_dir}")
    missed = args.max_drop is not None and any(drop.points.value > args.max_drop for drop in found)
    if missed:
        status(f"accuracy dropped by more than {args.max_drop:g} points (--max-drop)")
    return int(missed)


def _request(args: argparse.Namespace) -> Request:
    if args.max_drop is not None and not args.evaluate:
        raise TangoError("--max-drop needs an evaluation", "add --evaluate N")
    if args.evaluate and "fp8" in (args.vision, args.decoder):
        raise TangoError(
            "--evaluate runs on ONNX Runtime, which does not run fp8",
            "drop it, and compare both bundles on the device: tango evaluate",
        )
    names = ("bundle", "output", "clips", "vision", "decoder", "method", "videos", "frames", "max_new_tokens", "seed")
    asked = {name: getattr(args, name) for name in (*names, "cache", "overwrite")}
    return Request(**asked, engine=args.target, min_overlap=args.min_overlap and args.min_overlap / 100)


def _questions(args: argparse.Namespace, bundle: Bundle) -> list[Video]:
    """Videos with so many questions in all."""
    frames, left = args.frames or bundle.manifest.video.frames, args.evaluate
    if args.data == SYNTHETIC:
        videos = synthetic(-(-left // _QUESTIONS) + 8, seed=args.seed, questions=_QUESTIONS, frames=frames)
    else:
        videos = read_folder(Path(args.data), frames)
    chosen = []
    for video in videos:
        if left > 0:
            chosen.append(replace(video, questions=video.questions[:left], ids=video.ids[:left]))
            left -= len(video.questions)
    return chosen


# What is told


def _summary(outcome: Outcome) -> list[str]:
    lines = ["## Graphs", ""]
    head = ("graph", "precision", "layers", "spared", "loss", "budget", "MB before", "MB after")
    rows = [
        (
            name,
            graph.precision,
            str(len(graph.layers)),
            str(len(graph.spared)),
            f"{graph.loss:.2g}",
            f"{BUDGETS[name]:g}",
            f"{graph.before / 1e6:.1f}",
            f"{graph.after / 1e6:.1f}",
        )
        for name, graph in outcome.graphs.items()
    ]
    lines += [*_table(head, rows), ""]
    for name, graph in outcome.graphs.items():
        lines.append(f"Loss of {name}: {_UNITS[name]}.")
        for form in dict.fromkeys(layer.form for layer in graph.spared):
            spared = [layer.layer for layer in graph.spared if layer.form == form]
            lines.append(f"Spared, {_FORMS[form]}: {', '.join(spared)}.")
    if outcome.overlaps:
        lines += ["", _overlap(outcome.overlaps)]
    return [*lines, ""]


def _overlap(overlaps: Sequence[Overlap]) -> str:
    kept, salient = (100 * np.array([getattr(o, name) for o in overlaps]) for name in ("kept", "salient"))
    return (
        f"Tokens kept before that are kept after: {kept.mean():.1f} % (least of a clip {kept.min():.1f} %), of the "
        f"salient ones {salient.mean():.1f} %; {len(overlaps)} clips, the observed ones."
    )


def _accuracy(found: Sequence[Drop]) -> list[str]:
    if not found:
        return []
    head = ("tokens kept", "questions", "before", "after", "lost, points")
    rows = [
        (
            "all" if drop.trial.method == "all" else f"{drop.trial.method} {drop.trial.retention_ratio:g}",
            str(drop.questions),
            f"{100 * drop.before:.1f}",
            f"{100 * drop.after:.1f}",
            f"{drop.points.value:+.1f} [{drop.points.low:+.1f}, {drop.points.high:+.1f}]",
        )
        for drop in found
    ]
    note = "Percent, with 95 % confidence intervals of the paired difference from a bootstrap over videos."
    return ["## Accuracy", "", *_table(head, rows), "", note, ""]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * (width - 1) + ":" for width in widths], *rows]
    return [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]


# The report


def _conditions(request: Request, bundle: Bundle) -> dict[str, Any]:
    return {
        "bundle": bundle.path.resolve().name,
        "clips": request.clips if request.clips == SYNTHETIC else Path(request.clips).resolve().name,
        "videos": request.videos,
        "frames": request.frames or bundle.manifest.video.frames,
        "seed": request.seed,
        "method": request.method,
        "target": request.target,
        "min_overlap": request.min_overlap,
        "retention_ratio": bundle.manifest.params.retention_ratio,
    }


def _report(
    folder: Path, conditions: dict[str, Any], outcome: Outcome, found: Sequence[Drop], *, overwrite: bool
) -> None:
    """Writes what was found as JSON, Markdown and a picture."""
    with staged_folder(folder, overwrite=overwrite, holding=REPORT) as staged:
        data = {"conditions": conditions, **asdict(outcome), "accuracy": [asdict(drop) for drop in found]}
        (staged / REPORT).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        facts = [f"- {name}: {fact}" for name, fact in conditions.items()]
        tables = [*_summary(outcome), *_accuracy(found), *_layers(outcome)]
        (staged / "calibration.md").write_text("\n".join(["# Calibration", "", *facts, "", *tables]), encoding="utf-8")
        draw(outcome, staged / "layers.png")


def _layers(outcome: Outcome) -> list[str]:
    lines = []
    for name, graph in outcome.graphs.items():
        worst = sorted(graph.layers, key=lambda layer: -layer.loss)
        rows = [(w.layer, f"{w.loss:.2e}", _FORMS[w.form]) for w in worst]
        lines += [f"## Layers of {name}, each quantised alone", "", *_table(("layer", "loss", "written"), rows), ""]
    return lines


def draw(outcome: Outcome, file: Path) -> None:
    """The loss of each layer in the graph's order, a panel for each graph; those that were spared are marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4 * len(outcome.graphs)), dpi=150, layout="constrained")
    panels = np.ravel(figure.subplots(len(outcome.graphs), 1))
    for axes, (name, graph) in zip(panels, outcome.graphs.items(), strict=True):
        losses = np.maximum([layer.loss for layer in graph.layers], 1e-12)
        places = np.arange(len(losses))
        for form in dict.fromkeys(layer.form for layer in graph.layers):
            mine = np.array([layer.form == form for layer in graph.layers])
            axes.bar(places[mine], losses[mine], color=_COLOURS[form], label=_FORMS[form])
        axes.set_yscale("log")
        axes.set_xlim(-0.8, len(losses) - 0.2)
        axes.set_xticks(
            places, [_short(layer.layer) for layer in graph.layers], rotation=90, fontsize=min(5, 400 / len(losses))
        )
        axes.set_ylabel(_UNITS[name].replace(" of ", "\nof ").replace(" between ", "\nbetween "), fontsize=9)
        axes.set_title(f"{name}: loss when only this layer is quantised", loc="left", fontsize=11)
        axes.grid(axis="y", color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, metadata={"Software": None})


def _short(layer: str) -> str:
    """``tower.encoder.layers.0.self_attn.q_proj`` → ``0.q_proj``."""
    parts = layer.split(".")
    return ".".join([*(part for part in parts if part.isdigit()), parts[-1]])


CALIBRATE = Command(_configure, _calibrate)
