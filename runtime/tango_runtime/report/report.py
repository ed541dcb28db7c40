"""What a run kept of its video: one HTML file that needs nothing else, and a contact sheet."""

from __future__ import annotations

import base64
import io
import itertools
import math
import os
import unicodedata
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tango_plugins.errors import TangoError

#: What became of a token, as :attr:`Report.kind` writes it.
REST, SALIENT, MERGED = 0, 1, 2

#: Orange and blue stay apart under every common form of colour blindness; merged tokens bear a dot besides.
#: The same two as in report.html.jinja.
_SALIENT_RGB, _MERGED_RGB = (255, 176, 0), (64, 156, 255)

#: Salience from low to high: darkness, violet, red, amber, ivory; its lightness only grows.
_HEAT = ((16, 14, 44), (110, 30, 110), (220, 75, 70), (250, 180, 70), (255, 246, 205))

_JPEG_SIDE, _JPEG_QUALITY = 384, 80


@dataclass(frozen=True, eq=False)
class Report:
    """One question, its answer, and what of the video the answer was read from.

    Attributes:
        video: Name of the video.
        question: The question, as asked.
        answer: The answer, as generated; of any length.
        bundle: Name of the bundle.
        engine: What ran it, in one line.
        version: Version of tango-edge.
        retention_ratio: Fraction asked for, or None for an unpruned run.
        frames: uint8 [F, S, S, 3], RGB, resized to the square that the model takes.
        seconds: float32 [F], time of each frame in the video; never decreases.
        aspect: Width over height of the video, to undo that resize.
        grid: (H, W) tokens of a frame; L = H·W.
        salience: float32 [F, L], finite.
        indices: int32 [K], flat index f·L + l of every kept token, ascending, K ≥ 1.
        merged: bool [K]; True: a context token that stands for a cluster; False: a token kept as it is.
        segments: int32 [N, 2], first frame and one past the last, in order, covering every frame once;
            [0, 2] where the frames were not grouped.
        prompt_tokens: Length of the prompt, video tokens included.
        generated_tokens: Length of the answer.
        stages: Name and milliseconds of each stage, in order; the last one generates all tokens but the first.
        tokens_per_second: Rate of that last stage; 0 where it did not run.

    Raises:
        TangoError: An array has another shape or values out of range.
    """

    video: str
    question: str
    answer: str
    bundle: str
    engine: str
    version: str
    retention_ratio: float | None
    frames: NDArray[np.uint8]
    seconds: NDArray[np.float32]
    aspect: float
    grid: tuple[int, int]
    salience: NDArray[np.float32]
    indices: NDArray[np.int32]
    merged: NDArray[np.bool_]
    segments: NDArray[np.int32]
    prompt_tokens: int
    generated_tokens: int
    stages: Sequence[tuple[str, float]]
    tokens_per_second: float

    def __post_init__(self) -> None:
        F, L, K = len(self.frames), self.grid[0] * self.grid[1], len(self.indices)
        _require(self.frames.ndim == 4 and self.frames.shape[3] == 3 and F > 0, "frames", "[F, S, S, 3], F ≥ 1")
        _require(self.frames.dtype == np.uint8, "frames", "uint8")
        _require(self.seconds.shape == (F,) and bool(np.all(np.diff(self.seconds) >= 0)), "seconds", "[F], ascending")
        _require(math.isfinite(self.aspect) and self.aspect > 0, "aspect", "above 0")
        _require(self.salience.shape == (F, L) and bool(np.isfinite(self.salience).all()), "salience", "[F, L], finite")
        ascending = K > 0 and self.indices[0] >= 0 and self.indices[-1] < F * L and np.all(np.diff(self.indices) > 0)
        _require(bool(ascending), "indices", "[K], ascending, inside F·L, K ≥ 1")
        _require(self.merged.shape == (K,), "merged", "[K]")
        bounds = [0, *self.segments[:, 1].tolist()]
        covers = not len(self.segments) or (bounds[:-1] == self.segments[:, 0].tolist() and bounds[-1] == F)
        _require(covers, "segments", "[N, 2], covering every frame once")

    @property
    def total(self) -> int:
        """Video tokens before pruning, F·L."""
        return int(self.salience.size)

    @property
    def kept(self) -> int:
        """Video tokens kept, K."""
        return len(self.indices)

    @property
    def first_token_ms(self) -> float:
        """Milliseconds to the first token: every stage but the last."""
        return sum(ms for _, ms in self.stages[:-1])

    @property
    def kind(self) -> NDArray[np.uint8]:
        """uint8 [F, L]: 0 not kept, 1 salient, 2 merged."""
        kind = np.full(self.total, REST, np.uint8)
        kind[self.indices] = np.where(self.merged, MERGED, SALIENT)
        return kind.reshape(self.salience.shape)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one HTML file without any outside resource; whole or not at all.

        Raises:
            TangoError: The file cannot be written.
        """
        source = resources.files("tango_runtime.report").joinpath("report.html.jinja").read_text("utf-8")
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        environment.filters["duration"] = _duration
        text = environment.from_string(source).render(
            report=self,
            frames=_cards(self),
            timeline=_timeline(self),
            stages=_stages(self),
            tokens=_tokens(self),
            heat=", ".join(f"rgb{stop}" for stop in _HEAT),
        )
        _replace(Path(path), lambda file: file.write(text.encode()))

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Writes a PNG contact sheet: every frame, its kept tokens outlined, the rest dimmed; whole or not at all.

        Pillow's own font draws it: accents are dropped, letters that it lacks show as question marks.

        Raises:
            TangoError: The file cannot be written.
        """
        sheet = _contact_sheet(self)
        _replace(Path(path), lambda file: sheet.save(file, "PNG"))


