"""What an evaluation found, as JSON, as Markdown and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from tango_calibration.data import Video
from tango_calibration.evaluate import ALL, NONE, Record, Trial
from tango_calibration.methods import OWN_COUNT
from tango_calibration.scores import Estimate, Range, Summary, by_trial
from tango_plugins import TangoError
from tango_runtime.staging import staged_folder

RESULTS = "results.json"
PICTURE = "accuracy.png"

#: Of the picture. Tango is drawn in blues, parts of it in their lighter kin, rivals in other and duller colours.
_STYLES: dict[str, tuple[str, str]] = {
    "random": ("#b0b0b0", "o"),
    "grid": ("#8c6d46", "s"),
    "topk": ("#c8553d", "^"),
    "dpc-knn": ("#588157", "D"),
    "tango-topk": ("#e0a458", "v"),
    "tango-norope": ("#9d8ec7", "P"),
    "tango-density": ("#5f5f5f", "X"),
    "tango": ("#0b4f8a", "o"),
    "tango-exact": ("#58a4d8", "s"),
}


def write(
    folder: Path,
    conditions: Mapping[str, Any],
    videos: Sequence[Video],
    records: Sequence[Record],
    summaries: Sequence[Summary],
    *,
    overwrite: bool = False,
) -> None:
    """Writes results.json, results.md and accuracy.png into a folder, which appears when all of them are there.

    Hours of work are not lost to a picture: where it cannot be drawn, the folder appears without it, then that is told.

    Args:
        folder: Made here.
        conditions: What the results hold for, JSON.
        videos: What was asked about.
        records: What :func:`tango_calibration.evaluate.evaluate` gave for these videos, or several runs, combined.
        summaries: Of all trials.
        overwrite: Replace a folder that holds results.

    Raises:
        TangoError: The folder exists or cannot be written, the records are not of these videos, matplotlib is not
            installed, or the picture could not be drawn.
    """
    failure: Exception | None = None
    require_matplotlib()
    with staged_folder(folder, overwrite=overwrite, holding=RESULTS) as staged:
        found = to_json(conditions, videos, records, summaries)
        text = json.dumps(found, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        (staged / RESULTS).write_text(text + "\n", encoding="utf-8")
        (staged / "results.md").write_text(to_markdown(conditions, summaries), encoding="utf-8")
        try:
            draw(summaries, staged / PICTURE)
        except Exception as error:  # whatever a drawing library raises
            failure = error
            (staged / PICTURE).unlink(missing_ok=True)
    if failure:
        raise TangoError(
            f"{folder / PICTURE} could not be drawn: {failure}", f"{RESULTS} and results.md in {folder} are whole"
        ) from failure


# JSON


def to_json(
    conditions: Mapping[str, Any], videos: Sequence[Video], records: Sequence[Record], summaries: Sequence[Summary]
) -> dict[str, Any]:
    """Everything, each question told once and each trial, of each run, as columns over the questions or the videos."""
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
                raise TangoError(f"records of {trial} are not those of the videos", "give them in the videos' order")
            trials.append({**asdict(trial), **_columns(run)})
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
    return None if isinstance(value, float) and math.isnan(value) else value


def read(file: Path) -> list[Record]:
    """The records of a results.json, to be combined with those of other runs.

    Raises:
        TangoError: There is no such file, or it is not one that :func:`write` wrote.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return [record for trial in found["trials"] for record in _records(found["questions"], trial)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TangoError(
            f"{file} cannot be read as results: {error!r}", "name a results.json of tango evaluate"
        ) from error


def _records(questions: list[dict[str, Any]], trial: dict[str, Any]) -> list[Record]:
    place = {name: i for i, name in enumerate(dict.fromkeys(question["video"] for question in questions))}
    measured = list(zip(*(trial[name] for name in ("kept", "total", "prune_ms", "prefill_ms")), strict=True))
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
            right == "1",
            *measured[place[q["video"]]],
        )
        for q, answer, right in zip(questions, trial["answers"], trial["correct"], strict=True)
    ]


# Markdown


def to_markdown(conditions: Mapping[str, Any], summaries: Sequence[Summary]) -> str:
    """The conditions and all tables."""
    facts = [f"- {name}: {fact if isinstance(fact, str) else json.dumps(fact)}" for name, fact in conditions.items()]
    tables = [*overall(summaries), *over_runs(summaries), *by("type", summaries), *by("tag", summaries)]
    return "\n".join(["# Accuracy kept", "", *facts, "", *tables])


