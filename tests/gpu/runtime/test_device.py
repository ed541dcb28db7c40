"""DeviceArray, copies, graphs and the greatest logit on the GPU, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime.backends.cuda.device import Buffer, Event, HostPool, Pool, Stream, rows
from tango_runtime.backends.cuda.kv_cache import KVCache
from tango_runtime.backends.cuda.logits import DeviceLogits, Greatest


@pytest.fixture
def stream():
    return Stream()


@pytest.fixture
def pool():
    return Pool()


def test_what_goes_up_comes_down(stream, pool):
    array = np.random.default_rng(0).standard_normal((5, 7, 3)).astype(np.float16)
    memory = pool.take("a", array.shape, array.dtype)
    assert not stream.download(memory).any()
    stream.upload(array, memory)
    np.testing.assert_array_equal(stream.download(memory), array)
    np.testing.assert_array_equal(stream.download(rows(memory, 2, 4)), array[2:4])
    assert vars(stream.traffic) == {"uploads": 1, "uploaded": 210, "downloads": 3, "downloaded": 210 + 210 + 84}


def test_page_locked_memory_is_not_used_again_while_it_is_read(stream, pool):
    host_pool, memories = HostPool(), [pool.take(name, (1 << 26,), np.uint8) for name in "abc"]
    for value, memory in enumerate(memories):
        array = host_pool.take(memory.shape, np.uint8)
        array[:] = value
        stream.upload(array, memory)
        del array
    for value, memory in enumerate(memories):
        assert (stream.download(memory) == value).all()


@pytest.mark.parametrize(("heads", "width", "capacity"), [(1, 4, 16), (2, 64, 100), (3, 16, 33), (4, 128, 1024)])
def test_rows_are_appended_in_their_places(stream, pool, heads, width, capacity):
    from tango_runtime.bundle import TensorSpec

    layers, rng = 6, np.random.default_rng(1)
    cached, new = (
        [TensorSpec(f"{name}{i}", "float16", (heads, axis, width)) for i in range(layers)]
        for name, axis in (("past", "P"), ("new", "N"))
    )
    cache = KVCache(cached, new, capacity, in_place=False, stream=stream, released=lambda cache: None)
    wanted, length = np.zeros((layers, heads, capacity, width), np.float16), 0
    for tokens in (7, 1, 5, 1, 2):
        room = cache.room(tokens, pool)
        assert all(memory.address % 256 == 0 for memory in (*room.values(), *cache.held(1).values()))
        values = rng.standard_normal((layers, heads, tokens, width)).astype(np.float16)
        for memory, value in zip(room.values(), values, strict=True):
            stream.upload(value, memory)
        cache.fill(room, tokens)
        wanted[:, :, length : length + tokens] = values
        length += tokens
        found = np.stack([stream.download(memory) for memory in cache.held(length).values()])
        np.testing.assert_array_equal(found, wanted)
    cache.rewind(9)
    wanted[:, :, 9:] = 0
    found = np.stack([stream.download(memory) for memory in cache.held(length).values()])
    np.testing.assert_array_equal(found, wanted)
    cache.grow(2 * capacity)
    found = np.stack([stream.download(memory) for memory in cache.held(length).values()])
    np.testing.assert_array_equal(found, np.concatenate((wanted, np.zeros_like(wanted)), 2))


def test_a_graph_does_again_what_was_recorded(stream, pool):
    source, to = pool.take("a", (1000,), np.float32), pool.take("b", (1000,), np.float32)
    graph = stream.capture(lambda: stream.copy(source, to))
    for seed in range(3):
        array = np.random.default_rng(seed).standard_normal(1000).astype(np.float32)
        stream.upload(array, source)
        graph.launch()
        np.testing.assert_array_equal(stream.download(to), array)


@pytest.mark.parametrize("size", [1, 31, 1024, 1025, 151_646])
def test_the_greatest_is_numpys(stream, pool, size):
    row, rng = pool.take("logits", (size,), np.float32), np.random.default_rng(size)
    logits = DeviceLogits(row, Greatest(stream), stream)
    edges = [np.zeros, lambda n: np.full(n, -np.inf), lambda n: np.full(n, -0.0), lambda n: -np.arange(n)]
    cases = [make(size).astype(np.float32) for make in edges]
    cases += [rng.standard_normal(size).astype(np.float32) for _ in range(4)]
    cases += [rng.integers(-3, 3, size).astype(np.float32) for _ in range(4)]
    for spoilt in (np.nan, -np.nan, np.inf):
        cases.append(rng.standard_normal(size).astype(np.float32))
        cases[-1][rng.integers(size, size=3)] = spoilt
    for case in cases:
        stream.upload(case, row)
        index, value = logits.argmax()
        assert index == np.argmax(case)
        np.testing.assert_array_equal(np.float32(value), case[index])
        np.testing.assert_array_equal(np.asarray(logits), case)


def test_more_memory_than_there_is_is_refused_and_nothing_is_lost(stream, pool):
    for _ in range(3):
        with pytest.raises(TangoError, match=r"the GPU has .* MB left, .* are needed"):
            Buffer(1 << 50)
    assert not stream.download(pool.take("a", (4,), np.int32)).any()


def test_events_tell_time(stream, pool):
    big = pool.take("a", (1 << 26,), np.uint8)
    begin = Event(stream)
    for _ in range(10):
        stream.clear(big)
    assert Event(stream).elapsed_ms(begin) > 0
