"""Inner pruning: a decoder in two graphs that drops tokens between them, against one in NumPy that does."""

from __future__ import annotations

from itertools import zip_longest
from types import SimpleNamespace

import numpy as np
import pytest

from tango_plugins.thinning import Thinning
from tango_runtime import VideoLLM
from tango_runtime.backends import ort_cpu_thinning
from tango_runtime.backends.registry import select
from tests.fakes.qwen2 import Qwen2
from tests.plugins import naive_thinning

LENGTH = 16
QUESTIONS = ["What happens in the video?", "Who?", "What happens after that?"]
#: The layer, the share of the video's rows that stay, layers.
INNER = [(2, 0.5, 4), (1, 0.3, 3)]


@pytest.fixture(scope="module", params=INNER, ids=["half from 2 of 4 on", "a third from 1 of 3 on"])
def model(request, responsive_checkpoint):
    layer, ratio, layers = request.param
    folder, bundle = responsive_checkpoint("llava-video", image=126, layers=layers, inner=(layer, ratio))
    return SimpleNamespace(llm=VideoLLM(bundle, "ort-cpu"), decoder=Qwen2(folder), layer=layer, ratio=ratio)


@pytest.fixture
def backend(model):
    return model.llm._backend


def dropping(model, begin, rows):
    def drop(layer, x, share):
        if layer != model.layer:
            return x, slice(None)
        return naive_thinning.thin(x, share, begin, rows, round(rows * model.ratio))

    return drop


def greedy(model, session, text, count=LENGTH):
    """What NumPy answers after a session's video and a text."""
    before, _ = session.encode("?")
    video = session._backend.to_host(session._tokens).astype(np.float64)
    prompt = np.concatenate((model.decoder.table[before], video, model.decoder.table[text]))
    vocabulary = model.llm.bundle.manifest.prompt.vocabulary
    return model.decoder.greedy(prompt, count, vocabulary, dropping(model, len(before), len(video)))


@pytest.mark.parametrize("size", [1024, 7])
@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_the_answers_of_a_session_are_numpys(model, colors, monkeypatch, ratio, size):
    monkeypatch.setattr(ort_cpu_thinning, "PASS", size)
    with model.llm.session(colors, frames=8, retention_ratio=ratio) as session:
        assert session.thinned == round(session.rows * model.ratio) < session.rows
        for question in (*QUESTIONS, QUESTIONS[0]):
            answer = session.ask(question, max_new_tokens=LENGTH)
            _, text = session.encode(question)
            assert answer.ids == greedy(model, session, text)
            assert (answer.rows, answer.thinned) == (session.rows, session.thinned)
            assert len(set(answer.ids)) >= 4


def test_logits_of_prompts_and_steps_are_numpys(model, backend):
    """Rows of a prompt at random; the second prompt shares its beginning with the first, as in a session."""
    rng = np.random.default_rng(0)
    begin, rows, decoder = 5, 40, model.decoder
    start = rng.normal(size=(begin + rows, decoder.table.shape[1])) * decoder.table.std()
    cache = backend.new_cache(60)
    for text in (np.array([20, 21, 22]), np.array([30])):
        backend.rewind(cache, min(cache.length, len(start)))
        fresh = [start.astype(np.float32)] if not cache.length else []
        thinning = Thinning(begin, rows, round(rows * model.ratio))
        found = backend.extend(cache, [*fresh, backend.embed(text)], thinning)
        prompt = np.concatenate((start, decoder.table[text]))
        logits, caches = decoder.prefill(prompt, dropping(model, begin, rows))
        assert_close(found, logits)
        for i, token in enumerate((7, 40, 100)):
            logits = decoder.step(token, len(prompt) + i, caches)
            assert_close(backend.decode(cache, token), logits)
    cache.release()


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected[: len(found)], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_chat_is_thinned_by_the_last_word_of_each_turn(model, colors):
    with model.llm.session(colors, frames=8) as session:
        session.ask(QUESTIONS[1], max_new_tokens=2)  # no part of the chat
        for message in ("What?", "And then?", "Why?"):
            _, text = session.encode(message, chat=True)
            assert session.chat(message, max_new_tokens=6).ids == greedy(model, session, text, 6)


def test_answers_that_take_turns_are_those_of_each_alone(model, colors):
    with model.llm.session(colors, frames=8) as session:
        alone = [session.ask(question, max_new_tokens=6).ids for question in QUESTIONS]
        streams = [session.stream(question, max_new_tokens=6) for question in QUESTIONS]
        for _ in zip_longest(*streams):
            pass
    assert [stream.answer.ids for stream in streams] == alone


def test_a_session_that_waits_for_another_video_answers_the_same(model, colors):
    wanted = model.llm.generate(colors, QUESTIONS[0], frames=8, max_new_tokens=6).ids
    waiting = model.llm.session(colors, frames=8)
    model.llm.generate(colors[::-1], "How many?", frames=8, max_new_tokens=2)
    assert waiting.ask(QUESTIONS[0], max_new_tokens=6).ids == wanted


def test_without_pruning_every_layer_sees_all_tokens(model, colors):
    answer = model.llm.generate(colors, QUESTIONS[0], frames=8, prune=False, max_new_tokens=LENGTH)
    assert (answer.kept, answer.rows, answer.thinned) == (128, 160, None)
    with model.llm.session(colors, frames=8, prune=False) as session:
        before, text = session.encode(QUESTIONS[0])
        table = model.decoder.table
        prompt = np.concatenate((table[before], session._tokens.astype(np.float64), table[text]))
        vocabulary = model.llm.bundle.manifest.prompt.vocabulary
        assert answer.ids == model.decoder.greedy(prompt, LENGTH, vocabulary)
        assert session.ask(QUESTIONS[0], max_new_tokens=LENGTH).ids == answer.ids
        assert session.ask(QUESTIONS[1], max_new_tokens=3).ids == session.ask(QUESTIONS[1], max_new_tokens=3).ids


def test_the_ratio_is_that_of_the_mean_layer(model, colors):
    """The operator keeps more, so that all layers together see r of the tokens; thresholds go by r itself."""
    manifest = model.llm.bundle.manifest
    layers = manifest.decoder.layers
    share = (model.layer + (layers - model.layer) * model.ratio) / layers
    found = manifest.params.at(0.1).resolved()
    assert found.retention_ratio == round(0.1 / share, 4)
    assert found.segment_threshold == 0.65
    answer = model.llm.generate(colors, QUESTIONS[0], frames=8, retention_ratio=0.1, max_new_tokens=1)
    assert answer.retention_ratio == 0.1
    features, salience = select(model.llm.bundle, "ort-cpu").vision(answer.frames, lambda done: None)
    params = manifest.params.at(0.1)
    assert answer.kept == select(model.llm.bundle, "ort-cpu").prune(features, salience, answer.seconds, params).count


def test_a_prompt_that_fails_leaves_the_session_as_it_was(model, colors, backend, monkeypatch):
    with model.llm.session(colors, frames=8) as session:
        wanted = session.ask(QUESTIONS[0], max_new_tokens=4).ids
        upper = backend._upper_pass

        def failing(*arguments):
            raise RuntimeError("the device failed")

        monkeypatch.setattr(backend, "_upper_pass", failing)
        with pytest.raises(RuntimeError, match="the device failed"):
            session.ask(QUESTIONS[1], max_new_tokens=4)
        monkeypatch.setattr(backend, "_upper_pass", upper)
        assert session.ask(QUESTIONS[0], max_new_tokens=4).ids == wanted
