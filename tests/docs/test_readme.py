"""The README: short, complete, and with the figures that were measured."""

from __future__ import annotations

import json
import re

import pytest

from tango_runtime.cli.main import COMMANDS
from tests.docs.manuals import README, ROOT, blocks, text

RESULTS = ROOT / "benchmarks/results"


def test_it_is_short() -> None:
    assert len(text(README).splitlines()) <= 150


def test_it_lists_every_command() -> None:
    for command in COMMANDS:
        assert f"| `tango {command}` |" in text(README)


def test_the_make_targets_exist() -> None:
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"^make (.+)$", "\n".join(blocks(README, "")), re.MULTILINE)
    named += re.findall(r"`make (\S+)`", text(README))
    assert {"demo", "test"} <= set(named) <= set(targets)


#: Rows of the table of performance, in order: the file, the kind of run, and who ran.
MEASURED = [
    ("h200-device-form-own", "pruned", "tango"),
    ("h200-tensorrt-0.5b-device", "pruned", "tango"),
    ("h200-device-form-own", "unpruned", "tango"),
    ("h200-onnxruntime-7b-device", "pruned", "tango"),
    ("h200-onnxruntime-7b", "unpruned", "tango"),
    ("h200-onnxruntime-7b-transformers", "pruned", "transformers"),
    ("h200-onnxruntime-llava-video-7b", "pruned", "tango"),
    ("h200-onnxruntime-qwen2.5-vl-7b-560x1008", "pruned", "tango"),
]


def performance() -> list[list[str]]:
    """Cells of the table's rows."""
    section = text(README).split("## Performance")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.parametrize(
    ("row", "measured"), list(enumerate(MEASURED)), ids=[f"{file}-{run}" for file, run, _ in MEASURED]
)
def test_the_table_has_what_was_measured(row: int, measured: tuple[str, str, str]) -> None:
    file, run, who = measured
    cases = json.loads((RESULTS / f"{file}.json").read_text())["cases"]
    case = next(case for case in cases if case["name"].split(",")[0] == run)
    _, tokens, _, *cells = performance()[row]
    counts = re.findall(r"[\d,]+", tokens)
    assert int(counts[0].replace(",", "")) == case["kept"]
    assert len(counts) == 1 or int(counts[1].replace(",", "")) == case["total"]
    for stage, cell in zip(("vision", "prefill", "first token", "decode"), cells, strict=True):
        shown = re.match(r"[\d.]+", cell).group()
        digits = len(shown.partition(".")[2])
        assert shown == f"{case['milliseconds'][who][stage]['p50']:.{digits}f}", stage


def test_the_table_is_no_longer() -> None:
    assert len(performance()) == len(MEASURED) <= 8
