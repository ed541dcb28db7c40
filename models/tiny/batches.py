"""Batches of the synthetic world, rendered by worker processes while the GPU trains.

Letters: B clips, F frames, Q questions of a clip, N frames by themselves, P phrases.
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
    COLOURS,
    HELD_OUT,
    SHAPES,
    UNSAID,
    Clip,
    Split,
    make_clip,
    phrase,
    sight,
)

#: Tokens behind the video of one question: its text, the answer and what stands between them.
TEXT = 24
IGNORED = -100

#: Most facts of a frame, and what stands where there are fewer.
MOST_FACTS, NOTHING = 12, -2

#: Each clip of a run has a seed of its own: a run's seeds lie apart by more than a run has clips.
CLIPS_PER_RUN = 10_000_000

VALUES = tuple(ATTRIBUTES.values())


@dataclass(frozen=True)
class Clips:
    """Videos with questions.

    Attributes:
        frames: [B, F, 384, 384, 3] uint8.
        texts: [B, Q, TEXT] int64, what stands behind the video.
        labels: [B, Q, TEXT] int64, the next id where it belongs to an answer, else IGNORED.
        types: [B][Q], the type of each question.
    """

    frames: Tensor
    texts: Tensor
    labels: Tensor
    types: list[list[str]]

    def pin_memory(self) -> Clips:
        """The same in memory that a GPU reads by itself."""
        return Clips(self.frames.pin_memory(), self.texts.pin_memory(), self.labels.pin_memory(), self.types)


@dataclass(frozen=True)
class Frames:
    """Frames by themselves, with questions, and phrases that hold of some of them.

    Attributes:
        clips: The frames, as N clips of one frame.
        near: [N, 729] bool, the patches where a figure is, or next to one.
        facts: [N, MOST_FACTS, 4] int64, what is seen in each frame, padded with NOTHING.
        phrases: [P, PHRASE] int64, ids.
        stated: [P, 4] int64, what each phrase says, UNSAID where nothing.
    """

    clips: Clips
    near: Tensor
    facts: Tensor
    phrases: Tensor
    stated: Tensor

    def pin_memory(self) -> Frames:
        """The same in memory that a GPU reads by itself."""
        pinned = (t.pin_memory() for t in (self.near, self.facts, self.phrases, self.stated))
        return Frames(self.clips.pin_memory(), *pinned)


def holds(facts: Tensor, stated: Tensor) -> Tensor:
    """Which phrases [P, 4] hold of which frames [N, MOST_FACTS, 4]: bool [N, P]."""
    said = stated != UNSAID
    return ((facts[:, :, None] == stated) | ~said).all(-1).any(1)


class _Stream(IterableDataset[Any]):
    """Batches by number; worker w of W makes those numbered w, w + W, …: the order does not hang on W."""

    def __init__(self, make: Callable[[int], Any], count: int) -> None:
        self.make, self.count = make, count

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, self.count, step):
            yield self.make(number)


def stream(make: Callable[[int], Any], count: int, workers: int) -> Iterator[Any]:
    """Makes ``count`` batches ahead of their use, in order."""
    ahead = {"num_workers": workers, "prefetch_factor": 2 if workers else None}
    return iter(DataLoader(_Stream(make, count), batch_size=None, pin_memory=torch.cuda.is_available(), **ahead))


@dataclass(frozen=True)
class ClipBatches:
    """Batches of stage 2: as many clips as ``frames_per_batch`` holds.

    Attributes:
        lengths: The clips of batch i have ``lengths[i % len(lengths)]`` frames.
        questions: Of each clip; one with fewer has some of them twice.
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
    """Batches of stage 1: frames with something to ask about, four of a clip.

    Attributes:
        questions: Of each frame; one with fewer has some of them twice.
        phrases: That hold of each frame; as many again have one thing changed.
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
            told = [i for i in chosen if questions[i]]
            told = told[: N - len(asked)]
            if told:
                frames[len(asked) : len(asked) + len(told), 0] = clip.render(clip.seconds[told])
            for i in told:
                found = clip.facts(i)[:MOST_FACTS]
                asked.append(questions[i])
                near.append(near_figures(clip, i))
                facts.append(np.pad(found, ((0, MOST_FACTS - len(found)), (0, 0)), constant_values=NOTHING))
                for _ in range(self.phrases):
                    right = _partly(found[rng.integers(len(found))], rng)
                    stated += [right, _changed(right, rng)]
            if len(asked) == N:
                break
        tokenizer = Tokenizer.from_str(self.tokenizer)
        phrases = _padded_all(tokenizer, [phrase(fact) for fact in stated])
        clips = _clips(tokenizer, frames, asked, self.questions)
        nearby, seen = (torch.from_numpy(np.stack(each)) for each in (near, facts))
        return Frames(clips, nearby, seen, phrases, torch.tensor(stated))


def near_figures(clip: Clip, i: int) -> NDArray[np.bool_]:
    """Which patches [729] of frame ``i`` a figure is in, or next to."""
    found = np.zeros((SIDE, SIDE), bool)
    for figure in clip.figures:
        for appearance in figure.appearances:
            if appearance.first <= i <= appearance.last:
                corner = sight.corner(clip.scenes[appearance.scene], figure, appearance, i)
                columns, rows = (slice(*_patches(edge, figure.pixels)) for edge in corner)
                found[rows, columns] = True
    return found.ravel()


def _patches(begin: int, length: int) -> tuple[int, int]:
    """The first patch of a line of them that is at most one away from a stretch of pixels, and the first behind these."""
    return max(0, begin // PATCH - 1), max(0, (begin + length - 1) // PATCH + 2)


def _partly(fact: NDArray[np.int64], rng: np.random.Generator) -> list[int]:
    """What a phrase says of a figure: half of them all there is to say, the others less."""
    said: list[int] = fact.tolist()
    if rng.random() < 0.5:
        for dropped in rng.permutation(4)[: rng.integers(1, 3)]:
            said[dropped] = UNSAID
    return said


def _changed(stated: list[int], rng: np.random.Generator) -> list[int]:
    """The same with one attribute drawn anew; not a pair of colour and shape that training must not know."""
    said = [i for i, value in enumerate(stated) if value != UNSAID]
    while True:
        changed = list(stated)
        i = said[rng.integers(len(said))]
        changed[i] = int(rng.integers(len(VALUES[i])))
        _, colour, shape, _ = changed
        if UNSAID in (colour, shape) or (COLOURS[colour], SHAPES[shape]) not in HELD_OUT:
            return changed


def _clips(tokenizer: Tokenizer, frames: NDArray[np.uint8], asked: Sequence[Sequence[Question]], count: int) -> Clips:
    """Clips with ``count`` questions each."""
    filled = [[questions[i % len(questions)] for i in range(count)] for questions in asked]
    pairs = [[question_ids(tokenizer, q.text, q.answer) for q in questions] for questions in filled]
    texts, labels = (torch.tensor([[pair[i] for pair in of_clip] for of_clip in pairs]) for i in (0, 1))
    return Clips(torch.from_numpy(frames), texts, labels, [[q.type for q in row] for row in filled])


def question_ids(tokenizer: Tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """A question with its answer, as ids and labels, TEXT of each."""
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
