"""The contact sheet: every frame, its kept tokens outlined, the rest dimmed."""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tango_runtime.report.style import MERGED, MERGED_RGB, REST, SALIENT, SALIENT_RGB, cells, duration

_WIDTH, _MARGIN, _GAP = 1600, 55, 14  # chosen so that eight columns divide evenly
_TITLE_STEP, _BODY_STEP, _CAPTION, _MAX_HEIGHT = 44, 33, 40, 720  # pixels
_ASCII = str.maketrans({"–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'})
_PAPER, _INK, _MUTED = (255, 255, 255), (24, 26, 31), (107, 114, 125)


class Drawable(Protocol):
    """What the sheet shows of an answer; a ``Report`` has all of it."""

    @property
    def question(self) -> str:
        """As asked."""

    @property
    def answer(self) -> str:
        """The answer's text."""

    @property
    def backend(self) -> str:
        """What ran the graphs."""

    @property
    def aspect(self) -> float:
        """Width over height of the source's frames."""

    @property
    def frames(self) -> NDArray[np.uint8]:
        """[F, H, W, 3]."""

    @property
    def seconds(self) -> NDArray[np.float32]:
        """[F], time of each frame."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""

    @property
    def merged(self) -> NDArray[np.bool_]:
        """[K], True for a merged token."""

    @property
    def kind(self) -> NDArray[np.uint8]:
        """[F, L], what became of each token."""

    @property
    def kept(self) -> int:
        """K."""

    @property
    def total(self) -> int:
        """F·L."""

    @property
    def first_token_ms(self) -> float:
        """Milliseconds to the first token."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second while decoding."""


def contact_sheet(report: Drawable) -> Image.Image:
    """Draws a report's frames in rows of up to eight, 1600 pixels wide, below the question and the answer."""
    title, body, small = (ImageFont.load_default(size) for size in (34, 24, 17))
    inner = _WIDTH - 2 * _MARGIN
    question = _wrap(_plain(report.question), title, inner, lines=2)
    answer = _wrap(_plain(report.answer), body, inner, lines=3)
    columns = min(len(report.frames), 8)
    rows = math.ceil(len(report.frames) / columns)
    step = min(640, (inner - (columns - 1) * _GAP) // columns) + _GAP
    size = _tile_size(step - _GAP, report.aspect)
    top = _MARGIN + _TITLE_STEP * len(question) + _BODY_STEP * len(answer) + 36
    bottom = top + rows * (size[1] + _CAPTION)
    sheet = Image.new("RGB", (_WIDTH, bottom + 34 + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for n, line in enumerate(question):
        draw.text((_MARGIN, _MARGIN + _TITLE_STEP * n), line, _INK, title, anchor="lt")
    below = _MARGIN + _TITLE_STEP * len(question) + 8
    for n, line in enumerate(answer):
        draw.text((_MARGIN, below + _BODY_STEP * n), line, _MUTED, body, anchor="lt")
    for f in range(len(report.frames)):
        corner = _MARGIN + f % columns * step, top + f // columns * (size[1] + _CAPTION)
        _paste_frame(sheet, draw, report, f, corner, size, small)
    _legend(draw, report, bottom + 22, small)
    return sheet


def _tile_size(width: int, aspect: float) -> tuple[int, int]:
    height = max(1, round(width / aspect))
    return (width, height) if height <= _MAX_HEIGHT else (max(1, round(_MAX_HEIGHT * aspect)), _MAX_HEIGHT)


def _paste_frame(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    report: Drawable,
    f: int,
    corner: tuple[int, int],
    size: tuple[int, int],
    font: Any,
) -> None:
    """Frame ``f`` with its tokens; below it the time on the left, the number of kept tokens on the right."""
    kind, (x, y), (width, height) = report.kind[f], corner, size
    tile = _dimmed(report.frames[f], kind.reshape(report.grid), size)
    if report.kept < report.total:
        _outline(tile, kind, report.grid)
    sheet.paste(tile, corner)
    draw.text((x, y + height + 9), f"{report.seconds[f]:.1f} s", _MUTED, font, anchor="lt")
    draw.text((x + width, y + height + 9), f"{np.count_nonzero(kind)}", _INK, font, anchor="rt")


def _dimmed(frame: NDArray[np.uint8], kind: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """A frame resized to ``size``; where ``kind``, uint8 [H, W], is not kept it is dark gray."""
    tile = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
    rest = tile.convert("L").point([level // 2 for level in range(256)]).convert("RGB")
    kept = Image.fromarray(np.where(kind != REST, 255, 0).astype(np.uint8))
    return Image.composite(tile, rest, kept.resize(size, Image.Resampling.NEAREST))


def _outline(tile: Image.Image, kind: NDArray[np.uint8], grid: tuple[int, int]) -> None:
    draw = ImageDraw.Draw(tile)
    for which in (SALIENT, MERGED):
        for row, column in cells(kind == which, grid):
            x0, x1 = (round(edge * tile.width / grid[1]) for edge in (column, column + 1))
            y0, y1 = (round(edge * tile.height / grid[0]) for edge in (row, row + 1))
            _mark(draw, (x0, y0, x1 - 1, y1 - 1), which)


def _mark(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], which: int) -> None:
    x0, y0, x1, y1 = box
    color = MERGED_RGB if which == MERGED else SALIENT_RGB
    if min(x1 - x0, y1 - y0) < 4:  # too small for an outline: fill the cell instead
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), fill=color)
        return
    draw.rectangle(box, outline=color, width=2 if min(x1 - x0, y1 - y0) >= 12 else 1)
    if which == MERGED:
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=color)


def _legend(draw: ImageDraw.ImageDraw, report: Drawable, y: int, font: Any) -> None:
    """The meaning of the colors on the left, the figures of the run on the right."""
    merged = int(report.merged.sum())
    entries = [(SALIENT, f"salient {report.kept - merged:,}"), (MERGED, f"merged {merged:,}")]
    x = _MARGIN
    for which, label in entries if report.kept < report.total else ():
        _mark(draw, (x, y - 1, x + 15, y + 14), which)
        draw.text((x + 25, y), label, _INK, font, anchor="lt")
        x += 53 + round(draw.textlength(label, font))
    figures = [
        f"{report.kept:,} of {report.total:,} tokens ({report.kept / report.total:.1%})",
        f"{duration(report.first_token_ms)} to the first token",
        f"{report.tokens_per_second:.1f} tokens/s" if report.tokens_per_second else "",
        _plain(report.backend),
    ]
    draw.text((_WIDTH - _MARGIN, y), "   ".join(filter(None, figures)), _MUTED, font, anchor="rt")


def _plain(text: str) -> str:
    """The text in ASCII, all that Pillow's built-in font has."""
    decomposed = unicodedata.normalize("NFKD", text.translate(_ASCII))
    return "".join(c for c in decomposed if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def _wrap(text: str, font: Any, width: int, lines: int) -> list[str]:
    """At most ``lines`` lines of at most ``width`` pixels; an ellipsis marks what was cut."""
    words, wrapped = text.split(), [""]
    for word in words:
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    wrapped, cut = wrapped[:lines], len(wrapped) > lines
    return [_fit(line, font, width, cut and n == lines - 1) for n, line in enumerate(wrapped)]


def _fit(line: str, font: Any, width: int, ellipsis: bool) -> str:
    if not ellipsis and font.getlength(line) <= width:
        return line
    limit = width - font.getlength("...")
    return line[: bisect(range(len(line)), limit, key=lambda n: font.getlength(line[: n + 1]))].rstrip(" ,.;") + "..."
