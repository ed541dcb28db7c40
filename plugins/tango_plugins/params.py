"""The parameters of the Tango operator, their defaults, and where these come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from tango_plugins.errors import TangoError

MergeOrder = Literal["anchor", "density"]
Budget = Literal["paper", "exact"]

#: ONNX attributes, plugin fields and the C interface hold ratios as integers in ten-thousandths. With fp32 attributes
#: even the default budgets would be wrong: floor(20·(1−0.4)) would be 11, not 12.
RATIO_SCALE = 10_000

#: Attention sinks of SigLIP on LLaVA-OneVision's 14×14 grid (the authors' code).
LLAVA_OV_GRID = (14, 14)
LLAVA_OV_SINKS = (28, 27, 41, 169, 11, 12)

#: The fields that are ratios and cosines.
RATIOS = ("retention_ratio", "context_ratio", "expansion", "anchor_weight", "segment_threshold", "static_threshold")


@dataclass(frozen=True)
class PruneParams:
    """Parameters of the operator. Defaults are those of arXiv 2604.09547 and its authors' code.

    Ratios and thresholds have at most four decimals.

    Attributes:
        retention_ratio: Fraction of the video tokens kept, r in (0, 1]. With inner pruning it is the fraction that a
            layer of the decoder sees, averaged over its layers.
        context_ratio: Share of the budget that goes to merged context tokens, c in [0, 1].
        expansion: Candidates per salient token, α from 1 to 100.
        anchor_weight: Minimum weight of the anchor in a merge, β in [0, 1].
        neighbors: k of DPC-KNN, from 1 to 64.
        segment_threshold: Cosine above which a position counts as unchanged when frames are grouped into segments.
            None takes the value that the authors evaluate with: 0.65 at r ≤ 0.1, else 0.8.
        static_threshold: Cosine above which a position of a segment is static.
        sink_positions: Grid positions whose salience is set to 0. None is the paper's setting for LLaVA-OneVision:
            its six sinks on its 14×14 grid, and no sinks on any other grid. Other models pass their own, or ().
        time_base: Base of the rotary angles over seconds, a whole number.
        space_base: Base of the rotary angles over grid rows and columns, a whole number.
        grid: (H, W) of the token grid of one frame; a frame has L = H·W tokens.
        merge_order: ``anchor`` writes each merged token at its own anchor's index. ``density`` reproduces the authors'
            code, which writes it at another anchor's index.
        budget: ``paper`` keeps the tokens that the steps select; ``exact`` always keeps ceil(r·F·L).
        decoder_share: Share of the operator's tokens that a layer of the decoder sees, averaged over its layers, in
            (0, 1]. It is below 1 with inner pruning; the operator then keeps more than r.

    Raises:
        TangoError: A value is outside its range or a ratio has more than four decimals.
    """

    retention_ratio: float = 0.10
    context_ratio: float = 0.4
    expansion: float = 1.5
    anchor_weight: float = 0.6
    neighbors: int = 7
    segment_threshold: float | None = None
    static_threshold: float = 0.8
    sink_positions: tuple[int, ...] | None = None
    time_base: float = 1e4
    space_base: float = 1e3
    grid: tuple[int, int] = LLAVA_OV_GRID
    merge_order: MergeOrder = "anchor"
    budget: Budget = "paper"
    decoder_share: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.sink_positions is not None:
            object.__setattr__(self, "sink_positions", tuple(self.sink_positions))
        for name in RATIOS:
            value = getattr(self, name)
            _require(value is None or _is_ratio(value), name, value, "a number of at most four decimals")
            if value is not None:  # the same bits as in a host that reads the attribute
                object.__setattr__(self, name, round(value * RATIO_SCALE) / RATIO_SCALE)
        _require(0 < self.retention_ratio <= 1, "retention_ratio", self.retention_ratio, "above 0 and at most 1")
        _require(0 < self.decoder_share <= 1, "decoder_share", self.decoder_share, "above 0 and at most 1")
        _require(0 <= self.context_ratio <= 1, "context_ratio", self.context_ratio, "from 0 to 1")
        _require(1 <= self.expansion <= 100, "expansion", self.expansion, "from 1 to 100")
        _require(0 <= self.anchor_weight <= 1, "anchor_weight", self.anchor_weight, "from 0 to 1")
        _require(_is_int(self.neighbors) and 1 <= self.neighbors <= 64, "neighbors", self.neighbors, "from 1 to 64")
        _require(-1 <= self.tau_segment <= 1, "segment_threshold", self.segment_threshold, "a cosine, from -1 to 1")
        _require(-1 <= self.static_threshold <= 1, "static_threshold", self.static_threshold, "a cosine, from -1 to 1")
        for name in ("time_base", "space_base"):
            value = getattr(self, name)
            _require(1 < value < 1e9 and value == int(value), name, value, "a whole number above 1")
        two = len(self.grid) == 2 and all(_is_int(n) and n >= 1 for n in self.grid)
        _require(two, "grid", self.grid, "two positive integers (rows, columns)")
        positions = self.grid[0] * self.grid[1]
        for sink in self.sinks:
            _require(_is_int(sink) and 0 <= sink < positions, "sink_positions", sink, f"inside a grid of {positions}")
        _require(self.merge_order in get_args(MergeOrder), "merge_order", self.merge_order, "'anchor' or 'density'")
        _require(self.budget in get_args(Budget), "budget", self.budget, "'paper' or 'exact'")

    @property
    def operator_ratio(self) -> float:
        """Fraction that the operator keeps, with four decimals, so that a layer of the decoder sees r on average."""
        return min(1.0, round(self.retention_ratio / self.decoder_share * RATIO_SCALE) / RATIO_SCALE)

    @property
    def tau_segment(self) -> float:
        """The segment threshold in use: the given one, or the authors' value for this retention ratio."""
        if self.segment_threshold is not None:
            return self.segment_threshold
        return 0.65 if self.retention_ratio <= 0.1 else 0.8

    @property
    def sinks(self) -> tuple[int, ...]:
        """The sink positions in use: the given ones, or LLaVA-OneVision's on its grid."""
        if self.sink_positions is not None:
            return self.sink_positions
        return LLAVA_OV_SINKS if self.grid == LLAVA_OV_GRID else ()

    def resolved(self) -> PruneParams:
        """The same parameters with ratio, segment threshold and sinks written out, for a host that knows no rules."""
        return replace(
            self,
            retention_ratio=self.operator_ratio,
            segment_threshold=self.tau_segment,
            sink_positions=self.sinks,
            decoder_share=1.0,
        )

    def at(self, retention_ratio: float) -> PruneParams:
        """The same parameters at another retention ratio."""
        return replace(self, retention_ratio=retention_ratio)

    def on(self, grid: tuple[int, int]) -> PruneParams:
        """The same parameters on another token grid.

        Raises:
            TangoError: A sink position is outside the grid.
        """
        return replace(self, grid=grid)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ratio(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return math.isfinite(value) and abs(value * RATIO_SCALE - round(value * RATIO_SCALE)) < 1e-6


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise TangoError(f"{name} is {value!r}", f"it must be {wanted}")
