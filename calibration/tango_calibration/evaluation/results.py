"""Results of an evaluation, as JSON, Markdown and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tango_calibration.data.dataset import Video
from tango_calibration.evaluation.evaluate import ALL, NONE, Record, Trial
from tango_calibration.evaluation.methods import OWN_COUNT
from tango_calibration.evaluation.scores import Estimate, Range, Summary, by_trial
from tango_plugins import TangoError
from tango_runtime.util.console import printable
from tango_runtime.util.files import staged_folder

RESULTS = "results.json"
PICTURE = "accuracy.png"

TANGO = "tango"

#: Columns of the picture: the methods that each compares with Tango, with their colors (Okabe and Ito's) and markers.
_COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "Tango and the baselines": {
        "random": ("#999999", "s"),
        "grid": ("#cc79a7", "P"),
        "topk": ("#d55e00", "^"),
        "dpc-knn": ("#009e73", "D"),
    },
    "Tango and its variants": {
        "tango-topk": ("#e69f00", "^"),
        "tango-norope": ("#009e73", "D"),
        "tango-density": ("#999999", "s"),
        "tango-exact": ("#56b4e9", "P"),
    },
}
_TANGO_STYLE = ("#0b4f8a", "o")


def write(
    folder: Path,
    conditions: Mapping[str, Any],
    videos: Sequence[Video],
    records: Sequence[Record],
    summaries: Sequence[Summary],
    *,
    overwrite: bool = False,
) -> None:
    """Writes results.json, results.md and accuracy.png into a new folder, which appears when it is complete.

    If the picture cannot be drawn, the folder appears without it before the error is raised, so no work is lost.

    Args:
        folder: The folder to write.
        conditions: Conditions of the evaluation, JSON.
        videos: The videos.
        records: Records of :func:`~tango_calibration.evaluation.evaluate.evaluate` for these videos, of any runs.
        summaries: Summaries of all trials.
        overwrite: Replace a folder with results.

    Raises:
        TangoError: The folder exists or cannot be written, the records are not of these videos, matplotlib is not
            installed, or the picture could not be drawn.
    """
    failure: Exception | None = None
    require_matplotlib()
    with staged_folder(folder, overwrite=overwrite, holding=RESULTS) as staged:
        found = to_json(conditions, videos, records, summaries)
        text = json.dumps(found, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        # A folder's name may be invalid UTF-8; its invalid bytes become escapes, which are valid JSON.
        for name, content in ((RESULTS, text + "\n"), ("results.md", to_markdown(conditions, summaries))):
            (staged / name).write_text(content, encoding="utf-8", errors="backslashreplace")
        try:
            draw(summaries, staged / PICTURE)
        except Exception as error:  # a drawing library may raise anything
            failure = error
            (staged / PICTURE).unlink(missing_ok=True)
    if failure:
        raise TangoError(
            f"{folder / PICTURE} could not be drawn: {failure}", f"{RESULTS} and results.md in {folder} are complete"
        ) from failure


# JSON


def to_json(
    conditions: Mapping[str, Any], videos: Sequence[Video], records: Sequence[Record], summaries: Sequence[Summary]
) -> dict[str, Any]:
    """All results; each trial of each run has lists over the questions or the videos."""
    questions = [
        {"id": key, "video": video.name, "type": q.type, "tags": q.tags, "text": q.text, "answer": q.answer}
        for video in videos
        for key, q in zip(video.ids, video.questions, strict=True)
    ]
    asked = [(question["video"], question["id"]) for question in questions]
    trials = []
    for trial, mine in by_trial(records).items():
        for begin in range(0, len(mine), len(asked)):
            run = mine[begin : begin + len(asked)]
            if [(record.video, record.question) for record in run] != asked:
                raise TangoError(
                    f"the records of {trial} are not those of the videos", "pass them in the order of the videos"
                )
            trials.append({**asdict(trial), **_without_nan(_columns(run))})
    return {
        "conditions": dict(conditions),
        "summaries": [_without_nan(asdict(summary)) for summary in summaries],
        "questions": questions,
        "trials": trials,
    }


def _columns(records: Sequence[Record]) -> dict[str, Any]:
    videos = {record.video: record for record in records}.values()
    return {
        "answers": [record.answer for record in records],
        "correct": "".join("01"[record.correct] for record in records),
        "kept": [record.kept for record in videos],
        "total": [record.total for record in videos],
        "prune_ms": [round(record.prune_ms, 3) for record in videos],
        "prefill_ms": [round(record.prefill_ms, 3) for record in videos],
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read(file: Path) -> list[Record]:
    """Reads the records of a results.json, for example to combine them with those of other runs.

    Raises:
        TangoError: The file does not exist, or :func:`write` did not write it.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return [record for trial in found["trials"] for record in _records(found["questions"], trial)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TangoError(
            f"{file} cannot be read as results: {error!r}", "pass a results.json of tango evaluate"
        ) from error


def _records(questions: list[dict[str, Any]], trial: dict[str, Any]) -> list[Record]:
    place = {name: i for i, name in enumerate(dict.fromkeys(question["video"] for question in questions))}
    times = ([math.nan if ms is None else ms for ms in trial[name]] for name in ("prune_ms", "prefill_ms"))
    measured = list(zip(trial["kept"], trial["total"], *times, strict=True))
    which = Trial(trial["method"], trial["retention_ratio"])
    return [
        Record(
            q["video"],
            q["id"],
            q["text"],
            q["type"],
            tuple(q["tags"]),
            which,
            answer,
            correct == "1",
            *measured[place[q["video"]]],
        )
        for q, answer, correct in zip(questions, trial["answers"], trial["correct"], strict=True)
    ]


# Markdown


def to_markdown(conditions: Mapping[str, Any], summaries: Sequence[Summary]) -> str:
    """The conditions and all tables."""
    facts = [f"- {name}: {fact if isinstance(fact, str) else json.dumps(fact)}" for name, fact in conditions.items()]
    tables = [*overall(summaries), *over_runs(summaries), *by("type", summaries), *by("tag", summaries)]
    return "\n".join(["# Accuracy kept", "", *facts, "", *tables])


def overall(summaries: Sequence[Summary]) -> list[str]:
    """Lines of the sections about all questions: accuracies, Tango compared with each method, and costs."""
    kept = f"Percent of the accuracy with all tokens. {_INTERVALS}"
    return [
        *_grid(
            "Accuracy", summaries, lambda s: _percent(s.accuracy), f"Percent correct. {_INTERVALS}{_shares(summaries)}"
        ),
        *_grid("Accuracy kept", summaries, lambda s: _percent(s.relative), kept),
        *_grid("Tango's lead", summaries, _lead, _LEAD),
        *_costs(summaries),
    ]


def over_runs(summaries: Sequence[Summary]) -> list[str]:
    """Lines of the sections about differences between runs; none for a single run."""
    runs = summaries[0].runs
    if runs == 1:
        return []
    note = "Percent: mean of the runs [the lowest, the highest]."
    return [
        *_grid(f"Accuracy, {runs} runs", summaries, lambda s: _range(s.accuracy_of_runs), note),
        *_grid(f"Accuracy kept, {runs} runs", summaries, lambda s: _range(s.relative_of_runs), note),
        *_grid(f"Tango's lead, {runs} runs", summaries, lambda s: _range(s.tango_ahead_of_runs, "+"), note),
    ]


def by(kind: Literal["type", "tag"], summaries: Sequence[Summary]) -> list[str]:
    """Lines of a section for each ratio: a row for each method, a column for each type or tag of question."""
    parts = {s.trial: s.by_type if kind == "type" else s.by_tag for s in summaries}
    names = list(next(iter(parts.values())))
    lines: list[str] = []
    for ratio in _ratios(summaries) if names else []:
        trials = [trial for trial in parts if trial in (ALL, NONE) or trial.retention_ratio == ratio]
        rows = [(trial.method, *map(_percent, parts[trial].values())) for trial in trials]
        lines += [f"## Accuracy by {kind} of question at {ratio:g}", "", *table(("method", *names), rows), ""]
    return lines


_INTERVALS = "In brackets 95 % confidence intervals from a bootstrap over videos."
_LEAD = (
    "Accuracy of tango minus that of the method, in points. In brackets paired 95 % confidence intervals from a "
    "bootstrap over videos; bold if they exclude 0."
)


def _grid(title: str, summaries: Sequence[Summary], cell: Callable[[Summary], str], note: str) -> list[str]:
    """Lines of a section: a row for each method, a column for each ratio, and below them the bounds."""
    cells = {s.trial: cell(s) for s in summaries}
    ratios = _ratios(summaries)
    methods = dict.fromkeys(trial.method for trial in cells if trial not in (ALL, NONE))
    rows = [(method, *(cells.get(Trial(method, ratio), "") for ratio in ratios)) for method in methods]
    rows = [row for row in rows if any(row[1:])]
    bounds = [f"{trial.method} {cells[trial]}" for trial in (ALL, NONE) if cells.get(trial)]
    if not rows and not bounds:
        return []
    if any("\\*" in text for row in rows for text in row):
        note += " \\* Keeps another number of tokens than tango."
    lines = [*table(("method", *(f"{ratio:g}" for ratio in ratios)), rows), ""] if rows else []
    return [f"## {title}", "", *lines, " ".join([*(f"{bound}." for bound in bounds), note]), ""]


def _shares(summaries: Sequence[Summary]) -> str:
    """A sentence about the share kept at each ratio; empty if tango was not evaluated."""
    found = sorted((s.trial.retention_ratio, s.share) for s in summaries if s.trial.method == TANGO)
    shares = ", ".join(f"{100 * share:.1f} % at {ratio:g}" for ratio, share in found)
    return f" Of a video's tokens tango kept {shares}." if shares else ""


def _lead(s: Summary) -> str:
    found = s.tango_ahead
    text = _percent(found, sign="+")
    if text and (found.low > 0 or found.high < 0):
        text = f"**{text}**"
    return text + " \\*" if text and s.trial.method in OWN_COUNT else text


def _costs(summaries: Sequence[Summary]) -> list[str]:
    """Lines of a section: tokens and milliseconds of each trial."""
    head = ("ratio", "kept", "method", "tokens", "of", "prune ms", "prefill ms")
    rows = []
    for s in summaries:
        ratio = "" if s.trial in (ALL, NONE) else f"{s.trial.retention_ratio:g}"
        numbers = ("" if math.isnan(n) else f"{n:.1f}" for n in (s.kept, s.total, s.prune_ms, s.prefill_ms))
        rows.append((ratio, f"{s.share:.3f}", s.trial.method, *numbers))
    return ["## Tokens and time", "", *table(head, rows), "", "Means of tokens, medians of milliseconds.", ""]


def _ratios(summaries: Sequence[Summary]) -> list[float]:
    """The retention ratios, ascending."""
    return sorted({s.trial.retention_ratio for s in summaries if s.trial not in (ALL, NONE)})


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, with columns aligned to the right."""
    head, *rows = ([printable(cell).replace("|", "\\|") for cell in row] for row in (head, *rows))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * (width - 1) + ":" for width in widths], *rows]
    return [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]


def _percent(estimate: Estimate, sign: str = "") -> str:
    return _bracketed(estimate.value, estimate.low, estimate.high, sign)


def _range(found: Range, sign: str = "") -> str:
    return _bracketed(found.mean, found.lowest, found.highest, sign)


def _bracketed(value: float, low: float, high: float, sign: str = "") -> str:
    """Percent; empty if there is no value."""
    if math.isnan(value):
        return ""
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


# Picture


def require_matplotlib() -> None:
    """Raises a TangoError without matplotlib, before hours of work."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise TangoError("matplotlib is not installed", "pip install 'tango-edge[calibration]'") from error


def draw(summaries: Sequence[Summary], file: Path) -> None:
    """Draws the accuracy kept over the share of tokens kept, and below it Tango's lead over each other method.

    Baselines are in the left column, variants of Tango in the right one; an empty column is left out. Bands and bars
    are 95 % intervals. Those of a lead are paired, so they may exclude 0 where the bands overlap.
    """
    from matplotlib.figure import Figure

    methods = {s.trial.method for s in summaries}
    columns = {title: styles for title, styles in _COLUMNS.items() if methods & styles.keys()} or {"Tango": {}}
    figure = Figure(figsize=(0.5 + 5.5 * len(columns), 7), dpi=160, layout="constrained")
    grid = figure.subplots(2, len(columns), sharex="col", squeeze=False, height_ratios=(3, 2))
    for (title, styles), (above, below) in zip(columns.items(), grid.T, strict=True):
        above.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=24)
        _draw_accuracy(above, summaries, {TANGO: _TANGO_STYLE, **styles})
        _draw_leads(below, summaries, styles)
        for axes in (above, below):
            axes.grid(axis="y", color="#e8e8e8")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        below.xaxis.set_major_formatter("{x:g} %")
        below.set_xlabel("video tokens kept")
    grid[0, 0].set_ylabel("accuracy relative to all tokens, %")
    grid[1, 0].set_ylabel("Tango's lead in accuracy, points")
    figure.savefig(file, metadata={"Software": None})


