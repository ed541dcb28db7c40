"""Processes that work for this one: what they give comes back whole, large arrays without a copy."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
from multiprocessing import reduction
from pathlib import Path

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime.util.processes import Child

LARGE = 100_003  # no multiple of anything


def open_worker():
    return make


def make(name):
    """What a test asks for by its name."""
    if name == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "die halfway":
        reduction.send_handle = lambda *given: make("die")
        name = "large"
    if name == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE // 2, resource.RLIM_INFINITY))
        return None
    if name == "fail":
        raise TangoError("it failed", "try another")
    large = np.arange(LARGE, dtype=np.uint8)
    return {
        "small": np.arange(3),
        "large": large,
        "several": {
            "a": large,
            "b": [np.arange(LARGE, dtype=np.int64)[::-1], "text", None],
            "c": np.full((70, 1000), 7),
        },
        "empty": np.zeros((0, 5)),
        "text": "é" * LARGE,
    }[name]


@pytest.fixture
def child():
    child = Child(open_worker)
    yield child
    child.kill()
    assert not multiprocessing.active_children()


def asked(child, name):
    child.send(name)
    return child.receive()


def same(found, wanted):
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for name in wanted:
            same(found[name], wanted[name])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
    elif isinstance(wanted, np.ndarray):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(found, wanted)
    else:
        assert found == wanted


@pytest.mark.parametrize("name", ["small", "large", "several", "empty", "text"])
def test_a_result_is_what_the_function_gives(child, name):
    for _ in range(2):
        same(asked(child, name), make(name))


def test_large_arrays_are_apart_and_may_be_written(child):
    first, second = asked(child, "large"), asked(child, "large")
    first[:] = 0
    np.testing.assert_array_equal(second, make("large"))
    same(asked(child, "several"), make("several"))


def test_the_memory_of_an_array_ends_with_it(child):
    def mapped():
        return Path("/proc/self/maps").read_text().count("memfd:tango")

    def files():
        targets = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]  # one is the folder's own, gone
        return [target for target in targets if "memfd:tango" in target]

    held = asked(child, "several")
    part = held["a"][3:5]
    del held
    assert mapped() == 1  # a part of an array keeps it
    np.testing.assert_array_equal(part, [3, 4])
    del part
    gc.collect()
    assert mapped() == 0
    assert not files()


def test_an_error_comes_back_and_the_next_item_is_done(child):
    with pytest.raises(TangoError, match="it failed") as error:
        asked(child, "fail")
    assert error.value.hint == "try another"
    same(asked(child, "small"), make("small"))


def test_a_dead_process_is_the_end_of_its_pipe(child):
    with pytest.raises((EOFError, ConnectionError)):
        asked(child, "die")


def test_a_process_that_dies_before_its_large_arrays_are_sent(child):
    with pytest.raises(EOFError):
        asked(child, "die halfway")


def test_a_result_without_memory_is_an_error_and_the_next_item_is_done(child):
    asked(child, "limit")
    with pytest.raises(TangoError, match="cannot be handed over in memory: File too large"):
        asked(child, "large")
    np.testing.assert_array_equal(asked(child, "small"), np.arange(3))


def test_a_result_for_which_no_descriptor_is_left(child):
    asked(child, "small")
    child.send("large")
    child.pipe.poll(None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.open(os.devnull, os.O_RDONLY)  # the socket's copy takes its place, and the array's finds none
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, hard))
    os.close(spare)
    try:
        with pytest.raises(OSError, match="Too many open files"):
            child.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
