"""Results as JSON, Markdown and a picture."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tango_calibration.evaluation import results
from tango_calibration.evaluation.evaluate import (
    ALL,
    NONE,
    evaluate,
)
from tango_calibration.evaluation.scores import Estimate, Scores, combine
from tango_plugins import TangoError
from tests.fakes.evaluator import PARAMS, TRIALS, VIDEOS, Counter, untimed


@cache
def answered():
    return evaluate(Counter(), VIDEOS, TRIALS, PARAMS)


def found(run=0):
    """Records with correct answers for ``all``, wrong ones for ``none``, and for others wrong ones about one video."""
    return [replace(r, correct=r.trial == ALL or (r.trial != NONE and r.video != f"v{run}")) for r in answered()]


def summaries_of(*runs):
    scores = Scores.of_runs(runs)
    return [scores.summary(trial) for trial in scores.trials]


def test_results_of_runs_are_written_and_read(tmp_path):
    runs = [found(run=0), found(run=1)]
    results.write(tmp_path / "out", {"data": "mine"}, VIDEOS, combine(runs), summaries_of(*runs))
    text = (tmp_path / "out/results.md").read_text()
    assert "## Accuracy, 2 runs" in text
    assert "75.0 [75.0, 75.0]" in text
    again = results.read(tmp_path / "out/results.json")
    assert sorted(untimed(again), key=str) == sorted(untimed(combine(runs)), key=str)
    assert "runs" not in results.to_markdown({}, summaries_of(runs[0]))


def test_records_of_other_videos_are_not_written(tmp_path):
    with pytest.raises(TangoError, match="not those of the videos"):
        results.write(tmp_path / "out", {}, VIDEOS[::-1], found(), summaries_of(found()))
    assert not (tmp_path / "out").exists()


def rows_of(heading, lines):
    """The cells of a section's table, by method."""
    begin = lines.index(f"## {heading}")
    end = next((i for i in range(begin + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin:end] if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def ahead(summary, *bounds):
    """A summary with another lead of tango: value, low, high."""
    return replace(summary, tango_ahead=Estimate(*bounds))


def test_a_significant_lead_is_bold():
    leads = {("topk", 0.1): (0.2, 0.1, 0.3), ("topk", 0.3): (0.2, -0.1, 0.3), ("grid", 0.3): (-0.1, -0.2, -0.05)}
    found_summaries = summaries_of(found())
    summaries = [
        ahead(s, *leads.get((s.trial.method, s.trial.retention_ratio), (0.0, 0.0, 0.0))) for s in found_summaries
    ]
    rows = rows_of("Tango's lead", results.overall(summaries))
    assert rows["method"] == ["0.1", "0.3"]
    assert rows["topk"] == ["**+20.0 [+10.0, +30.0]**", "+20.0 [-10.0, +30.0]"]
    assert rows["grid"][1] == "**-10.0 [-20.0, -5.0]**"


def test_an_unequal_count_is_marked():
    rows = rows_of("Tango's lead", results.overall(summaries_of(found())))
    assert "tango" not in rows
    assert {method for method, cells in rows.items() if "*" in cells[0]} == {"tango-exact"}


def test_bounds_are_below_the_table():
    lines = results.overall(summaries_of(found()))
    assert not {"all", "none"} & rows_of("Accuracy", lines).keys()
    assert any(line.startswith("all 100.0 [100.0, 100.0]. none 0.0 [0.0, 0.0]. ") for line in lines)


def test_each_ratio_has_a_table_of_types():
    lines = results.by("type", summaries_of(found()))
    for ratio in ("0.1", "0.3"):
        rows = rows_of(f"Accuracy by type of question at {ratio}", lines)
        assert rows["method"] == ["count", "when"]
        assert [*rows][2:4] == ["all", "none"]
        assert rows["tango"] == ["75.0 [25.0, 100.0]"] * 2


def test_a_types_name_breaks_no_table_and_steers_no_terminal():
    records = [replace(record, type="a|b\n\x1b[31m") for record in found()]
    rows = [line for line in results.by("type", summaries_of(records)) if line.startswith("|")]
    assert len(rows) == 2 * (2 + len({record.trial.method for record in records}))
    assert all("\\|" in row and "\\x1b" in row for row in rows if "method" in row)


def drawn_axes(summaries, file, monkeypatch):
    axes, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **b: (axes.extend(self.axes), savefig(self, *a, **b)))
    results.draw(summaries, file)
    return axes


def test_the_picture_has_the_kept_share_as_axis(tmp_path, monkeypatch):
    summaries = [replace(s, share=0.0625) if s.trial.method == "tango" else s for s in summaries_of(found())]
    baselines, variants, *_ = drawn_axes(summaries, tmp_path / "picture.png", monkeypatch)
    for axes in (baselines, variants):
        [line] = [line for line in axes.lines if line.get_label() == "tango"]
        np.testing.assert_allclose(line.get_xdata(), 6.25)
        assert [text.get_text() for text in axes.texts] == ["all tokens", "no tokens"]
    assert {"topk", "tango-topk"} & {line.get_label() for line in baselines.lines} == {"topk"}


def test_leads_are_drawn_with_their_intervals(tmp_path, monkeypatch):
    summaries = [ahead(s, 0.1, 0.05, 0.2) for s in summaries_of(found()) if s.trial.method in ("all", "topk")]
    _, below = drawn_axes(summaries, tmp_path / "picture.png", monkeypatch)  # one column: only baselines
    heights = [list(line.get_ydata()) for line in below.lines[1:]]
    assert heights == [pytest.approx([5, 20]), pytest.approx([10])] * 2


def crossed(summary):
    """A value outside its interval, as happens with percentiles of a skewed ratio."""
    return replace(summary, relative=Estimate(1.2, 1.3, 1.1))


@pytest.mark.parametrize(
    "change",
    [
        lambda records: summaries_of(records)[:1],
        lambda records: summaries_of(records)[:2],
        lambda records: summaries_of([replace(r, correct=False) for r in records]),  # nothing relative to ``all``
        lambda records: [crossed(summary) for summary in summaries_of(records)],
    ],
)
def test_a_picture_can_always_be_drawn(change, tmp_path):
    results.draw(change(found()), tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").width > 500


def test_a_failed_picture_keeps_the_results(tmp_path, monkeypatch):
    def torn(summaries, file):
        file.write_bytes(b"half")
        raise ValueError("no fonts")

    monkeypatch.setattr(results, "draw", torn)
    with pytest.raises(TangoError, match=r"accuracy.png could not be drawn: no fonts"):
        results.write(tmp_path / "out", {}, VIDEOS, found(), summaries_of(found()))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"results.json", "results.md"}
    assert untimed(results.read(tmp_path / "out/results.json"))


def test_other_files_are_not_results(tmp_path):
    (tmp_path / "results.json").write_text('{"trials": [{}]}')
    with pytest.raises(TangoError, match="cannot be read as results"):
        results.read(tmp_path / "results.json")
