"""Clips are observed in as many workers as there are, with the same result, and never twice."""

from __future__ import annotations

import numpy as np
import pytest

from tango_calibration.quantization import observe
from tango_calibration.quantization.cache import CAPTURE, ObservationCache
from tango_calibration.quantization.clips import read_clips
from tango_calibration.quantization.observe import Observer
from tango_runtime.bundle import Bundle
from tests.fakes.ray_cluster import Cluster


@pytest.fixture(scope="module")
def videos():
    return read_clips("synthetic", 4, 8)


@pytest.fixture(scope="module")
def observed(bundle, videos, tmp_path_factory):
    """``observed(**workers)``: captures and statistics, by a cache of its own; and the cache's folder."""

    def call(**workers):
        found = Bundle.load(bundle())
        cache = ObservationCache(tmp_path_factory.mktemp("observed"), found, 3)
        observer = Observer(found, cache, 3, **workers)
        captures = observer.captures(videos)
        return captures, observer.channel_stats("decoder", videos, captures), cache.folder

    return call


@pytest.fixture(scope="module")
def here(observed):
    return observed()


def check(found, here):
    for one, other in zip(found[0], here[0], strict=True):
        np.testing.assert_array_equal(one.indices, other.indices)
        np.testing.assert_allclose(one.decoder_input.prompt, other.decoder_input.prompt, rtol=1e-3, atol=1e-3)
    assert found[1].rows == here[1].rows
    for one, other in zip(found[1].amax, here[1].amax, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-3)


def test_a_cluster_observes_the_same(observed, here, monkeypatch):
    cluster = Cluster(a={"CPU": 2.0}, b={"CPU": 2.0})
    cluster.install(monkeypatch)
    check(observed(ray="local"), here)
    assert len(cluster.actors) == 4  # for captures, and for activations


@pytest.mark.slow  # two processes that load ONNX Runtime, twice
def test_processes_observe_the_same(observed, here):
    check(observed(jobs=2), here)


@pytest.mark.slow
def test_a_ray_cluster_observes_the_same(observed, here, ray_cluster):
    check(observed(ray=ray_cluster.address), here)


def test_what_is_there_is_not_observed_again(bundle, videos, here, monkeypatch):
    *_, folder = here
    some = sorted(folder.glob("*.npz"))
    assert len(some) == 2 * len(videos)
    found = Bundle.load(bundle())
    observer = Observer(found, ObservationCache(folder, found, 3), 3)
    seen, capture = [], observe.capture
    monkeypatch.setattr(observe, "capture", lambda *given: (seen.append(given[3]), capture(*given))[1])
    observer.captures(videos)
    assert not seen
    keyed = ObservationCache(folder, found, 3).key(videos[2], CAPTURE)
    (folder / f"{keyed}.npz").unlink()
    observer.captures(videos)
    assert seen == [videos[2]]
    monkeypatch.setattr(observe, "map_in_parallel", None)  # no worker is opened where nothing is missing
    observer.captures(videos)
