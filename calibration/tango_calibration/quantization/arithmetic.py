"""Arithmetic of quantization: 8-bit grids with scales, 4-bit blocks, smoothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes  # noqa: F401  # gives NumPy float8_e4m3fn
import numpy as np
from numpy.typing import NDArray

from tango_calibration.quantization.ranges import Array

#: Default number of weights of a column that share a scale.
BLOCK = 32

#: Scales tried for a block of 4-bit weights, relative to the scale that its largest weight needs.
_TRIED_SCALES = (1.0, 1.14, 1.07, 0.95, 0.9, 0.85, 0.8)

#: Columns of a weight that the search for AWQ's scaling uses.
_SEARCH_COLUMNS = 256

#: The smallest normal number of fp16: no scale may be zero.
_MIN_SCALE = 2.0**-14

#: Weights that a thread converts to fp32 at a time: few enough for its cache, and so that no fp32 copy of a whole
#: vocabulary head is in memory.
_PART_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class Grid:
    """The values that 8 bits represent, before scaling.

    Attributes:
        name: Suffix of the tensors that hold them.
        type: Their type in the graph.
        max: The largest value; the smallest used is its negative.
    """

    name: str
    type: Literal["int8", "float8_e4m3fn"]
    max: float

    @property
    def dtype(self) -> Any:
        """Their type in NumPy."""
        return np.dtype(self.type)


INT8 = Grid("int8", "int8", 127)
FP8 = Grid("fp8", "float8_e4m3fn", 448)


def scales(amax: Array, grid: Grid, dtype: Any) -> Array:
    """Scales that map the largest value of a grid to the largest magnitude: max|x| / 127 or 448.

    Args:
        amax: The largest magnitudes, of any shape.
        grid: The 8-bit values.
        dtype: Type of the scales; none is below its smallest normal number.

    Returns:
        Scales of the shape of ``amax``.
    """
    steps: Array = np.maximum(np.asarray(amax, np.float32) / grid.max, np.finfo(dtype).tiny)
    return steps.astype(dtype)


def quantize_columns(weight: Array, dtype: Any = np.float32) -> tuple[Array, Array]:
    """Quantizes a weight to INT8, symmetrically, with a scale for each column.

    Args:
        weight: [in, out].
        dtype: Type of the scales.

    Returns:
        (values [in, out], scales [out], all positive).
    """
    values = np.empty(weight.shape, INT8.dtype)
    steps = np.empty(weight.shape[1], dtype)

    def quantize(part: slice) -> None:
        wide = weight[:, part].astype(np.float32)
        steps[part] = scales(np.abs(wide).max(0), INT8, dtype)
        values[:, part] = np.rint(wide / steps[part].astype(np.float32))

    _in_threads(quantize, *weight.shape[::-1])
    return values, steps


def row_amax(weight: Array) -> NDArray[np.float32]:
    """Largest magnitude of each row of a weight [in, out]."""
    found = np.empty(len(weight), np.float32)

    def measure(part: slice) -> None:
        found[part] = np.abs(weight[part].astype(np.float32)).max(1)  # NumPy is slow with fp16

    _in_threads(measure, *weight.shape)
    return found


def scale_rows(weight: Array, factors: Array) -> Array:
    """A weight [in, out] with its rows multiplied by factors [in], in the weight's type."""
    scaled, wide = np.empty_like(weight), factors.astype(weight.dtype).astype(np.float32)[:, None]

    def scale(part: slice) -> None:
        scaled[part] = weight[part].astype(np.float32) * wide[part]

    _in_threads(scale, *weight.shape)
    return scaled


def fp8_scale(weight: Array, dtype: Any = np.float32) -> Array:
    """The scale [] with which FP8 holds all of a weight, in a type."""
    return np.asarray(scales(row_amax(weight).max(), FP8, dtype))


def quantize_to_fp8(weight: Array, scale: Array) -> Array:
    """Quantizes a weight [in, out] to FP8 with one scale []; returns it transposed, [out, in]."""
    values = np.empty(weight.shape[::-1], FP8.dtype)

    def quantize(part: slice) -> None:
        values[part] = weight[:, part].T.astype(np.float32) / scale.astype(np.float32)  # the cast rounds

    _in_threads(quantize, *weight.shape[::-1])
    return values


