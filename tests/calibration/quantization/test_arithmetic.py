"""8-bit columns, 4-bit blocks."""

from __future__ import annotations

import numpy as np
import pytest

from tango_calibration.quantization.arithmetic import (
    BLOCK,
    activation_aware_scaling,
    fp8_scale,
    quantize_blocks,
    quantize_columns,
    quantize_to_fp8,
)

IN = 80  # not a multiple of a block


def error(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(a)


def test_fp8_keeps_outliers_and_small_columns_with_one_scale():
    weight = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float16) * np.array([1, 0.1, 50], np.float16)
    weight[:, 0][0] = 60
    scale = fp8_scale(weight, np.float16)
    values = quantize_to_fp8(weight, scale)
    back = values.astype(np.float32).T * scale.astype(np.float32)
    assert (values.shape, scale.shape, scale.dtype) == ((3, 300), (), np.float16)
    assert [error(weight[1:, j], back[1:, j]) < 0.04 for j in range(3)] == [True] * 3
    assert np.isfinite(back).all()


@pytest.mark.parametrize("weight", [np.zeros((4, 3), np.float16), np.full((4, 3), 65504, np.float16)])
def test_fp8_holds_zeros_and_the_largest(weight):
    scale = fp8_scale(weight, np.float16)
    back = quantize_to_fp8(weight, scale).astype(np.float32).T * scale.astype(np.float32)
    np.testing.assert_allclose(back, weight, rtol=1e-3)


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


# AWQ's scaling


def output_error(weight, activations, s):
    """Of the product with a weight whose rows are scaled, and whose blocks weigh their errors by the activations."""
    mean_squares = (activations**2).mean(0)
    packed, scales = quantize_blocks(weight * s[:, None], 4, mean_squares / s**2)
    values = np.stack([packed & 15, packed >> 4], -1).reshape(*scales.shape, BLOCK).astype(np.float32)
    back = ((values - 8) * scales[..., None]).reshape(len(scales), -1).T[: len(weight)]
    return error(activations @ weight, (activations / s) @ back)


def test_channels_of_loud_activations_are_scaled_up():
    rng = np.random.default_rng(0)
    weight, activations = rng.normal(size=(IN, 300)).astype(np.float32), rng.normal(size=(500, IN)).astype(np.float32)
    loud = [3, 40, 77]
    activations[:, loud] *= 30
    s = activation_aware_scaling([weight[:, :100], weight[:, 100:]], (activations**2).mean(0))
    assert s[loud].min() > 2 * np.delete(s, loud).max()
    assert s.max() * s.min() == pytest.approx(1, rel=1e-3)
    assert output_error(weight, activations, s) < 0.8 * output_error(weight, activations, np.ones(IN))


def test_channels_that_are_equally_loud_stay():
    weight = np.random.default_rng(0).normal(size=(IN, 50)).astype(np.float16)
    assert (activation_aware_scaling([weight], np.full(IN, 4.0)) == 1).all()


def test_a_channel_that_is_never_used_has_a_finite_factor():
    weight, mean_squares = np.random.default_rng(0).normal(size=(IN, 50)), np.ones(IN)
    mean_squares[7] = 0
    s = activation_aware_scaling([weight], mean_squares)
    assert np.isfinite(s).all()
    assert (s > 0).all()