def _require(holds: bool, name: str, wanted: str) -> None:
    if not holds:
        raise TangoError(f"{name} of the report does not fit", f"it must be {wanted}")


def _replace(path: Path, write: Callable[[io.BufferedWriter], object]) -> None:
    """Writes beside `path` and renames, so that a reader sees the old file or the whole new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            write(file)
        aside.replace(path)
    except OSError as error:
        raise TangoError(
            f"{path}: {error.strerror}", "name a file in a folder that exists and can be written"
        ) from None
    finally:
        aside.unlink(missing_ok=True)


# The page: what the template shows, as plain values


def _cards(report: Report) -> list[dict[str, Any]]:
    """One entry a frame: its picture, its overlays as SVG paths in units of tokens, its counts."""
    kind = report.kind
    segment = np.repeat(np.arange(len(report.segments)), np.diff(report.segments, axis=1).ravel())
    most = int((kind != REST).sum(1).max())
    heat = _heat(report.salience)
    cards = []
    for f, frame in enumerate(report.frames):
        salient, merged = (_cells(kind[f] == which, report.grid) for which in (SALIENT, MERGED))
        cards.append(
            {
                "seconds": float(report.seconds[f]),
                "segment": int(segment[f]) if len(segment) else None,
                "jpeg": _data_uri(_unsquare(frame, report.aspect), "JPEG", quality=_JPEG_QUALITY, optimize=True),
                "heat": _data_uri(Image.fromarray(heat[f].reshape(*report.grid, 4)), "PNG"),
                "salient": len(salient),
                "merged": len(merged),
                "salient_share": len(salient) / most,
                "merged_share": len(merged) / most,
                "salient_path": _outlines(salient),
                "merged_path": _outlines(merged),
                "dots_path": "".join(f"M{c + 0.5:g} {r + 0.5:g}h0" for r, c in merged),
                "kept_path": "".join(f"M{c} {r}h1v1h-1z" for r, c in salient + merged),
            }
        )
    return cards


def _cells(mask: NDArray[np.bool_], grid: tuple[int, int]) -> list[tuple[int, int]]:
    """(row, column) of every True of a frame's [L]."""
    rows, columns = np.nonzero(mask.reshape(grid))
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _outlines(cells: list[tuple[int, int]]) -> str:
    # Inset, so that two neighbours stay two tokens.
    return "".join(f"M{c + 0.08:g} {r + 0.08:g}h.84v.84h-.84z" for r, c in cells)


