"""8-bit columns, 4-bit blocks."""

from __future__ import annotations

import numpy as np
import pytest

from tango_calibration.quantization.arithmetic import BLOCK, FP8, quantize_blocks, quantize_columns

IN = 80  # not a multiple of a block


def error(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(a)


def test_fp8_keeps_outliers_and_small_channels():
    weight = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float16) * np.array([1, 1e-3, 1e2], np.float16)
    weight[:, 0][0] = 60
    values, scales = quantize_columns(weight, FP8, np.float16)
    back = values.astype(np.float32) * scales.astype(np.float32)
    assert [error(weight[1:, j], back[1:, j]) < 0.04 for j in range(3)] == [True] * 3
    assert np.isfinite(back).all()
    assert (scales >= np.finfo(np.float16).tiny).all()


def test_columns_are_restored_within_half_a_step():
    weight = np.random.default_rng(0).normal(size=(30, 7)).astype(np.float16)
    weight[:, 2] = 0
    values, scales = quantize_columns(weight)
    assert np.abs(values * scales - weight).max() <= scales.max() / 2 + 1e-6
    assert (np.abs(values).max(0) == [127, 127, 0, 127, 127, 127, 127]).all()
    assert (scales > 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_restored(bits):
    weight = np.random.default_rng(0).normal(size=(IN, 7)).astype(np.float16)
    weight[:, 2] = 0
    packed, scales = quantize_blocks(weight, bits)
    assert packed.shape == (7, 3, BLOCK * bits // 8)
    assert scales.shape == (7, 3)
    values = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(7, 3, BLOCK)
    back = ((values.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]).reshape(7, -1).T
    assert (back[IN:] == 0).all()
    assert (back[:, 2] == 0).all()
    assert error(weight, back[:IN]) < (0.1 if bits == 4 else 0.01)


def test_channels_of_larger_activations_have_smaller_errors():
    weight = np.random.default_rng(0).normal(size=(BLOCK, 200)).astype(np.float32)
    mean_squares = np.ones(BLOCK)
    mean_squares[5] = 1e4

    def error_of_row(packed, scales):
        values = np.stack([packed & 15, packed >> 4], -1).reshape(200, 1, BLOCK)
        back = ((values.astype(np.float32) - 8) * scales[..., None]).reshape(200, -1).T
        return ((back[5] - weight[5]) ** 2).mean()

    assert error_of_row(*quantize_blocks(weight, 4, mean_squares)) < 0.5 * error_of_row(*quantize_blocks(weight, 4))
