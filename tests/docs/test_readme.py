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


def table(section: str) -> list[list[str]]:
    """Cells of the rows of a section's table, with its head."""
    lines = text(README).split(f"\n## {section}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [rows[0], *rows[2:]]


#: What the matrix calls a platform and a family, and what docs/reference/support.json calls it.
PLATFORMS = {
    "ONNX Runtime, CPU": "ort-cpu-x86",
    "ONNX Runtime, CUDA": "ort-cuda-h200",
    "TensorRT 8.6": "tensorrt-8.6-h200",
}
FAMILIES = {"OV": "llava-ov", "LV": "llava-video", "Q": "qwen2.5-vl"}


def test_the_matrix_agrees_with_the_reference() -> None:
    head, *rows = table("What runs where")
    known = json.loads((ROOT / "docs/reference/support.json").read_text())["cells"]
    ran = [row for row in rows if row[0] in PLATFORMS]
    assert len(ran) == len(PLATFORMS)
    for backend, _, *cells in ran:
        for precision, cell in zip(head[2:], cells, strict=True):
            here = [c for c in known if (c["platform"], c["precision"]) == (PLATFORMS[backend], precision.lower())]
            families = {c["family"] for c in here if c["status"] in ("measured", "tested")}
            assert {FAMILIES[name] for name in re.findall(r"[A-Z]+", cell)} == families, (backend, precision)
            assert (cell == "–") == any(c["status"] == "no" for c in here), (backend, precision)


#: Rows of the table of performance, in order: the file, the kind of run, and who ran.
MEASURED = [
    ("h200-onnxruntime-0.5b-ahead", "pruned", "tango"),
    ("h200-tensorrt-0.5b-device", "pruned", "tango"),
    ("h200-device-form-own", "unpruned", "tango"),
    ("h200-onnxruntime-7b-linear", "pruned", "tango"),
    ("h200-onnxruntime-7b-linear", "unpruned", "tango"),
    ("h200-onnxruntime-7b-transformers", "pruned", "transformers"),
    ("h200-onnxruntime-llava-video-7b", "pruned", "tango"),
    ("h200-onnxruntime-qwen2.5-vl-7b-560x1008", "pruned", "tango"),
]


@pytest.mark.parametrize("row", range(len(MEASURED)), ids=[f"{file}-{run}" for file, run, _ in MEASURED])
def test_the_table_has_what_was_measured(row: int) -> None:
    file, run, who = MEASURED[row]
    cases = json.loads((RESULTS / f"{file}.json").read_text())["cases"]
    case = next(case for case in cases if case["name"].split(",")[0] == run)
    _, tokens, _, *cells = table("Performance")[1 + row]
    counts = re.findall(r"[\d,]+", tokens)
    assert int(counts[0].replace(",", "")) == case["kept"]
    assert len(counts) == 1 or int(counts[1].replace(",", "")) == case["total"]
    for stage, cell in zip(("vision", "prefill", "first token", "decode"), cells, strict=True):
        shown = re.match(r"[\d.]+", cell).group()
        digits = len(shown.partition(".")[2])
        assert shown == f"{case['milliseconds'][who][stage]['p50']:.{digits}f}", stage


def test_the_table_is_no_longer() -> None:
    assert len(table("Performance")) - 1 == len(MEASURED) <= 8