def _timeline(report: Report) -> dict[str, Any]:
    """Frames, segments and ticks, each with where it starts and how long it is, as fractions of the time shown."""
    edges = _edges(report.seconds)
    start, span = edges[0], edges[-1] - edges[0]
    counts = (report.kind != REST).sum(1)
    step = _tick_step(span)
    return {
        "frames": [((a - start) / span, (b - a) / span) for a, b in itertools.pairwise(edges)],
        "segments": [
            {
                "first": a,
                "last": b - 1,
                "from": edges[a],
                "to": edges[b],
                "kept": int(counts[a:b].sum()),
                "at": (edges[a] - start) / span,
                "width": (edges[b] - edges[a]) / span,
            }
            for a, b in report.segments.tolist()
        ],
        "ticks": [
            (f"{tick * step:.10g}", (tick * step - start) / span)
            for tick in range(math.ceil(start / step), math.floor((start + span) / step) + 1)
        ],
        "from": start,
        "to": start + span,
    }


def _edges(seconds: NDArray[np.float32]) -> list[float]:
    """F + 1 times: a frame lasts until the next one, the last as long as the median of the others."""
    gaps = np.diff(seconds)
    last = float(np.median(gaps)) if gaps.size and np.median(gaps) > 0 else 1.0
    return [*seconds.tolist(), float(seconds[-1]) + last]


