"""Batches of synthetic clips, rendered by worker processes while the GPU trains.

Letters: B clips, F frames, Q questions of a clip, N single frames, P phrases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from network import PATCH, PHRASE, SIDE, SIZE
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from vocabulary import AFTER, END, PAD

from tango_calibration.data.questions import Question
from tango_calibration.data.synthetic import (
    ATTRIBUTES,
    COLORS,
    HELD_OUT,
    SHAPES,
    UNSTATED,
    Clip,
    Split,
    make_clip,
    phrase,
    visibility,
)

#: Tokens of one question after the video: its text, the answer and the template between them.
TEXT = 24
IGNORED = -100

#: Maximum number of facts of a frame, and the padding where there are fewer.
MAX_FACTS, NO_FACT = 12, -2

#: Distance between the first clip seeds of two runs, more than a run has clips.
CLIPS_PER_RUN = 10_000_000

VALUES = tuple(ATTRIBUTES.values())


@dataclass(frozen=True)
class Clips:
    """Videos with questions.

    Attributes:
        frames: [B, F, 384, 384, 3] uint8.
        texts: [B, Q, TEXT] int64, token ids after the video.
        labels: [B, Q, TEXT] int64, the next id if it is part of an answer, else IGNORED.
        types: [B][Q], the type of each question.
    """

    frames: Tensor
    texts: Tensor
    labels: Tensor
    types: list[list[str]]

    def pin_memory(self) -> Clips:
        """A copy in pinned memory."""
        return Clips(self.frames.pin_memory(), self.texts.pin_memory(), self.labels.pin_memory(), self.types)


@dataclass(frozen=True)
class Frames:
    """Single frames with questions, and phrases that are true of some of them.

    Attributes:
        clips: The frames, as N clips of one frame.
        near: [N, 729] bool, patches with a figure or next to one.
        facts: [N, MAX_FACTS, 4] int64, facts of each frame, padded with NO_FACT.
        phrases: [P, PHRASE] int64, ids.
        stated: [P, 4] int64, the fact of each phrase; UNSTATED attributes are left out.
    """

    clips: Clips
    near: Tensor
    facts: Tensor
    phrases: Tensor
    stated: Tensor

    def pin_memory(self) -> Frames:
        """A copy in pinned memory."""
        pinned = (t.pin_memory() for t in (self.near, self.facts, self.phrases, self.stated))
        return Frames(self.clips.pin_memory(), *pinned)


def phrases_true(facts: Tensor, stated: Tensor) -> Tensor:
    """Which phrases [P, 4] are true of which frames [N, MAX_FACTS, 4]: bool [N, P]."""
    return ((facts[:, :, None] == stated) | (stated == UNSTATED)).all(-1).any(1)


class _Stream(IterableDataset[Any]):
    """Batches by number; worker w of W makes batches w, w + W, …, so the order does not depend on W."""

    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        self.make, self.count = make, count

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, self.count, step):
            yield self.make(number)


def stream(make: Callable[[int], Any], count: int, workers: int) -> Iterator[Any]:
    """Makes ``count`` batches ahead of time, in order."""
    ahead = {"num_workers": workers, "prefetch_factor": 2 if workers else None}
    return iter(DataLoader(_Stream(make, count), batch_size=None, pin_memory=torch.cuda.is_available(), **ahead))


@dataclass(frozen=True)
class ClipBatches:
    """Batches of stage 2, with as many clips as fit into ``frames_per_batch``.

    Attributes:
        lengths: The clips of batch i have ``lengths[i % len(lengths)]`` frames.
        questions: Questions of each clip; a clip with fewer repeats some of them.
    """

    tokenizer: str
    seed: int
    lengths: tuple[int, ...]
    split: Split = "train"
    questions: int = 16
    frames_per_batch: int = 256

    def __call__(self, number: int) -> Clips:
        """The batch of this number."""
        F = self.lengths[number % len(self.lengths)]
        frames = np.empty((max(1, self.frames_per_batch // F), F, SIZE, SIZE, 3), np.uint8)
        asked: list[list[Question]] = []
        for seed in itertools.count(self.seed * CLIPS_PER_RUN + number * self.frames_per_batch // 4):
            clip = make_clip(seed, self.split, F)
            questions = clip.questions(np.random.default_rng((seed, 2)), self.questions)
            if questions:
                frames[len(asked)] = clip.render()
                asked.append(questions)
            if len(asked) == len(frames):
                break
        return _clips(Tokenizer.from_str(self.tokenizer), frames, asked, self.questions)


@dataclass(frozen=True)
class FrameBatches:
    """Batches of stage 1: frames with questions, four of a clip.

    Attributes:
        questions: Questions of each frame; a frame with fewer repeats some of them.
        phrases: True phrases of each frame; as many again have one attribute changed.
    """

    tokenizer: str
    seed: int
    questions: int = 6
    phrases: int = 2
    frames_per_batch: int = 256

    def __call__(self, number: int) -> Frames:
        """The batch of this number."""
        N = self.frames_per_batch
        frames = np.empty((N, 1, SIZE, SIZE, 3), np.uint8)
        asked: list[list[Question]] = []
        facts, stated, near = [], [], []
        for seed in itertools.count(self.seed * CLIPS_PER_RUN + number * self.frames_per_batch):
            clip, rng = make_clip(seed, "train", 16), np.random.default_rng((seed, 1))
            chosen = [i for i in np.sort(rng.permutation(16)[:4]).tolist() if len(clip.facts(i))]
            questions = {i: clip.frame_questions(i, rng, self.questions) for i in chosen}
            used = [i for i in chosen if questions[i]][: N - len(asked)]
            if used:
                frames[len(asked) : len(asked) + len(used), 0] = clip.render(clip.seconds[used])
            for i in used:
                found = clip.facts(i)[:MAX_FACTS]
                asked.append(questions[i])
                near.append(near_figures(clip, i))
                facts.append(np.pad(found, ((0, MAX_FACTS - len(found)), (0, 0)), constant_values=NO_FACT))
                for _ in range(self.phrases):
                    true = _partial_fact(found[rng.integers(len(found))], rng)
                    stated += [true, _changed(true, rng)]
            if len(asked) == N:
                break
        tokenizer = Tokenizer.from_str(self.tokenizer)
        phrases = _padded_all(tokenizer, [phrase(fact) for fact in stated])
        clips = _clips(tokenizer, frames, asked, self.questions)
        nearby, seen = (torch.from_numpy(np.stack(each)) for each in (near, facts))
        return Frames(clips, nearby, seen, phrases, torch.tensor(stated))


def near_figures(clip: Clip, i: int) -> NDArray[np.bool_]:
    """Patches [729] of frame ``i`` with a figure or next to one."""
    found = np.zeros((SIDE, SIDE), bool)
    for figure in clip.figures:
        for appearance in figure.appearances:
            if appearance.first <= i <= appearance.last:
                corner = visibility.corner(clip.scenes[appearance.scene], figure, appearance, i)
                columns, rows = (slice(*_patches(edge, figure.pixels)) for edge in corner)
                found[rows, columns] = True
    return found.ravel()


def _patches(begin: int, length: int) -> tuple[int, int]:
    """The first patch at most one away from a range of pixels, and the first after the last such patch."""
    return max(0, begin // PATCH - 1), max(0, (begin + length - 1) // PATCH + 2)


def _partial_fact(fact: NDArray[np.int64], rng: np.random.Generator) -> list[int]:
    """The attributes that a phrase mentions: all of them in half of the phrases, else some."""
    stated: list[int] = fact.tolist()
    if rng.random() < 0.5:
        for dropped in rng.permutation(4)[: rng.integers(1, 3)]:
            stated[dropped] = UNSTATED
    return stated


def _changed(stated: list[int], rng: np.random.Generator) -> list[int]:
    """A fact with one attribute drawn again, without pairs of color and shape that are held out."""
    mentioned = [i for i, value in enumerate(stated) if value != UNSTATED]
    while True:
        changed = list(stated)
        i = mentioned[rng.integers(len(mentioned))]
        changed[i] = int(rng.integers(len(VALUES[i])))
        _, color, shape, _ = changed
        if UNSTATED in (color, shape) or (COLORS[color], SHAPES[shape]) not in HELD_OUT:
            return changed


def _clips(tokenizer: Tokenizer, frames: NDArray[np.uint8], asked: Sequence[Sequence[Question]], count: int) -> Clips:
    """Clips with ``count`` questions each."""
    filled = [[questions[i % len(questions)] for i in range(count)] for questions in asked]
    pairs = [[question_ids(tokenizer, q.text, q.answer) for q in questions] for questions in filled]
    texts, labels = (torch.tensor([[pair[i] for pair in of_clip] for of_clip in pairs]) for i in (0, 1))
    return Clips(torch.from_numpy(frames), texts, labels, [[q.type for q in row] for row in filled])


def question_ids(tokenizer: Tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids and labels of a question with its answer, TEXT each."""
    asked = tokenizer.encode(f"\n{question}{AFTER}").ids
    answered = tokenizer.encode(f"{answer}{END}").ids
    labels = [IGNORED] * (len(asked) - 1) + answered
    return _padded(asked + answered, tokenizer.token_to_id(PAD), TEXT), _padded(labels, IGNORED, TEXT)


def _padded_all(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    pad = tokenizer.token_to_id(PAD)
    return torch.tensor([_padded(encoded.ids, pad, PHRASE) for encoded in tokenizer.encode_batch(texts)])


def _padded(ids: list[int], filler: int, length: int) -> list[int]:
    if len(ids) > length:
        raise ValueError(f"{len(ids)} tokens do not fit in {length}")
    return ids + [filler] * (length - len(ids))
