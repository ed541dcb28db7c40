"""Draws training curves: accuracy of each type of question over the steps, a line for each training.

    python models/tiny/curve.py training.png OUTPUT [OUTPUT …]

An OUTPUT is a folder that train.py wrote; stage 2 follows stage 1. Lines are training batches, dots are clips of the
validation split with all tokens. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tango_calibration.data.synthetic import ANSWERS, TYPES

#: Number of logged batches averaged for one point of a line.
SMOOTH = 5

ALL = "all questions"

#: Number of possible answers: two if the question names them.
CHOICES = {kind: len(answers) for kind, answers in ANSWERS.items()} | {"first": 2, "larger": 2}

COLORS = ("#0b4f8a", "#d55e00", "#009e73", "#cc79a7", "#999999")

Entry = Mapping[str, Any]


def read(folder: Path) -> list[Entry]:
    """Reads the log entries with accuracies, with ``step`` counted through both stages."""
    lines = (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [entry for entry in map(json.loads, lines) if "accuracy" in entry]
    first = max((entry["step"] for entry in entries if entry["stage"] == 1), default=0)
    return [{**entry, "step": entry["step"] + first * (entry["stage"] == 2)} for entry in entries]


def points(entries: Sequence[Entry], kind: str, *, validation: bool) -> np.ndarray:
    """Steps and accuracies in percent [n, 2], of batches or of the validation with all tokens."""
    chosen = [e for e in entries if e.get("validation", False) == validation and (not validation or e["part"] == 1)]
    pairs = [(e["step"], e["accuracy"] if kind == ALL else e["types"].get(kind)) for e in chosen]
    return np.array([(step, 100 * share) for step, share in pairs if share is not None]).reshape(-1, 2)


def smoothed(found: np.ndarray) -> np.ndarray:
    """Moving average over SMOOTH points."""
    if len(found) < SMOOTH:
        return found
    means = np.convolve(found[:, 1], np.full(SMOOTH, 1 / SMOOTH), mode="valid")
    return np.stack((found[SMOOTH // 2 :][: len(means), 0], means), axis=1)


def draw_type(axes: Axes, kind: str, trainings: Mapping[str, Sequence[Entry]]) -> None:
    """Draws one type of question."""
    for (name, entries), color in zip(trainings.items(), COLORS, strict=False):
        axes.plot(*smoothed(points(entries, kind, validation=False)).T, color=color, linewidth=1.3, label=name)
        axes.plot(*points(entries, kind, validation=True).T, "o", color=color, markersize=5)
        ends = [entry["step"] for entry in entries if entry["stage"] == 1]
        axes.axvline(max(ends, default=0), color="#bbbbbb", linewidth=0.8, linestyle=":")
    if kind in CHOICES:
        axes.axhline(100 / CHOICES[kind], color="#303030", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_title(kind, loc="left", fontsize=10)
    axes.set_ylim(0, 102)
    axes.grid(axis="y", color="#e8e8e8")
    axes.spines[["top", "right"]].set_visible(False)


def draw(trainings: Mapping[str, Sequence[Entry]], file: Path) -> None:
    """Draws a panel for each type of question and one for all; the dashed line is the accuracy of guessing."""
    figure = Figure(figsize=(13, 5), dpi=160, layout="constrained")
    grid = figure.subplots(2, 5, sharex=True, sharey=True)
    for axes, kind in zip(grid.flat, (ALL, *TYPES), strict=True):
        draw_type(axes, kind, trainings)
    grid[0, 0].legend(loc="lower right", fontsize=8, frameon=False)
    figure.supxlabel("step; dotted: stage 1 ends", fontsize=10)
    figure.supylabel("accuracy, %", fontsize=10)
    figure.savefig(file, metadata={"Software": None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw training curves.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("outputs", type=Path, nargs="+", help=f"folders of train.py, at most {len(COLORS)}")
    args = parser.parse_args(arguments)
    if len(args.outputs) > len(COLORS):
        parser.error(f"at most {len(COLORS)} trainings can be distinguished")
    draw({folder.name: read(folder) for folder in args.outputs}, args.picture)


if __name__ == "__main__":
    main()
