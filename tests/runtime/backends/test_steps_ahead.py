"""Decode steps that begin before they are asked for: what memory holds afterwards, and that no answer differs.

CUDA is emulated on the host, where work is done when it is enqueued: a step that ran ahead has written its row and its
logits before anything else happens.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.backends.cuda.device import Stream
from tango_runtime.backends.cuda.ort_fused import FusedOrtRunner
from tests.fakes.cuda import HostDecoder, array, install
from tests.fakes.device_graphs import with_device_graphs

QUESTION = "What happens in the video?"


@pytest.fixture(scope="module")
def folder(responsive_checkpoint, tmp_path_factory):
    _, bundle = responsive_checkpoint(dtype="fp32")
    return with_device_graphs(bundle, tmp_path_factory.mktemp("ahead") / "fp32", "fp32")


@pytest.fixture
def host(monkeypatch):
    return install(monkeypatch)


@pytest.fixture
def steps(host, monkeypatch):
    """Positions of the steps so far: those that were asked for, and those that ran ahead."""
    asked, ahead, enqueue, enqueue_next = [], [], HostDecoder.enqueue, HostDecoder.enqueue_next

    def noted(self, embedding, position, *given, **memory):
        asked.append(position)
        enqueue(self, embedding, position, *given, **memory)

    def noted_next(self, words, found, position, rotation, **memory):
        token = enqueue_next(self, words, found, position, rotation, **memory)
        if token is not None:
            asked.remove(position)
            ahead.append(position)
        return token

    monkeypatch.setattr(HostDecoder, "enqueue", noted)
    monkeypatch.setattr(HostDecoder, "enqueue_next", noted_next)
    return asked, ahead


@pytest.fixture
def backend(folder, steps):
    """With device graphs, and no stop tokens."""
    return opened(folder, stop=())


def opened(folder, stop):
    import onnxruntime

    bundle = VideoLLM(folder, "ort-cpu").bundle
    prompt = replace(bundle.manifest.prompt, stop=stop)
    bundle, stream = replace(bundle, manifest=replace(bundle.manifest, prompt=prompt)), Stream()
    return CudaBackend(bundle, FusedOrtRunner(onnxruntime, bundle, stream, ("CPUExecutionProvider", "cpu")), stream)


@pytest.fixture
def plain(folder):
    return VideoLLM(folder, "ort-cpu")._backend


def begun(backend, prompt=range(20, 29), positions=40):
    """A sequence, and the first token after it."""
    cache = backend.new_cache(positions)
    return cache, argmax(backend.extend(cache, [backend.embed(np.array(prompt))]))


def argmax(logits):
    return logits.argmax()[0] if not isinstance(logits, np.ndarray) else int(logits.argmax())


def greedy(backend, cache, token, count):
    found = [token]
    for _ in range(count):
        found.append(argmax(backend.decode(cache, found[-1])))
    return found


def rows_of(backend, cache):
    """All keys and values."""
    backend._stream.synchronize()
    return np.stack([array(memory).copy() for memory in cache.held(cache.capacity).values()])


def test_all_steps_but_the_first_run_ahead_and_none_after_the_last(backend, plain, steps):
    cache, token = begun(backend, positions=9 + 6)
    assert greedy(backend, cache, token, 5) == greedy(plain, *begun(plain), 5)
    assert steps == ([9], [10, 11, 12, 13])
    assert cache.length == 14


def test_an_answer_of_one_token_or_two_begins_no_step_too_many(backend, steps):
    begun(backend, positions=9 + 1)
    assert steps == ([], [])
    greedy(backend, *begun(backend, positions=9 + 2), 1)
    assert steps == ([9], [])


def test_room_that_is_asked_for_later_counts(backend, steps):
    cache, token = begun(backend, positions=9)
    greedy(backend, cache, token, 2)
    assert steps == ([9, 10], [])
    backend.reserve(cache, 16)
    greedy(backend, cache, token, 2)
    assert steps == ([9, 10, 11], [12, 13])
    backend.reserve(cache, 13)  # less than there is: the next answer is short
    greedy(backend, cache, token, 1)
    assert steps == ([9, 10, 11, 13], [12, 13])


def test_no_step_follows_a_stop_token(folder, plain, steps):
    said = greedy(plain, *begun(plain), 8)
    stop = next(token for i, token in enumerate(said) if i > 1 and token not in said[:i])
    backend, count = opened(folder, (stop,)), said.index(stop)
    assert greedy(backend, *begun(backend), count) == said[: count + 1]
    assert steps == ([9], list(range(10, 9 + count)))


def test_a_token_that_is_not_the_one_found_has_its_own_step(backend, plain, steps):
    heard = []
    for each in (backend, plain):
        cache, token = begun(each)
        tokens = greedy(each, cache, token, 2)
        other = 7 if tokens[-1] != 7 else 8
        heard.append([*tokens, np.array(each.decode(cache, other)), *greedy(each, cache, 5, 2)])
    np.testing.assert_allclose(heard[0][3], heard[1][3], atol=1e-4)
    assert heard[0][:3] + heard[0][4:] == heard[1][:3] + heard[1][4:]
    assert steps[0][:2] == [9, 11]
    assert steps[1][:2] == [10, 11]


def test_logits_stay_while_the_next_step_runs(backend, plain):
    (cache, token), (other, _) = begun(backend), begun(plain)
    for _ in range(4):
        logits, wanted = backend.decode(cache, token), np.array(plain.decode(other, token))
        token, value = logits.argmax()
        assert logits.argmax() == (token, value)  # found once
        np.testing.assert_allclose(np.array(logits), wanted, atol=1e-4)
        assert token == wanted.argmax()


def test_logits_that_are_read_whole_begin_nothing(backend, plain, steps):
    (cache, token), (other, _) = begun(backend), begun(plain)
    for each in (token, 5, 9):
        np.testing.assert_allclose(np.array(backend.decode(cache, each)), plain.decode(other, each), atol=1e-4)
    assert steps == ([9, 10, 11], [])


def test_a_sequence_that_was_rewound_to_the_same_length_is_another(backend, plain):
    heard = []
    for each in (backend, plain):
        cache, token = begun(each)
        tokens = greedy(each, cache, token, 3)
        each.rewind(cache, cache.length - 2)
        each.extend(cache, [each.embed(np.array([3, 4]))])
        heard.append(np.array(each.decode(cache, tokens[-1])))
    np.testing.assert_allclose(*heard, atol=1e-4)


def test_a_row_that_was_written_for_nothing_is_cleared(backend):
    cache, token = begun(backend)
    before = rows_of(backend, cache)
    greedy(backend, cache, token, 3)
    assert (rows_of(backend, cache)[:, :, 12] != before[:, :, 12]).any()
    backend.rewind(cache, 12)
    assert not rows_of(backend, cache)[:, :, 12:].any()
    backend.rewind(cache, 9)
    np.testing.assert_array_equal(rows_of(backend, cache), before)


def test_another_sequence_between_two_tokens_changes_nothing(backend, plain):
    heard = []
    for each in (backend, plain):
        first, token = begun(each)
        second, other = begun(each, range(40, 60))
        tokens, others = greedy(each, first, token, 2), greedy(each, second, other, 2)
        for _ in range(3):
            tokens += greedy(each, first, tokens[-1], 1)[1:]
            others += greedy(each, second, others[-1], 2)[1:]
        third, _ = begun(each, range(70, 80))
        heard.append((tokens, others, greedy(each, first, tokens[-1], 2)))
        for cache in (first, second, third):
            cache.release()
    assert heard[0] == heard[1]


def test_a_fork_a_larger_cache_and_a_released_one_forget_the_step(backend, plain, host, steps):
    backend._graphs.capacity = None  # caches that grow
    wanted = greedy(plain, *begun(plain), 8)
    cache, token = begun(backend, positions=250)
    assert greedy(backend, cache, token, 4) == wanted[:5]
    forked = backend.fork(cache, 12, 250)
    assert greedy(backend, forked, wanted[3], 2) == wanted[3:6]
    assert greedy(backend, cache, wanted[4], 1) == wanted[4:6]
    backend.reserve(cache, 400)
    assert greedy(backend, cache, wanted[5], 3) == wanted[5:9]
    logits = backend.decode(cache, wanted[-1])
    for each in (cache, forked):
        each.release()
    begun_so_far = len(steps[1])
    logits.argmax()  # too late for a step: its memory may have gone
    assert len(steps[1]) == begun_so_far
    assert greedy(backend, *begun(backend), 8) == wanted


def test_a_step_that_was_for_nothing_keeps_no_memory(folder, host):
    backend = opened(folder, ())
    greedy(backend, *begun(backend), 3)
    del backend
    gc.collect()
    assert not host.blocks


def test_a_step_that_fails_is_told_and_leaves_the_sequence(backend, monkeypatch):
    cache, token = begun(backend)
    tokens = greedy(backend, cache, token, 2)
    logits = backend.decode(cache, tokens[-1])

    def failing(*given, **memory):
        raise TangoError("a decode step failed", "")

    with monkeypatch.context() as patch:
        patch.setattr(cache.step, "after", failing)
        with pytest.raises(TangoError, match="a decode step failed"):
            backend.decode(cache, logits.argmax()[0])
    assert cache.length == 12
    token = int(np.array(logits).argmax())
    backend.decode(cache, token)


@pytest.mark.parametrize("taken", [1, 3, 8])
def test_a_stream_that_is_closed_midway_leaves_the_session_as_it_was(folder, host, colors, taken):
    llm = VideoLLM(folder, "ort-cpu")
    wanted = [llm.generate(colors, text, max_new_tokens=8).ids for text in (QUESTION, "Who?")]
    llm._backend = opened(folder, llm.bundle.manifest.prompt.stop)
    with llm.session(colors) as session:
        stream = session.stream(QUESTION, max_new_tokens=8)
        for _ in range(taken):
            next(stream, None)
        stream.close()
        assert session.ask("Who?", max_new_tokens=8).ids == wanted[1]
        assert session.ask(QUESTION, max_new_tokens=8).ids == wanted[0]
