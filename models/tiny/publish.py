"""Copies the scores of score.py into benchmarks/results, and their picture to the page about accuracy.

    python models/tiny/publish.py RESULTS/all
    make reference

The second command writes the tables of docs/results/accuracy.md from the scores.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from tango_calibration.evaluation.results import PICTURE, RESULTS

ROOT = Path(__file__).parents[2]
SCORES = ROOT / "benchmarks/results/tiny-accuracy.json"
PAGE = ROOT / "docs/results/accuracy.md"


def publish(folder: Path, scores: Path = SCORES, page: Path = PAGE) -> None:
    """Writes conditions and scores of a folder of results, without its answers, and copies its picture.

    Raises:
        OSError: The folder has no results.json or no picture.
    """
    found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    shutil.copyfile(folder / PICTURE, page.parent / PICTURE)
    kept = {"conditions": found["conditions"], "summaries": _rounded(found["summaries"])}
    scores.write_text(json.dumps(kept, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Copy scores into benchmarks/results.")
    parser.add_argument("results", type=Path, help="folder with results.json and its picture")
    publish(parser.parse_args(arguments).results)


if __name__ == "__main__":
    main()
