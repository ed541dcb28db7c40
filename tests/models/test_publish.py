"""Results copied into a document, training logs drawn as a picture."""

import json
from pathlib import Path

import pytest
from PIL import Image

TINY = Path(__file__).parents[2] / "models" / "tiny"
RESULTS = "# Accuracy kept\n\n- data: mine\n\n" + "\n".join(
    f"## {title}\n\n| table |\n"
    for title in (
        "Accuracy",
        "Tokens and time",
        "Accuracy by type of question at 0.05",
        "Accuracy by type of question at 0.1",
    )
)


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(TINY)


@pytest.fixture
def results(tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all/results.md").write_text(RESULTS)
    (tmp_path / "all/accuracy.png").write_bytes(b"picture")
    return tmp_path / "all"


def test_results_are_copied_into_a_document(results, tmp_path):
    from publish import BEGIN, END, main

    document = tmp_path / "docs" / "page.md"
    document.parent.mkdir()
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main([str(results), str(document)])
    once = document.read_text()
    assert [line for line in once.splitlines() if line.startswith("###")] == [
        "### Accuracy",
        "### Accuracy by type of question at 0.1",
    ]
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "- data: mine" in once
    assert "old" not in once
    assert (document.parent / "accuracy.png").read_bytes() == b"picture"
    main([str(results), str(document)])
    assert document.read_text() == once


def test_a_document_without_marks_is_not_changed(results, tmp_path):
    from publish import publish

    (tmp_path / "page.md").write_text("text")
    with pytest.raises(ValueError, match="does not have"):
        publish(results, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == "text"
    assert not (tmp_path / "accuracy.png").exists()


def test_the_document_has_the_marks():
    from publish import BEGIN, END

    text = (TINY.parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1


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