def _tick_step(span: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that gives at most ten ticks."""
    power = 10.0 ** math.floor(math.log10(span / 10))
    return next(power * n for n in (1, 2, 5, 10) if span / (power * n) <= 10)


def _stages(report: Report) -> list[dict[str, Any]]:
    whole = sum(ms for _, ms in report.stages) or 1.0
    return [{"name": name, "ms": ms, "share": ms / whole} for name, ms in report.stages]


def _tokens(report: Report) -> dict[str, Any]:
    """What the page tells of the token under the pointer."""
    return {
        "grid": report.grid,
        "kind": ["".join(map(str, row)) for row in report.kind.tolist()],
        "salience": [[float(f"{x:.3g}") for x in row] for row in report.salience.tolist()],
    }


def _heat(salience: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8 [F, L, 4]: salience as colour, one scale for the whole video.

    The scale ends at the 99th percentile: a few attention sinks must not darken all the rest.
    """
    low, high, top = (float(np.percentile(salience, q)) for q in (0, 99, 100))
    high = high if high > low else top
    x = np.clip((salience.astype(np.float64) - low) / ((high - low) or 1.0), 0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    rgb = [np.interp(x, stops, channel) for channel in zip(*_HEAT, strict=True)]
    return np.stack([*rgb, 255 * (0.45 + 0.5 * x)], -1).astype(np.uint8)


def _unsquare(frame: NDArray[np.uint8], aspect: float, longest: int = _JPEG_SIDE) -> Image.Image:
    """The frame at the video's own aspect, no side above `longest` pixels or its own size."""
    side = min(frame.shape[0], longest)
    size = max(1, round(side * min(1.0, aspect))), max(1, round(side / max(1.0, aspect)))
    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)


def _data_uri(image: Image.Image, format: Literal["JPEG", "PNG"], **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _duration(ms: float) -> str:
    """Milliseconds for a reader: 8.4 ms, 412 ms, 12.3 s."""
    if ms >= 10_000:
        return f"{ms / 1000:,.1f} s"
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.1f} ms"


# The contact sheet

_WIDTH, _MARGIN, _GAP = 1600, 55, 14  # eight columns come out even
_ASCII = str.maketrans({"–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'})
_PAPER, _INK, _MUTED = (255, 255, 255), (24, 26, 31), (107, 114, 125)


def _contact_sheet(report: Report) -> Image.Image:
    title, body, small = (ImageFont.load_default(size) for size in (34, 24, 17))
    room = _WIDTH - 2 * _MARGIN
    question = _wrap(_plain(report.question), title, room, lines=2)
    answer = _wrap(_plain(report.answer), body, room, lines=3)
    columns = min(len(report.frames), 8)
    step = min(640, (room - (columns - 1) * _GAP) // columns) + _GAP
    rows = math.ceil(len(report.frames) / columns)
    width, height = step - _GAP, max(1, round((step - _GAP) / report.aspect))
    if height > 720:
        width, height = max(1, round(720 * report.aspect)), 720
    top = _MARGIN + 44 * len(question) + 33 * len(answer) + 36
    bottom = top + rows * (height + 40)
    sheet = Image.new("RGB", (_WIDTH, bottom + 34 + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for n, line in enumerate(question):
        draw.text((_MARGIN, _MARGIN + 44 * n), line, _INK, title, anchor="lt")
    for n, line in enumerate(answer):
        draw.text((_MARGIN, _MARGIN + 44 * len(question) + 8 + 33 * n), line, _MUTED, body, anchor="lt")
    for f, kind in enumerate(report.kind):
        x = _MARGIN + f % columns * step
        y = top + f // columns * (height + 40)
        tile = _dimmed(report.frames[f], kind.reshape(report.grid), (width, height))
        if report.kept < report.total:
            _outline(tile, kind, report.grid)
        sheet.paste(tile, (x, y))
        draw.text((x, y + height + 9), f"{report.seconds[f]:.1f} s", _MUTED, small, anchor="lt")
        draw.text((x + width, y + height + 9), f"{np.count_nonzero(kind)}", _INK, small, anchor="rt")
    _legend(draw, report, bottom + 22, small)
    return sheet


def _dimmed(frame: NDArray[np.uint8], kind: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """A frame at `size` with its kept tokens in colour and the rest, by `kind` [H, W], grey and dark."""
    tile = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
    rest = tile.convert("L").point([level // 2 for level in range(256)]).convert("RGB")
    kept = Image.fromarray(np.where(kind != REST, 255, 0).astype(np.uint8))
    return Image.composite(tile, rest, kept.resize(size, Image.Resampling.NEAREST))


def _outline(tile: Image.Image, kind: NDArray[np.uint8], grid: tuple[int, int]) -> None:
    draw = ImageDraw.Draw(tile)
    for which in (SALIENT, MERGED):
        for row, column in _cells(kind == which, grid):
            x0, x1 = (round(edge * tile.width / grid[1]) for edge in (column, column + 1))
            y0, y1 = (round(edge * tile.height / grid[0]) for edge in (row, row + 1))
            _mark(draw, (x0, y0, x1 - 1, y1 - 1), which)


def _mark(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], which: int) -> None:
    x0, y0, x1, y1 = box
    colour = _MERGED_RGB if which == MERGED else _SALIENT_RGB
    if min(x1 - x0, y1 - y0) < 4:  # too small for an outline: the cell itself bears the colour
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), fill=colour)
        return
    draw.rectangle(box, outline=colour, width=2 if min(x1 - x0, y1 - y0) >= 12 else 1)
    if which == MERGED:
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=colour)


def _legend(draw: ImageDraw.ImageDraw, report: Report, y: int, font: Any) -> None:
    """What the colours say on the left, the run in figures on the right."""
    merged = int(report.merged.sum())
    entries = [(SALIENT, f"salient {report.kept - merged:,}"), (MERGED, f"merged {merged:,}")]
    x = _MARGIN
    for which, label in entries if report.kept < report.total else ():
        _mark(draw, (x, y - 1, x + 15, y + 14), which)
        draw.text((x + 25, y), label, _INK, font, anchor="lt")
        x += 53 + round(draw.textlength(label, font))
    figures = [
        f"{report.kept:,} of {report.total:,} tokens ({report.kept / report.total:.1%})",
        f"{_duration(report.first_token_ms)} to the first token",
        f"{report.tokens_per_second:.1f} tokens/s" if report.tokens_per_second else "",
        _plain(report.engine),
    ]
    draw.text((_WIDTH - _MARGIN, y), "   ".join(filter(None, figures)), _MUTED, font, anchor="rt")


def _plain(text: str) -> str:
    """The text in ASCII, which is what Pillow's own font has."""
    decomposed = unicodedata.normalize("NFKD", text.translate(_ASCII))
    return "".join(c for c in decomposed if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def _wrap(text: str, font: Any, width: int, lines: int) -> list[str]:
    """At most `lines` lines of at most `width` pixels; what is left out shows as an ellipsis."""
    words, wrapped = text.split(), [""]
    for word in words:
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    wrapped, left_out = wrapped[:lines], len(wrapped) > lines
    return [_fit(line, font, width, left_out and n == lines - 1) for n, line in enumerate(wrapped)]


def _fit(line: str, font: Any, width: int, ellipsis: bool) -> str:
    if not ellipsis and font.getlength(line) <= width:
        return line
    room = width - font.getlength("...")
    return line[: bisect(range(len(line)), room, key=lambda n: font.getlength(line[: n + 1]))].rstrip(" ,.;") + "..."