def overall(summaries: Sequence[Summary]) -> list[str]:
    """The lines of a section: a row for each trial, all questions together."""
    shares, counts = ("accuracy", "relative to all", "less tango"), ("tokens", "of", "prune ms", "prefill ms")
    head = ("ratio", "kept", "method", *shares, *counts)
    rows = []
    for s in summaries:
        ratio, method = _trial(s.trial)
        difference = _percent(s.difference, sign="+")
        mark = " *" if difference and method in OWN_COUNT else ""
        rates = _percent(s.accuracy), _percent(s.relative), difference + mark
        numbers = (f"{n:.1f}" for n in (s.kept, s.total, s.prune_ms, s.prefill_ms))
        rows.append((ratio, f"{s.share:.3f}", method, *rates, *numbers))
    note = "Percent, with 95 % confidence intervals from a bootstrap over videos."
    if any(row[5].endswith("*") for row in rows):
        note += " * Not at tango's count of tokens."
    return ["## All questions", "", *_table(head, rows), "", note, ""]


def over_runs(summaries: Sequence[Summary]) -> list[str]:
    """The lines of a section: a row for each trial, how far the runs lie apart; nothing where there is one run."""
    runs = summaries[0].runs
    if runs == 1:
        return []
    head = ("ratio", "method", "accuracy", "relative to all")
    rows = [(*_trial(s.trial), _range(s.accuracy_of_runs), _range(s.relative_of_runs)) for s in summaries]
    note = "Percent: mean of the runs [the lowest, the highest]."
    return [f"## {runs} runs", "", *_table(head, rows), "", note, ""]


def by(kind: Literal["type", "tag"], summaries: Sequence[Summary]) -> list[str]:
    """The lines of a section: a row for each trial, a column for each type or tag of question."""
    parts: list[dict[str, Estimate]] = [s.by_type if kind == "type" else s.by_tag for s in summaries]
    if not parts[0]:
        return []
    rows = [(*_trial(s.trial), *map(_percent, part.values())) for s, part in zip(summaries, parts, strict=True)]
    return [f"## Accuracy by {kind} of question", "", *_table(("ratio", "method", *parts[0]), rows), ""]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * (width - 1) + ":" for width in widths], *rows]
    return [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]


def _trial(trial: Trial) -> tuple[str, str]:
    return "" if trial in (ALL, NONE) else f"{trial.retention_ratio:g}", trial.method


def _percent(estimate: Estimate, sign: str = "") -> str:
    return _bracketed(estimate.value, estimate.low, estimate.high, sign)


def _range(found: Range) -> str:
    return _bracketed(found.mean, found.lowest, found.highest)


def _bracketed(value: float, low: float, high: float, sign: str = "") -> str:
    """Percent, nothing where there is no value."""
    if math.isnan(value):
        return ""
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


# Picture


def require_matplotlib() -> None:
    """Refuses to go on without it, before hours of work."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise TangoError("matplotlib is not installed", "pip install 'tango-edge[calibration]'") from error


def draw(summaries: Sequence[Summary], file: Path) -> None:
    """Accuracy relative to all tokens over the share kept, a line for each method, with 95 % intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    lines = _lines(summaries)
    kept = {method: [100 * s.share for s in line] for method, line in lines.items()}
    step = 0.005 * (max((shares[-1] - shares[0] for shares in kept.values()), default=0.0) or 10.0)
    for method, line in lines.items():
        alike = [other for other in lines if kept[other] == kept[method]]
        shift = step * (alike.index(method) - (len(alike) - 1) / 2)  # side by side, so that no bar hides another
        x = [share + shift for share in kept[method]]
        y = [100 * s.relative.value for s in line]
        # A percentile may lie on the far side of the value, and lengths below 0 cannot be drawn.
        bars = [[100 * max(0, s.relative.value - s.relative.low) for s in line]]
        bars.append([100 * max(0, s.relative.high - s.relative.value) for s in line])
        colour, marker = _STYLES[method]
        weight = 2.4 if method == "tango" else 1.2
        axes.errorbar(x, y, bars, label=method, color=colour, marker=marker, markersize=2.5 + weight, linewidth=weight,
                      elinewidth=1, capsize=2, alpha=0.9, zorder=3 if method == "tango" else 2)  # fmt: skip
    _draw_bound(axes, 100, "all tokens")
    for none in (s for s in summaries if s.trial == NONE and not math.isnan(s.relative.value)):
        _draw_bound(axes, 100 * none.relative.value, "no tokens")
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.set_xlabel("video tokens kept")
    axes.set_ylabel("accuracy relative to all tokens, %")
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if lines:
        figure.legend(loc="outside right center", frameon=False)
    axes.set_title("Accuracy kept, with 95 % confidence intervals", loc="left", fontsize=11)
    figure.savefig(file, metadata={"Software": None})


def _lines(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """What is drawn of each method, from the least kept on; the methods in the order in which their lines begin."""
    lines: dict[str, list[Summary]] = {}
    for s in sorted(summaries, key=lambda s: s.share):
        if s.trial.method in _STYLES and not math.isnan(s.relative.value):
            lines.setdefault(s.trial.method, []).append(s)
    return dict(sorted(lines.items(), key=lambda item: -item[1][0].relative.value))


def _draw_bound(axes: Any, height: float, name: str) -> None:
    """A dashed line across the picture."""
    axes.axhline(height, color="#303030", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(name, (0, height), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  color="#303030", fontsize=9)  # fmt: skip
