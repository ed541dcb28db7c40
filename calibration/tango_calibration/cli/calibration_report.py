"""The tables, the report folder and the picture of `tango calibrate`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tango_calibration.evaluation.results import table
from tango_calibration.quantization.calibrate import Drop, Outcome, Overlap
from tango_calibration.quantization.formats import LayerFormat
from tango_calibration.quantization.sensitivity import BUDGETS
from tango_runtime.util.files import staged_folder

REPORT = "calibration.json"

_UNITS = {"vision": "noise-to-signal ratio of the outputs", "decoder": "nats between next-token distributions"}
_FORMATS: dict[LayerFormat | None, str] = {
    "w8a8": "8-bit weights and activations",
    "fp8": "8-bit weights and activations",
    "w4a16": "4-bit weights",
    "w8a16": "8-bit weights",
    None: "not quantized",
}
_COLORS: dict[LayerFormat | None, str] = {
    "w8a8": "#0b4f8a",
    "fp8": "#0b4f8a",
    "w4a16": "#0b4f8a",
    "w8a16": "#e0a458",
    None: "#c8553d",
}


def summarize(outcome: Outcome, drops: Sequence[Drop]) -> list[str]:
    """Markdown lines on the graphs and, if questions were asked, on accuracy."""
    return [*_graphs(outcome), *_accuracy(drops)]


def write_report(
    folder: Path, conditions: dict[str, Any], outcome: Outcome, drops: Sequence[Drop], *, overwrite: bool
) -> None:
    """Writes the results as JSON, Markdown and a picture.

    Raises:
        TangoError: The folder exists and is not to be replaced, or cannot be written.
    """
    with staged_folder(folder, overwrite=overwrite, holding=REPORT) as staged:
        data = {"conditions": conditions, **asdict(outcome), "accuracy": [asdict(drop) for drop in drops]}
        (staged / REPORT).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        facts = [f"- {name}: {fact}" for name, fact in conditions.items()]
        lines = ["# Calibration", "", *facts, "", *summarize(outcome, drops), *_layers(outcome)]
        (staged / "calibration.md").write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
        _draw(outcome, staged / "layers.png")


def _graphs(outcome: Outcome) -> list[str]:
    head = ("graph", "precision", "layers", "excluded", "loss", "budget", "MB before", "MB after")
    rows = [
        (
            name,
            graph.precision,
            str(len(graph.layers)),
            str(len(graph.excluded)),
            "not measured" if math.isnan(graph.loss) else f"{graph.loss:.2g}",
            f"{BUDGETS[name]:g}",
            f"{graph.bytes_before / 1e6:.1f}",
            f"{graph.bytes_after / 1e6:.1f}",
        )
        for name, graph in outcome.graphs.items()
    ]
    lines = ["## Graphs", "", *table(head, rows), ""]
    for name, graph in outcome.graphs.items():
        if not math.isnan(graph.loss):
            lines.append(f"Loss of {name}: {_UNITS[name]}.")
        for layer_format in dict.fromkeys(layer.format for layer in graph.excluded):
            layers = [layer.layer for layer in graph.excluded if layer.format == layer_format]
            lines.append(f"Excluded, {_FORMATS[layer_format]}: {', '.join(layers)}.")
    if outcome.overlaps:
        lines += ["", _overlap(outcome.overlaps)]
    return [*lines, ""]


def _overlap(overlaps: Sequence[Overlap]) -> str:
    kept, salient = (100 * np.array([getattr(o, name) for o in overlaps]) for name in ("kept", "salient"))
    return (
        f"Kept tokens that are the same as before: {kept.mean():.1f} % (minimum of a clip {kept.min():.1f} %), of the "
        f"salient ones {salient.mean():.1f} %; on the {len(overlaps)} observed clips."
    )


def _accuracy(drops: Sequence[Drop]) -> list[str]:
    if not drops:
        return []
    head = ("tokens kept", "questions", "before", "after", "points lost")
    rows = [
        (
            "all" if drop.trial.method == "all" else f"{drop.trial.method} {drop.trial.retention_ratio:g}",
            str(drop.questions),
            f"{100 * drop.before:.1f}",
            f"{100 * drop.after:.1f}",
            f"{drop.points.value:+.1f} [{drop.points.low:+.1f}, {drop.points.high:+.1f}]",
        )
        for drop in drops
    ]
    note = "Percent, with 95 % confidence intervals of the paired difference from a bootstrap over videos."
    return ["## Accuracy", "", *table(head, rows), "", note, ""]


def _layers(outcome: Outcome) -> list[str]:
    lines = []
    for name, graph in outcome.graphs.items():
        worst_first = sorted(graph.layers, key=lambda layer: -layer.loss)
        rows = [
            (layer.layer, f"{layer.loss:.2e}", _FORMATS[layer.format], "yes" if layer.scaled else "no")
            for layer in worst_first
        ]
        head = ("layer", "loss", "written as", "input scaled")
        lines += [f"## Layers of {name}, each quantized alone", "", *table(head, rows), ""]
    return lines


def _draw(outcome: Outcome, file: Path) -> None:
    """Draws the loss of each layer in the graph's order, a panel per graph, colored by the format it was written in."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4 * len(outcome.graphs)), dpi=150, layout="constrained")
    panels = np.ravel(figure.subplots(len(outcome.graphs), 1))
    for axes, (name, graph) in zip(panels, outcome.graphs.items(), strict=True):
        losses = np.maximum([layer.loss for layer in graph.layers], 1e-12)
        positions = np.arange(len(losses))
        for layer_format in dict.fromkeys(layer.format for layer in graph.layers):
            chosen = np.array([layer.format == layer_format for layer in graph.layers])
            axes.bar(positions[chosen], losses[chosen], color=_COLORS[layer_format], label=_FORMATS[layer_format])
        labels = [_short(layer.layer) for layer in graph.layers]
        # A layer's name may contain a dollar sign, which starts a formula in matplotlib.
        axes.set_xticks(positions, labels, rotation=90, fontsize=min(5, 400 / len(losses)), parse_math=False)
        axes.set_xlim(-0.8, len(losses) - 0.2)
        axes.set_yscale("log")
        axes.set_ylabel(_UNITS[name].replace(" of ", "\nof ").replace(" between ", "\nbetween "), fontsize=9)
        axes.set_title(f"{name}: loss when only this layer is quantized", loc="left", fontsize=11)
        axes.grid(axis="y", color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, metadata={"Software": None})


def _short(layer: str) -> str:
    """``tower.encoder.layers.0.self_attn.qkv_proj`` → ``0.qkv_proj``."""
    parts = layer.split(".")
    return ".".join([*(part for part in parts if part.isdigit()), parts[-1]])
