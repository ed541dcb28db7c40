from __future__ import annotations

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime.pipeline.sampling import Sampler

# Probabilities 1/10, 4/10, 2/10, 3/10 of tokens 0 to 3.
LOGITS = np.log(np.array([1, 4, 2, 3], np.float32))


def shares(sampler, logits=LOGITS, draws=10_000):
    return np.bincount([sampler(logits) for _ in range(draws)], minlength=len(logits)) / draws


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest():
    assert Sampler()(LOGITS) == 1
    assert Sampler()(np.array([0, 7, 7, 3], np.float32)) == 1
    assert Sampler()(np.array([-np.inf, -np.inf, -3], np.float32)) == 2


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [1 / 10, 4 / 10, 2 / 10, 3 / 10]),
        (1.0, 0.65, [0, 4 / 7, 0, 3 / 7]),  # 0.4 falls short of 0.65, 0.4 + 0.3 reaches it
        (1.0, 0.75, [0, 4 / 9, 2 / 9, 3 / 9]),
        (0.5, 1.0, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # half the temperature squares the probabilities
        (0.5, 0.8, [0, 16 / 25, 0, 9 / 25]),  # 25/30 reaches 0.8, where at temperature 1 it takes three
    ],
)
def test_the_distribution_is_the_one_worked_by_hand(temperature, top_p, expected):
    measured = shares(Sampler(temperature, top_p, seed=1))
    np.testing.assert_allclose(measured, expected, atol=0.02)  # four standard deviations of 10 000 draws
    np.testing.assert_array_equal(measured > 0, np.array(expected) > 0)


def test_top_p_keeps_at_least_one_token_and_of_equals_the_lowest():
    assert shares(Sampler(1.0, 1e-9, seed=1), draws=100).tolist() == [0, 1, 0, 0]
    assert shares(Sampler(1.0, 0.5, seed=1), np.zeros(4, np.float32), 1000)[2:].tolist() == [0, 0]


def test_the_same_seed_gives_the_same_tokens():
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    first, second, other = (Sampler(1.0, 0.9, seed) for seed in (5, 5, 6))
    ids = [first(logits) for _ in range(50)]
    assert ids == [second(logits) for _ in range(50)]
    assert ids != [other(logits) for _ in range(50)]


def test_extreme_temperatures_and_barred_tokens_stay_finite():
    logits = np.array([1e4, -1e4, -np.inf, 0], np.float32)
    with np.errstate(all="raise", under="ignore"):
        assert Sampler(1e-300, 1.0, seed=0)(logits) == 0
        assert 2 not in {Sampler(1e30, 1.0, seed=i)(logits) for i in range(200)}


@pytest.mark.parametrize("values", [{"temperature": -1}, {"temperature": np.nan}, {"temperature": np.inf},
                                    {"top_p": 0}, {"top_p": 1.1}, {"top_p": np.nan}, {"seed": -1}])  # fmt: skip
def test_bad_parameters_are_refused_by_name(values):
    with pytest.raises(TangoError, match=next(iter(values))):
        Sampler(**values)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_are_refused(temperature):
    sampler = Sampler(temperature)
    for bad in (np.nan, np.inf):
        with pytest.raises(TangoError, match="token 2 is"):
            sampler(np.array([1, 2, bad, 4], np.float32))
    with pytest.raises(TangoError, match="-inf"):
        sampler(np.full(4, -np.inf, np.float32))
    with pytest.raises(TangoError, match="shape"):
        sampler(np.zeros((1, 4), np.float32))
