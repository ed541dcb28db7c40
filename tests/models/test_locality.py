"""The background of models/tiny/locality.py has no part of a figure."""

from pathlib import Path

import numpy as np
import pytest

from tango_calibration.data.synthetic import make_clip

TINY = Path(__file__).parents[2] / "models" / "tiny"


@pytest.mark.parametrize("seed", range(4))
def test_figures_change_no_background_pixel(monkeypatch, seed):
    monkeypatch.syspath_prepend(TINY)
    from locality import parts, tokens_near_figures

    clip, bare = (make_clip(seed, "validation", 8) for _ in range(2))
    bare.figures = ()
    drawn = (clip.render() != bare.render()).any(-1)
    near = tokens_near_figures(clip)
    f, y, x = np.nonzero(drawn)
    shows = np.zeros((8, 14, 14), bool)
    shows[f, y * 14 // 384, x * 14 // 384] = True
    assert shows.any()
    assert not (shows.ravel() & ~near).any()
    assert near.mean() < 0.5
    made = parts(near, np.random.default_rng(0))
    assert made["a tenth, of the background"].sum() == round(0.1 * near.size)
    assert not (made["a tenth, of the background"] & near).any()
