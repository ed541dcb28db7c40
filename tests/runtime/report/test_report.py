"""The report: it matches its arrays, is self-contained, of limited size, and written atomically."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tango_plugins.errors import TangoError
from tango_runtime.report.report import Report, _heat, _timeline
from tango_runtime.report.style import MERGED, REST, SALIENT, duration


def make(F: int = 6, grid: tuple[int, int] = (4, 5), side: int = 64, **changes: Any) -> Report:
    rng = np.random.default_rng(0)
    total = F * grid[0] * grid[1]
    indices = np.sort(rng.choice(total, max(1, total // 4), replace=False)).astype(np.int32)
    facts: dict[str, Any] = {
        "video": "clip.mp4",
        "question": "What happens?",
        "answer": "A ball rolls.",
        "bundle": "llava-ov-0.5b",
        "backend": "ONNX Runtime, CPU",
        "version": "0.1.0",
        "retention_ratio": 0.25,
        "frames": _texture(rng, F, side),
        "seconds": np.arange(F, dtype=np.float32) / 2,
        "sampling": "",
        "aspect": 16 / 9,
        "grid": grid,
        "salience": rng.random((F, grid[0] * grid[1]), np.float32),
        "indices": indices,
        "merged": rng.random(len(indices)) < 0.5,
        "segments": np.array([[0, 1], [1, F]] if F > 1 else [[0, 1]], np.int32),
        "rows": len(indices),
        "thinned": None,
        "prompt_tokens": len(indices) + 20,
        "generated_tokens": 12,
        "stages": [("decode video", 8.25), ("vision", 300.0), ("prune", 12.0), ("prefill", 91.75), ("decode", 600.0)],
        "tokens_per_second": 18.3,
    }
    return Report(**facts | changes)


def unpruned(**changes: Any) -> Report:
    every = {"indices": np.arange(120, dtype=np.int32), "merged": np.zeros(120, bool)}
    return make(retention_ratio=None, segments=np.zeros((0, 2), np.int32), **every | changes)


def _texture(rng: np.random.Generator, F: int, side: int) -> np.ndarray:
    """Coarse shapes under fine noise: harder on JPEG than most video."""
    coarse = rng.integers(0, 256, (F, 12, 12, 3), np.uint8)
    large = np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in coarse])
    return np.clip(large + rng.normal(0, 8, large.shape), 0, 255).astype(np.uint8)


def page(report: Report, folder: Path) -> str:
    report.write(folder / "report.html")
    return (folder / "report.html").read_text("utf-8")


def unclosed(html: str) -> list[str]:
    """Tags still open at the end; fails on one that is not closed where it was opened."""
    stack: list[str] = []
    for closing, tag in re.findall(
        r"<(/?)([a-z]\w*)", re.sub(r"(<script.*?>|<style>).*?</", r"\1</", html, flags=re.DOTALL)
    ):
        if closing:
            assert stack.pop() == tag
        elif tag not in {"meta", "link", "img", "input", "path"}:
            stack.append(tag)
    return stack


EDGES = {
    "one frame, one token": make(1, (1, 1)),
    "64 frames": make(64),
    "salience all zero": make(salience=np.zeros((6, 20), np.float32)),
    "salience constant": make(salience=np.full((6, 20), 0.05, np.float32)),
    "segments of one frame": make(segments=np.array([[f, f + 1] for f in range(6)], np.int32)),
    "one token kept": make(indices=np.array([119], np.int32), merged=np.array([True])),
    "all frames at one time": make(seconds=np.zeros(6, np.float32)),
    "hours of video": make(seconds=np.arange(6, dtype=np.float32) * 3600),
    "portrait": make(aspect=9 / 16),
    "ribbon": make(aspect=40.0),
    "long answer": make(answer="And then, again. " * 500),
    "one word without end": make(question="x" * 3000, answer=""),
    "no decode stage": make(generated_tokens=1, tokens_per_second=0.0, stages=[("all", 0.0)]),
    "unpruned": unpruned(),
}


@pytest.mark.parametrize("report", EDGES.values(), ids=EDGES.keys())
def test_every_report_gives_a_valid_page_and_contact_sheet(report: Report, tmp_path: Path) -> None:
    html = page(report, tmp_path)
    assert unclosed(html) == []
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", html.partition("<body>")[2].partition("<script")[0])
    report.picture(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 1600


def test_page_refers_to_no_other_file(tmp_path: Path) -> None:
    html = page(make(), tmp_path)
    assert all(value.startswith("data:") for value in re.findall(r'(?:src|href)="([^"]*)"', html))
    assert not re.search(r"https?:|@import|url\(|@font-face|fetch\(", html)
    assert "default-src 'none'" in html


def test_names_and_texts_are_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert('&')</script>"
    texts = dict.fromkeys(("video", "question", "answer", "bundle", "backend", "version"), evil)
    html = page(make(**texts, stages=[(evil, 1.0), (evil, 2.0)]), tmp_path)
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert(&#39;&amp;&#39;)") >= 8


def test_a_name_that_is_not_utf_8_is_shown_with_question_marks(tmp_path: Path) -> None:
    assert "caf?.mp4" in page(make(video=os.fsdecode(b"caf\xe9.mp4")), tmp_path)


def test_tokens_and_overlays_match_the_arrays(tmp_path: Path) -> None:
    report = make()
    html = page(report, tmp_path)
    data = json.loads(re.findall(r'id="tokens">(.*?)</script>', html)[0])
    kind = np.array([[int(c) for c in row] for row in data["kind"]])
    np.testing.assert_array_equal(np.flatnonzero(kind), report.indices)
    np.testing.assert_array_equal(kind.ravel()[report.indices] == MERGED, report.merged)
    np.testing.assert_allclose(data["salience"], report.salience, rtol=5e-3)
    for name, which in (("s", SALIENT), ("m", MERGED)):
        paths = re.findall(rf'class="{name}" d="([^"]*)"', html)
        cells = [
            (f, int(float(r)), int(float(c))) for f, d in enumerate(paths) for c, r in re.findall(r"M(\S+) (\S+?)h", d)
        ]
        np.testing.assert_array_equal(cells, np.argwhere(report.kind.reshape(-1, *report.grid) == which))


def test_figures(tmp_path: Path) -> None:
    html = page(make(), tmp_path)
    text = " ".join(re.sub(r"<[^>]*>", " ", html.partition("<body>")[2]).split())
    for figure in ("30 of 120 video tokens kept", "25.0 %", "412 ms", "18.3 tokens/s", "50 tokens", "20 of them text"):
        assert figure in text


def test_unpruned_page_does_not_mention_pruning(tmp_path: Path) -> None:
    body = page(unpruned(), tmp_path).partition("<body>")[2]
    assert "all of 120 video tokens kept" in body
    assert "unpruned" in body
    assert not re.search(r'Dim the rest|class="key merged"|class="segments"|id="kept" checked', body)


def test_32_frames_of_384_pixels_stay_below_2_5_mb(tmp_path: Path) -> None:
    report = make(32, (14, 14), 384, aspect=1.0)
    report.write(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2.5e6


def test_timeline_is_to_scale() -> None:
    timeline = _timeline(make(4, seconds=np.array([1, 2, 5, 6], np.float32)))
    np.testing.assert_allclose(timeline["frames"], [(0, 1 / 6), (1 / 6, 1 / 2), (2 / 3, 1 / 6), (5 / 6, 1 / 6)])
    assert [(s["first"], s["last"], s["from"], s["to"]) for s in timeline["segments"]] == [(0, 0, 1, 2), (1, 3, 2, 7)]
    assert sum(s["kept"] for s in timeline["segments"]) == 20
    assert timeline["ticks"][0] == ("1", 0)
    assert timeline["ticks"][-1] == ("7", 1)


def test_heat_gets_lighter_with_salience_despite_an_attention_sink() -> None:
    salience = np.linspace(0, 1, 200, dtype=np.float32)[None]
    lightness = _heat(salience)[0, :, :3] @ [0.3, 0.6, 0.1]
    assert (np.diff(lightness) >= -1).all()
    assert np.ptp(lightness) > 200
    with_sink = np.append(salience, np.float32(100))[None]
    assert np.ptp(_heat(with_sink)[0, :-1, :3] @ [0.3, 0.6, 0.1]) > 200


def test_contact_sheet_shows_kept_cells_in_color_and_the_rest_in_gray(tmp_path: Path) -> None:
    one = {"indices": np.array([0, 3], np.int32), "merged": np.array([False, True])}
    report = make(1, (2, 2), aspect=1.0, **one)
    report.picture(tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    salient, merged = (np.argwhere((sheet == color).all(-1)) for color in ((255, 176, 0), (64, 156, 255)))
    y, x = salient.min(0)  # the outline of token 0 begins where the frame does
    assert np.ptp(sheet[y + 10 : y + 300, x + 330 : x + 630], axis=-1).max() == 0  # token 1
    assert np.ptp(sheet[y + 10 : y + 300, x + 10 : x + 300], axis=-1).max() > 50  # token 0
    assert ((merged[:, 0] > y + 310) & (merged[:, 1] > x + 310)).any()


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TangoError, match="absent"):
        make().write(tmp_path / "absent" / "report.html")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(TangoError, match=r"report\.html"):
        make().write(tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = page(make(), tmp_path)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make().picture(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == old
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frames", np.zeros((6, 8, 8), np.uint8)),
        ("frames", np.zeros((6, 8, 8, 3), np.float32)),
        ("seconds", np.array([0, 1, 2, 3, 2, 5], np.float32)),
        ("aspect", 0.0),
        ("salience", np.full((6, 20), np.nan, np.float32)),
        ("salience", np.zeros((6, 19), np.float32)),
        ("indices", np.zeros(0, np.int32)),
        ("indices", np.array([3, 3], np.int32)),
        ("indices", np.array([120], np.int32)),
        ("merged", np.zeros(2, bool)),
        ("segments", np.array([[0, 2], [3, 6]], np.int32)),
        ("segments", np.array([[0, 5]], np.int32)),
    ],
)
def test_invalid_arrays_are_named_in_the_error(name: str, value: object) -> None:
    with pytest.raises(TangoError, match=name):
        make(**{name: value})


def test_rest_is_every_token_that_was_not_kept() -> None:
    report = make()
    assert (report.kind == REST).sum() == report.total - report.kept == 90


@pytest.mark.parametrize(
    ("ms", "expected"), [(8.44, "8.4 ms"), (412.3, "412 ms"), (8954, "8,954 ms"), (12_345, "12.3 s")]
)
def test_duration(ms: float, expected: str) -> None:
    assert duration(ms) == expected


def test_row_ends_are_no_text(tmp_path: Path) -> None:
    assert "7 row ends and 13 of them text<" in page(make(rows=37), tmp_path)


def test_tokens_that_the_decoder_drops_on_its_way(tmp_path: Path) -> None:
    assert "20 of them text; 35 in upper layers<" in page(make(thinned=15), tmp_path)


def test_the_page_says_how_frames_were_chosen(tmp_path):
    make(sampling="keyframes, 0.25 s off").write(tmp_path / "page.html")
    assert "keyframes, 0.25 s off" in (tmp_path / "page.html").read_text()
