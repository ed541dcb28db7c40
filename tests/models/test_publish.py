"""Scores copied for a page, training logs drawn as a picture."""

import json
from pathlib import Path

import pytest
from PIL import Image

TINY = Path(__file__).parents[2] / "models" / "tiny"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(TINY)


def test_scores_are_copied_without_answers(tmp_path):
    from publish import publish

    folder, page = tmp_path / "all", tmp_path / "docs/accuracy.md"
    folder.mkdir()
    page.parent.mkdir()
    found = {"conditions": {"data": "mine"}, "summaries": [{"questions": 3, "share": 1 / 3, "kept": None}]}
    (folder / "results.json").write_text(json.dumps({**found, "questions": ["?"], "trials": [{"answers": ["yes"]}]}))
    (folder / "accuracy.png").write_bytes(b"picture")
    publish(folder, tmp_path / "scores.json", page)
    copied = json.loads((tmp_path / "scores.json").read_text())
    assert copied == {"conditions": {"data": "mine"}, "summaries": [{"questions": 3, "share": 0.3333, "kept": None}]}
    assert (page.parent / "accuracy.png").read_bytes() == b"picture"


def test_training_curves_are_drawn(tmp_path):
    from curve import main, points, read

    lines = [{"stage": s, "step": i, "accuracy": 0.5, "types": {"color": i / 10}} for s in (1, 2) for i in range(10)]
    lines += [
        {"stage": 2, "step": 9, "validation": True, "part": p, "accuracy": p, "types": {"shape": p}} for p in (1, 0.5)
    ]
    (tmp_path / "training.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"done": True}])))
    entries = read(tmp_path)
    assert points(entries, "color", validation=False)[[0, 9, 10]].tolist() == [[0, 0], [9, 90], [9, 0]]
    assert points(entries, "shape", validation=True).tolist() == [[18, 100]]
    main([str(tmp_path / "curve.png"), str(tmp_path)])
    assert Image.open(tmp_path / "curve.png").width > 500