def quantize_blocks(
    weight: Array, bits: int, mean_squares: Array | None = None, block: int = BLOCK
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantizes a weight to 4 or 8 bits in blocks along a column, as MatMulNBits takes them.

    The weights of a block are (q − 2^(bits−1)) · scale with an unsigned q, so they reach one step further down than up.
    The sign of the scale gives the largest weight the longer side. With 4 bits, the scale with the least squared error
    of a few candidates is taken, where the mean square of its input channel weights the error of each row.

    Args:
        weight: [in, out].
        bits: 4 or 8.
        mean_squares: Mean square of each input channel [in]; equal by default.
        block: Weights of a block.

    Returns:
        (values [out, blocks, block · bits / 8], with two 4-bit values in a byte, the first in the low half;
        scales [out, blocks]). Rows that pad the last block are zero.
    """
    K, N = weight.shape
    count = -(-K // block)
    importance = _in_blocks(np.ones(K) if mean_squares is None else mean_squares, block)
    packed = np.empty((N, count, block * bits // 8), np.uint8)
    scales = np.empty((N, count), np.float32)

    def quantize(part: slice) -> None:
        values, scales[part], _ = _fit_blocks(_in_blocks(weight[:, part].T, block), bits, importance)
        packed[part] = values if bits == 8 else values[..., ::2] | (values[..., 1::2] << 4)

    _in_threads(quantize, N, K)
    return packed, scales


def _in_blocks(rows: Array, block: int) -> NDArray[np.float32]:
    """[..., in] → [..., blocks, block], the last one filled up with zeros."""
    K = rows.shape[-1]
    wide = np.zeros((*rows.shape[:-1], -(-K // block) * block), np.float32)
    wide[..., :K] = rows
    return wide.reshape(*rows.shape[:-1], -1, block)


def _fit_blocks(
    wide: Array, bits: int, importance: Array
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Blocks [n, blocks, block] fp32 → unsigned values and scales, the best of those tried, and their errors."""
    half = 1 << (bits - 1)
    place = np.abs(wide).argmax(-1)[..., None]
    largest = np.take_along_axis(wide, place, -1)[..., 0]
    full = np.where(largest != 0, largest, 1) / -half
    least = np.full(full.shape, np.inf, np.float32)
    best, scales = np.empty_like(wide), np.empty(full.shape, np.float32)
    for factor in _TRIED_SCALES if bits == 4 else (1.0,):
        # The scale is stored in fp16, so the values are fitted to the rounded scale.
        scale = (full * factor).astype(np.float16).astype(np.float32)
        scale = np.where(scale != 0, scale, np.float32(_MIN_SCALE))
        steps = wide / scale[..., None]
        np.clip(np.rint(steps, steps), -half, half - 1, steps)
        error = steps * scale[..., None]
        error -= wide
        error *= error
        error *= importance
        total = error.sum(-1)
        better = total < least
        np.copyto(best, steps, where=better[..., None])
        np.copyto(least, total, where=better)
        np.copyto(scales, scale, where=better)
    best += half
    return best.astype(np.uint8), scales, least


def _in_threads(work: Callable[[slice], None], length: int, weights: int) -> None:
    """Does the work for all of ``length`` rows or columns of so many weights, in a thread per core.

    NumPy computes without the GIL.
    """
    step = max(_PART_WEIGHTS // max(weights, 1), 1)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in threads.map(work, (slice(begin, min(begin + step, length)) for begin in range(0, length, step))):
            pass


def activation_aware_scaling(weights: Sequence[Array], mean_squares: Array, block: int = BLOCK) -> NDArray[np.float32]:
    """AWQ's scaling of the channels of an input, Lin et al. 2024 (arXiv:2306.00978), section 3.2.

    s = a^α, where a is a channel's root mean square, and α the one of 0, 0.1 … 1 with the least error of 4-bit weights.
    The error is that of the layers' outputs for uncorrelated inputs, measured on some of the columns.

    Args:
        weights: [in, out] of each layer that takes the input.
        mean_squares: Mean square of each channel of the input [in].
        block: Weights of a block.

    Returns:
        s [in], by which channels are divided and rows of the weights multiplied. All 1 if no scaling reduces the error.
    """
    columns = [weight[:, :: max(weight.shape[1] // _SEARCH_COLUMNS, 1)].astype(np.float32) for weight in weights]
    magnitudes = np.sqrt(np.maximum(mean_squares.astype(np.float64), np.finfo(np.float32).tiny))

    def scaling(alpha: float) -> NDArray[np.float32]:
        s = magnitudes**alpha
        return np.asarray(np.clip(s / np.sqrt(s.max() * s.min()), 2.0**-8, 2.0**8), np.float32)

    def loss(s: Array) -> float:
        importance = _in_blocks(mean_squares / s**2, block)
        errors = (_fit_blocks(_in_blocks((w * s[:, None]).T, block), 4, importance)[2] for w in columns)
        return float(sum(error.sum(dtype=np.float64) for error in errors))

    tried = [scaling(alpha / 10) for alpha in range(11)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        losses = list(threads.map(loss, tried))
    return tried[int(np.argmin(losses))]


def smoothing(channel_amax: Array, row_amax: Array) -> NDArray[np.float32]:
    """SmoothQuant's migration of outliers from activations to weights, Xiao et al. 2023 (arXiv:2211.10438), α = 0.5.

    s = √(max|X_j| / max|W_j|), rounded to a power of two: then scaling is exact, and a layer that stays in fp16
    computes what it did before. s is limited to 2^±8, so that scaled values fit into fp16.

    Args:
        channel_amax: max|X_j| of each channel [in].
        row_amax: max|W_j| of each row over all layers that take X [in].

    Returns:
        s [in].
    """
    known = (channel_amax > 0) & (row_amax > 0)
    exponents = np.zeros(len(channel_amax))
    exponents[known] = np.log2(channel_amax[known] / row_amax[known]) / 2
    exponents -= np.rint(np.median(exponents))  # a common factor changes nothing
    return np.asarray(np.exp2(np.clip(np.rint(exponents), -8, 8)), np.float32)