def _draw_accuracy(axes: Any, summaries: Sequence[Summary], styles: Mapping[str, tuple[str, str]]) -> None:
    """Draws a line with its band for each method, and a dashed line for each bound."""
    for method, (color, marker) in styles.items():
        line = _line(summaries, method, lambda s: s.relative)
        if not line:
            continue
        x, value, low, high = (100 * np.array(column) for column in zip(*line, strict=True))
        bold = method == TANGO
        axes.fill_between(x, low, high, color=color, alpha=0.2 if bold else 0.08, linewidth=0)
        axes.plot(x, value, label=method, color=color, marker=marker, markersize=5, zorder=4 if bold else 3,
                  linewidth=2.8 if bold else 1.5)  # fmt: skip
    _draw_bound(axes, 100, "all tokens")
    for none in (s for s in summaries if s.trial == NONE and not math.isnan(s.relative.value)):
        _draw_bound(axes, 100 * none.relative.value, "no tokens")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, fontsize=8.5, frameon=False, handlelength=1.4,
                    handletextpad=0.4, columnspacing=0.9, borderpad=0, borderaxespad=0.6)  # fmt: skip


def _draw_leads(axes: Any, summaries: Sequence[Summary], styles: Mapping[str, tuple[str, str]]) -> None:
    """Draws the interval of each method and ratio, side by side; above 0 Tango is better."""
    axes.axhline(0, color="#303030", linewidth=1, zorder=1)
    lines = {method: _line(summaries, method, lambda s: s.tango_ahead) for method in styles}
    shares = sorted({s.share for s in summaries if s.trial not in (ALL, NONE)})
    gap = min((b - a for a, b in pairwise(shares) if b - a > 0.01), default=0.05)
    for place, (method, (color, marker)) in enumerate(styles.items()):
        for share, *found in lines[method]:
            x = 100 * (share + gap * 0.14 * (place - (len(styles) - 1) / 2))
            value, low, high = (100 * number for number in found)
            axes.plot((x, x), (low, high), color=color, linewidth=1.6)
            axes.plot(x, value, color=color, marker=marker, markersize=5.5, linestyle="none")


def _line(
    summaries: Sequence[Summary], method: str, what: Callable[[Summary], Estimate]
) -> list[tuple[float, float, float, float]]:
    """(share kept, value, low, high) of a method, ascending, without missing values."""
    found = ((s.share, what(s)) for s in summaries if s.trial.method == method)
    return sorted((share, e.value, e.low, e.high) for share, e in found if not math.isnan(e.value))


def _draw_bound(axes: Any, height: float, name: str) -> None:
    """Draws a dashed line across the picture."""
    axes.axhline(height, color="#303030", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(name, (0, height), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  color="#303030", fontsize=9)  # fmt: skip
