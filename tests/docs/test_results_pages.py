"""The pages of results: what their prose says is what the files of results hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tango_calibration.evaluation.evaluate import ALL, Trial
from tango_calibration.evaluation.scores import Estimate
from tools.docs import accuracy, measured, quantization
from tools.docs.markdown import part_names

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results"


def text(name: str) -> str:
    return (RESULTS / name).read_text(encoding="utf-8")


def shown(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def test_the_headline_is_in_the_scores() -> None:
    headline = text("accuracy.md").split("\n\n")[1]
    for ratio in (0.1, 0.05):
        assert shown(accuracy.summaries()[Trial("tango", ratio)].relative) in headline


def test_what_pruning_costs_stands_first() -> None:
    before, after = (accuracy.summaries()[trial].by_type for trial in (ALL, Trial("tango", accuracy.RATIO)))
    lost = {name: 100 * (before[name].value - after[name].value) for name in before}
    first = text("accuracy.md").partition("<!-- generated: accuracy.costs -->")[0]
    assert len(first.splitlines()) < 12
    assert f"(*times*) loses {lost['times']:.0f} points" in first
    assert f"(*first*) loses\n{lost['first']:.0f}," in first
    assert "No other type of question loses two points" in first
    assert [name for name, points in lost.items() if points >= 2] == ["first", "times"]


def test_the_leads_in_the_text_are_in_the_scores() -> None:
    leads = {
        (method, ratio): f"{100 * accuracy.summaries()[Trial(method, ratio)].tango_ahead.value:.{digits}f}"
        for ratio in (0.1, 0.05)
        for method, digits in (("random", 0), ("grid", 0), ("topk", 1))
    }
    page = text("accuracy.md")
    assert f"(by {leads['random', 0.1]} points at a tenth and {leads['random', 0.05]} at a twentieth)" in page
    assert f"a grid ({leads['grid', 0.1]} and {leads['grid', 0.05]})" in page
    assert f"({leads['topk', 0.1]} and {leads['topk', 0.05]})" in page


@pytest.mark.parametrize("page", ["performance.md", "quantization.md"])
def test_all_tables_are_of_the_machine_that_the_page_names(page: str) -> None:
    files = set(re.findall(r"benchmarks/results/(h200-[\w.-]+)\.json", text(page)))
    assert files
    for name in files:
        found = measured.load(name)
        conditions = found.get("conditions")
        if conditions is None:  # frames, live windows
            assert found["gpu"] == "NVIDIA H200"
            continue
        assert conditions["machine"]["gpu"]["name"] == "NVIDIA H200"
        assert conditions["gpu_before"]["driver"] == "580.159.04"


def test_tables_are_generated_and_not_typed() -> None:
    for page in ("performance.md", "quantization.md", "accuracy.md"):
        content = text(page)
        assert part_names(content)
        outside = re.sub(r"<!-- generated: .*?<!-- end of generated -->", "", content, flags=re.DOTALL)
        assert not re.search(r"^\|", outside, re.MULTILINE), page


@pytest.mark.parametrize(("value", "text"), [(0.8414, "0.841"), (2.637, "2.64"), (38.07, "38.1"), (1648.2, "1,648")])
def test_numbers_have_the_decimals_that_mean_something(value: float, text: str) -> None:
    assert measured.number(value) == text


def test_keys_have_their_newer_names_too(monkeypatch: pytest.MonkeyPatch) -> None:
    before = quantization.bundles()

    def load(name: str) -> object:
        text = (measured.RESULTS / f"{name}.json").read_text(encoding="utf-8")
        return json.loads(text.replace('"engine":', '"backend":').replace('"kept_least":', '"kept_min":'))

    monkeypatch.setattr(quantization, "load", load)
    assert quantization.bundles() == before


def test_a_column_has_the_median_of_its_case() -> None:
    column = measured.Column("", "h200-device-form-own", "unpruned, 384x384")
    stages = column.found["milliseconds"]["tango"]
    assert float(column.p50("vision")) == round(stages["vision"]["p50"], 1)
    assert column.p50("prune") == ""
    assert column.fact("backend") == "ONNX Runtime 1.31.1, CUDA"
