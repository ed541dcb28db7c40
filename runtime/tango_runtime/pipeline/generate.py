"""The decode loop: text after the start of a prompt → the tokens of an answer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from tango_plugins import TangoError
from tango_plugins.thinning import Thinning
from tango_runtime.backends.base import Backend, KVCache, Logits, Tensor
from tango_runtime.backends.rotary import TEXT, RotaryIds
from tango_runtime.bundle import Manifest
from tango_runtime.pipeline.answer import Finish
from tango_runtime.pipeline.sampling import Sampler
from tango_runtime.pipeline.steps import DecodeSteps, PendingStep
from tango_runtime.pipeline.timer import StageTimer
from tango_runtime.util.numbers import is_integer


class PromptCache:
    """The start of a prompt in a key/value cache of its own, and the text that follows it at the moment.

    Texts replace one another: only what differs from the text before is computed. The start is computed together with
    the first text, in one pass. Where the decoder thins the video, the upper layers compute every prompt anew: its last
    token says which rows they see.

    Args:
        backend: Runs the decoder.
        pieces: Embeddings of the start. They must last until the first call of :meth:`prefill` or :meth:`logits`.
        ids: Token ids that end the start: they are embedded together with the first text.
        length: Positions of the start, of pieces and ids.
        context: Most positions of a sequence.
        thinning: Which rows of the start the upper layers of the decoder do without; None for none.
        rotary: Rotary positions of the sequence, for a decoder that has some of its own.
        steps: What its decode steps share with those of other sequences; None for nothing.

    Attributes:
        length: Positions of the start.
        shared_ms: Milliseconds of the latest step, if it was computed for another sequence; else 0.
    """

    def __init__(
        self,
        backend: Backend,
        pieces: Sequence[Tensor],
        ids: Sequence[int],
        length: int,
        context: int,
        thinning: Thinning | None = None,
        rotary: RotaryIds = TEXT,
        steps: DecodeSteps | None = None,
    ) -> None:
        self.length = length
        self._backend, self._context, self._thinning, self._rotary = backend, context, thinning, rotary
        self._pieces: Sequence[Tensor] | None = pieces
        self._ids = ids
        self._cache: KVCache | None = None
        self._text: list[int] = []
        self._thinned: list[int] | None = None  # the text that the prompt ended with when it was thinned
        self._closed = False
        self._steps = steps or DecodeSteps()
        self._next: tuple[list[int], PendingStep] | None = None  # a text, and the step of its last token
        self.shared_ms = 0.0

    def reserve(self, text: int) -> None:
        """Makes room for a text of ``text`` tokens, answer included, as far as the context goes.

        Raises:
            TangoError: There is no memory for it, the backend's caches are smaller, or this is closed.
        """
        self._require_open()
        positions = min(self.length + text, self._context)
        if self._cache is None:
            self._cache = self._backend.new_cache(positions, self._rotary)
        else:
            self._backend.reserve(self._cache, positions)

    def prefill(self) -> None:
        """Computes the start by itself, if that has not been done."""
        if self._pieces is not None and self.length:
            self._first_pass([])

    def logits(self, text: Sequence[int], answer: Sequence[int] = ()) -> Logits:
        """Logits [vocabulary] of the token that follows the start, a text that ends the prompt, and an answer to it.

        Text and answer may both be empty in the first call only.

        Raises:
            TangoError: They do not fit into the context or the memory, or this is closed.
        """
        self._require_open()
        if self._pieces is not None:
            logits = self._first_pass(text)
        elif self._thinning is None:
            return self._follow([*text, *answer])
        elif not answer or self._thinned != list(text):
            logits = self._follow(text, self._thinning)
        return self._follow([*text, *answer]) if answer else logits

    def announce(self, text: Sequence[int], answer: Sequence[int]) -> None:
        """Says what :meth:`logits` will be asked for next: the same as before, and one token.

        So the step can be computed together with other sequences' steps.
        """
        ids = [*text, *answer]
        assert self._cache is not None
        if self._backend.sequences > 1 and ids[:-1] == self._text:
            self._next = ids, self._steps.add(self._backend, self._cache, ids[-1])

    def withdraw(self) -> None:
        """Takes back what was announced."""
        if self._next is not None:
            (ids, step), self._next = self._next, None
            self._steps.remove(step)
            if step.done:
                self._text = ids

    def fork(self, text: int) -> PromptCache:
        """The same start in a cache of its own, with room for a text of ``text`` tokens as far as the context goes.

        Raises:
            TangoError: There is no memory for it, or this is closed.
        """
        self._require_open()
        self.prefill()
        assert self._cache is not None
        found = PromptCache(
            self._backend, [], [], self.length, self._context, self._thinning, self._rotary, self._steps
        )
        found._pieces = None
        found._cache = self._backend.fork(self._cache, self.length, min(self.length + text, self._context))
        return found

    def close(self) -> None:
        """Gives the cache back to the backend."""
        self.withdraw()
        if self._cache is not None:
            self._cache.release()
        self._cache = self._pieces = None
        self._closed = True

    def _require_open(self) -> None:
        if self._closed:
            raise TangoError("the session is closed", "open another: llm.session(video)")

    def _follow(self, text: Sequence[int], thinning: Thinning | None = None) -> Logits:
        """Puts a text in the place of the one before."""
        assert self._cache is not None
        if self._next is not None and self._next[0] == text:
            return self._take_step()
        self.withdraw()
        same = min(_common(self._text, text), len(text) - 1)
        if same < len(self._text):
            self._backend.rewind(self._cache, self.length + same)
            self._text = list(text[:same])
        rest = text[same:]
        if thinning is not None:
            self._thinned = None
            logits = self._backend.extend(self._cache, [self._embed(rest)], thinning)
            self._thinned = list(text)
        elif len(rest) == 1:
            self._next = list(text), self._steps.add(self._backend, self._cache, rest[0])
            return self._take_step()
        else:
            logits = self._backend.extend(self._cache, [self._embed(rest)])
        self._text = list(text)  # after a pass that fails, the cache and this are as before
        return logits

    def _take_step(self) -> Logits:
        """The logits of the step that was announced."""
        assert self._next is not None
        step = self._next[1]
        self.shared_ms = step.ms
        try:
            return self._steps.logits(step)
        finally:
            self.withdraw()

    def _first_pass(self, text: Sequence[int]) -> Logits:
        assert self._pieces is not None
        if self._cache is None:
            self.reserve(len(text))
        assert self._cache is not None
        ids = [*self._ids, *text]
        pieces = [*self._pieces, self._embed(ids)] if ids else self._pieces
        logits = self._backend.extend(self._cache, pieces, self._thinning)
        self._pieces, self._text, self._thinned = None, list(text), list(text)
        return logits

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self._backend.embed(np.array(ids, np.int64))


@dataclass(frozen=True)
class Limits:
    """Where an answer ends.

    Attributes:
        max_new_tokens: Most tokens of the answer, at least 1.
        context: Most positions, prompt and answer together.
        stop: Token ids that end it.
    """

    max_new_tokens: int
    context: int
    stop: frozenset[int]

    @classmethod
    def of(cls, manifest: Manifest, max_new_tokens: int) -> Limits:
        """A bundle's limits.

        Raises:
            TangoError: ``max_new_tokens`` is not an integer of at least 1.
        """
        if not is_integer(max_new_tokens) or max_new_tokens < 1:
            raise TangoError(f"max_new_tokens is {max_new_tokens!r}", "ask for at least one")
        return cls(max_new_tokens, manifest.decoder.context, frozenset(manifest.prompt.stop))

    def require_room(self, prompt_tokens: int, video_tokens: int) -> None:
        """Rejects a prompt after which no token of an answer fits.

        Raises:
            TangoError: There is no room.
        """
        if prompt_tokens >= self.context:
            raise TangoError(
                f"the prompt takes {prompt_tokens} tokens, {video_tokens} of them video; "
                f"the bundle's context is {self.context}",
                "keep fewer tokens (retention ratio, frames), ask less, or export with a larger --context",
            )


def decode_loop(
    prompt: PromptCache, text: Sequence[int], sampler: Sampler, limits: Limits, ids: list[int], timer: StageTimer
) -> Generator[int, None, Finish]:
    """Generates an answer, token by token.

    Args:
        prompt: The start of the prompt.
        text: Token ids that follow it, up to where the answer begins.
        sampler: Draws tokens from logits.
        limits: Where the answer ends.
        ids: Filled with the answer's token ids, without a stop token.
        timer: Measures ``prefill`` (up to the first token) and ``decode`` (all later ones).

    Yields:
        Each id as it is decoded. The next is computed when it is asked for; until then, other texts may use the prompt.

    Returns:
        Why the answer ended.

    Raises:
        TangoError: The logits are not finite, or the backend failed.
    """
    prompt.reserve(len(text) + limits.max_new_tokens)
    with timer.measure("prefill"):
        token = sampler(prompt.logits(text))
    timer.read().setdefault("decode", 0.0)  # present even where one token is all there is
    try:
        while token not in limits.stop:
            ids.append(token)
            finish = _finish(prompt.length + len(text), sampler, limits, ids)
            if finish is None:
                prompt.announce(text, ids)
            yield token
            if finish is not None:
                return finish
            with timer.measure_on_host("decode"):
                token = sampler(prompt.logits(text, ids))
            timer.stages["decode"] += prompt.shared_ms
        return "stop"
    finally:
        prompt.withdraw()


def _finish(prompt_tokens: int, sampler: Sampler, limits: Limits, ids: Sequence[int]) -> Finish | None:
    """Why an answer ends after these ids; None if it goes on."""
    if sampler.done:
        return "stop"
    if len(ids) == limits.max_new_tokens:
        return "length"
    if prompt_tokens + len(ids) == limits.context:
        return "context"
    return None


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two texts have in common at their beginning."""
    if other[: len(one)] == one:  # as in every step of an answer
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
