"""The soak's program, with few requests: none fails, and what the server holds does not grow without end."""

from __future__ import annotations

import pytest

from benchmarks.soak_server import soak, stream
from tests.runtime.server.serving import running  # noqa: F401 skips where a package of the server is missing


@pytest.mark.slow
def test_many_requests_of_all_kinds(tiny_bundle, clip):
    found = soak(tiny_bundle, clip, "ort-cpu", 400)
    assert found["failures"] == []
    assert sum(found["outcomes"].values()) == 400
    assert len(found["outcomes"]) == 6
    warm, last = found["usage"][100], found["usage"][400]
    assert last["files"] <= warm["files"] + 8
    assert last["threads"] <= warm["threads"] + 8
    assert last["rss_mb"] < warm["rss_mb"] + 60


@pytest.mark.slow
def test_hours_of_a_stream(tiny_bundle):
    found = stream(tiny_bundle, "ort-cpu", 0.5)
    assert found["answers"] > 340
    assert found["usage"][-1]["rss_mb"] < found["usage"][0]["rss_mb"] + 60
