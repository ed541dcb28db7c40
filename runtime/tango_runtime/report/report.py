"""The report of one answer: a self-contained HTML page, and a contact sheet as a PNG."""

from __future__ import annotations

import base64
import io
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tango_plugins.errors import TangoError
from tango_runtime.report.contact_sheet import contact_sheet
from tango_runtime.report.style import MERGED, REST, SALIENT, cells, duration
from tango_runtime.util.files import atomic_write

#: Colors of salience, low to high: black, violet, red, amber, ivory; lightness only increases.
_HEAT = ((16, 14, 44), (110, 30, 110), (220, 75, 70), (250, 180, 70), (255, 246, 205))

_JPEG_SIDE, _JPEG_QUALITY = 384, 80


@dataclass(frozen=True, eq=False)
class Report:
    """One question, its answer, and the video tokens that the answer is based on.

    Attributes:
        video: Name of the video.
        question: The question, as asked.
        answer: The answer, as generated; of any length.
        bundle: Name of the bundle.
        backend: Description of the backend that ran it, one line.
        version: Version of tango-edge.
        retention_ratio: Requested fraction of video tokens, or None for an unpruned run.
        frames: uint8 [F, S, S, 3], RGB, resized to the square that the model takes.
        seconds: float32 [F], time of each frame in the video; non-decreasing.
        sampling: How the frames were chosen, one line; empty where they are evenly spaced.
        aspect: Width over height of the video, which undoes that resize.
        grid: (H, W) tokens of a frame; L = H·W.
        salience: float32 [F, L], finite.
        indices: int32 [K], flat index f·L + l of every kept token, ascending, K ≥ 1.
        merged: bool [K]; True: a context token that represents a cluster; False: a token kept as it is.
        segments: int32 [N, 2], first frame and one past the last, in order, covering every frame once;
            empty [0, 2] where the frames were not grouped.
        rows: Positions that the video takes in the prompt: the kept tokens, and row ends if the model has them.
        thinned: Those of them that the decoder's upper layers saw; None where every layer saw all.
        prompt_tokens: Length of the prompt, video included.
        generated_tokens: Length of the answer.
        stages: Name and milliseconds of each stage, in order; the last one generates every token after the first.
        tokens_per_second: Rate of that last stage; 0 if it did not run.

    Raises:
        TangoError: An array has the wrong shape or values out of range.
    """

    video: str
    question: str
    answer: str
    bundle: str
    backend: str
    version: str
    retention_ratio: float | None
    frames: NDArray[np.uint8]
    seconds: NDArray[np.float32]
    sampling: str
    aspect: float
    grid: tuple[int, int]
    salience: NDArray[np.float32]
    indices: NDArray[np.int32]
    merged: NDArray[np.bool_]
    segments: NDArray[np.int32]
    rows: int
    thinned: int | None
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
        """Writes the report as one self-contained HTML file, atomically.

        Raises:
            TangoError: The file cannot be written.
        """
        source = resources.files("tango_runtime.report").joinpath("report.html.jinja").read_text("utf-8")
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        environment.filters["duration"] = duration
        text = environment.from_string(source).render(
            report=self,
            frames=_cards(self),
            timeline=_timeline(self),
            stages=_stages(self),
            tokens=_tokens(self),
            heat=", ".join(f"rgb{stop}" for stop in _HEAT),
        )
        # A name that is not UTF-8 is shown with question marks.
        atomic_write(Path(path), lambda file: file.write(text.encode(errors="replace")))

    def picture(self, path: str | os.PathLike[str]) -> None:
        """Writes the contact sheet as a PNG, atomically.

        It uses Pillow's built-in font: accents are dropped, letters that the font lacks show as question marks.

        Raises:
            TangoError: The file cannot be written.
        """
        sheet = contact_sheet(self)
        atomic_write(Path(path), lambda file: sheet.save(file, "PNG"))


def _require(valid: bool, name: str, expected: str) -> None:
    if not valid:
        raise TangoError(f"invalid {name} in the report", f"it must be {expected}")


# What the template shows, as plain values.


def _cards(report: Report) -> list[dict[str, Any]]:
    """One entry per frame: its image, its overlays as SVG paths in units of tokens, its counts."""
    kind = report.kind
    segment = np.repeat(np.arange(len(report.segments)), np.diff(report.segments, axis=1).ravel())
    most = int((kind != REST).sum(1).max())
    heat = _heat(report.salience)
    cards = []
    for f, frame in enumerate(report.frames):
        salient, merged = (cells(kind[f] == which, report.grid) for which in (SALIENT, MERGED))
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


def _outlines(cells: list[tuple[int, int]]) -> str:
    # Inset, so that two neighbors are still seen as two tokens.
    return "".join(f"M{c + 0.08:g} {r + 0.08:g}h.84v.84h-.84z" for r, c in cells)


def _timeline(report: Report) -> dict[str, Any]:
    """Frames, segments and ticks, with their start and length as fractions of the time shown."""
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
    """F + 1 times: a frame lasts until the next one, the last for the median duration of the others."""
    gaps = np.diff(seconds)
    last = float(np.median(gaps)) if gaps.size and np.median(gaps) > 0 else 1.0
    return [*seconds.tolist(), float(seconds[-1]) + last]


def _tick_step(span: float) -> float:
    """The smallest step of 1, 2 or 5 times a power of ten that gives at most ten ticks."""
    power = 10.0 ** math.floor(math.log10(span / 10))
    return next(power * n for n in (1, 2, 5, 10) if span / (power * n) <= 10)


def _stages(report: Report) -> list[dict[str, Any]]:
    whole = sum(ms for _, ms in report.stages) or 1.0
    return [{"name": name, "ms": ms, "share": ms / whole} for name, ms in report.stages]


def _tokens(report: Report) -> dict[str, Any]:
    """Data of the tooltip for the token under the pointer."""
    return {
        "grid": report.grid,
        "kind": ["".join(map(str, row)) for row in report.kind.tolist()],
        "salience": [[float(f"{x:.3g}") for x in row] for row in report.salience.tolist()],
    }


def _heat(salience: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8 [F, L, 4]: salience as RGBA, on one scale for the whole video.

    The scale ends at the 99th percentile, so that a few attention sinks do not darken everything else.
    """
    low, high, top = (float(np.percentile(salience, q)) for q in (0, 99, 100))
    high = high if high > low else top
    x = np.clip((salience.astype(np.float64) - low) / ((high - low) or 1.0), 0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    rgb = [np.interp(x, stops, channel) for channel in zip(*_HEAT, strict=True)]
    return np.stack([*rgb, 255 * (0.45 + 0.5 * x)], -1).astype(np.uint8)


def _unsquare(frame: NDArray[np.uint8], aspect: float, longest: int = _JPEG_SIDE) -> Image.Image:
    """The frame in the video's aspect ratio, no side longer than ``longest`` pixels or its own size."""
    side = min(frame.shape[0], longest)
    size = max(1, round(side * min(1.0, aspect))), max(1, round(side / max(1.0, aspect)))
    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)


def _data_uri(image: Image.Image, format: Literal["JPEG", "PNG"], **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
