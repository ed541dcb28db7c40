"""Trains a small LLaVA-OneVision on synthetic clips.

    python models/tiny/train.py OUTPUT --seed 0

Stage 1 trains everything on single frames: the tower and its pooling head by SigLIP's sigmoid loss on phrases and, at the
same time, tower, projector and decoder on questions (as SigLIP 2, arXiv 2502.14786, adds a decoder to the sigmoid loss).
Stage 2 freezes the tower and trains projector and decoder on questions about clips. It writes llava/ and siglip/, which
`tango-export` reads, and training.jsonl to OUTPUT.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from batches import IGNORED, ClipBatches, Clips, FrameBatches, phrases_true, stream
from checkpoint import save
from muon import Muon
from network import (
    POOLED_SIDE,
    answer_logits,
    make_llava,
    make_siglip,
    patches,
    pooled,
    project,
    siglip_logits,
    siglip_loss,
)
from torch import Tensor, nn
from vocabulary import BEFORE, END, IMAGE, VIDEO, make_tokenizer, rows

from tango_calibration.data.synthetic import Split, corpus

#: Stage 2: (share of its steps, frames of its clips in turn). Short clips teach order in time, long ones to search.
CURRICULUM: tuple[tuple[float, tuple[int, ...]], ...] = ((0.5, (8, 16)), (0.5, (8, 16, 32, 16, 8, 16, 32, 64)))

#: Tokens of a frame.
TOKENS = POOLED_SIDE**2

#: Shares of the tokens that the decoder sees when it does not see all.
PARTS = (0.5, 0.25)

#: Weights of questions in stage 2: the hardest types are asked only once about a clip.
WEIGHTS = {"times": 6.0, "count": 2.0}

#: Weight of the sigmoid loss, a sum over a thousand phrases, relative to the loss of the answers.
SIGMOID_WEIGHT = 0.01


class Log:
    """Writes lines of JSON to a file and to standard output."""

    def __init__(self, file: Path) -> None:
        self._file, self._begin = file.open("w", encoding="utf-8"), time.perf_counter()

    def __call__(self, **values: Any) -> None:
        """Writes the values and the seconds since the start."""
        line = json.dumps({"seconds": round(time.perf_counter() - self._begin, 1), **values})
        print(line, flush=True)
        print(line, file=self._file, flush=True)


class Trainer:
    """A model in training, shared by both stages."""

    def __init__(self, args: argparse.Namespace, log: Log) -> None:
        self.args, self.log = args, log
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = make_tokenizer(corpus())
        ids = [self.tokenizer.token_to_id(t) for t in (VIDEO, IMAGE, END)]
        self.siglip: Any = make_siglip(rows(self.tokenizer)).to(self.device)
        self.tower = self.siglip.vision_model
        self.llava: Any = make_llava(rows(self.tokenizer), *ids).to(self.device)
        self.llava.model.vision_tower = nn.Identity()  # SigLIP owns the tower until it is saved
        self.decoder = self.llava.model.language_model
        self.decoder.config._attn_implementation = "questions_after_video"
        self._before = torch.tensor(self.tokenizer.encode(BEFORE).ids, device=self.device)
        self._patches = torch.compile(patches, dynamic=False) if args.compile else patches
        if args.compile:
            for layer in self.decoder.layers:
                layer.compile()

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def encode(self, frames: Tensor) -> Tensor:
        """[N, 384, 384, 3] uint8 → last hidden states [N, 729, width]."""
        return self._patches(self.tower, frames)

    def answers(self, hidden: Tensor, texts: Tensor, part: float, shuffled: bool) -> Tensor:
        """Logits [B, Q, T, vocabulary], from hidden states [B·F, 729, width].

        Args:
            hidden: Hidden states of all frames.
            texts: [B, Q, T], token ids after each video.
            part: Share of the tokens that the decoder sees, chosen at random, with more of some frames than of others,
                as methods that look at the content choose them.
            shuffled: Shuffle the tokens, so that the decoder reads a token's place from its features: after pruning,
                the order says little about it.
        """
        video = project(self.llava.model.multi_modal_projector, hidden)
        video = video.unflatten(0, (len(texts), -1)).flatten(1, 2)
        if shuffled or part < 1:
            B, V, width = video.shape
            drawn = torch.rand(B, V, device=self.device)
            drawn += self.args.uneven * torch.rand(B, V // TOKENS, device=self.device).repeat_interleave(TOKENS, 1)
            chosen = drawn.argsort(1)[:, : round(part * V)]
            chosen = chosen if shuffled else chosen.sort(1).values
            video = video.gather(1, chosen[..., None].expand(-1, -1, width))
        return answer_logits(self.llava, video, self._before, texts)

    def optimizers(self, modules: Sequence[nn.Module]) -> list[torch.optim.Optimizer]:
        """Muon for the matrices between hidden states, AdamW for embeddings, norms, biases and the pooling probe."""
        named = [named for module in modules for named in module.named_parameters()]
        between = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        rest = [p for name, p in named if p.ndim != 2 or "embed" in name] + [self.llava.model.image_newline]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        fused = self.device.type == "cuda"
        return [
            torch.optim.AdamW(groups, lr=self.args.rate, betas=(0.9, 0.95), fused=fused),
            Muon(between, lr=self.args.matrix_rate, weight_decay=0.05),
        ]

    def step(self, loss: Tensor, optimizers: Sequence[torch.optim.Optimizer], progress: float) -> None:
        """One step; the learning rate warms up over 3 % of a stage and falls to 0 over its last 40 %."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * min(1.0, progress / 0.03 + 0.01, (1 - progress) / 0.4)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
        for optimizer in optimizers:
            optimizer.step()

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Copies to the device, asynchronously."""
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]


def swap_background(hidden: Tensor, near: Tensor) -> Tensor:
    """Replaces hidden states of background patches by those of another clip's frame that is also background there.

    A background patch then says nothing about the frame's figures, so the tower does not learn to describe them there. If
    it did, it would matter little which tokens are kept.

    Args:
        hidden: [N, 729, width]; frames of the same clip are adjacent, at most four.
        near: [N, 729] bool, the patches near figures.
    """
    other = int(torch.randint(4, max(5, len(near) - 3), ()))
    taken = ~near & ~near.roll(other, 0)
    return torch.where(taken[..., None], hidden.roll(other, 0), hidden)


def loss_of(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross entropy of the answers' tokens, with ``weights`` [B, Q] of the questions."""
    each = nnf.cross_entropy(logits.float().flatten(0, 2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    counted = (labels != IGNORED) * (1.0 if weights is None else weights[..., None])
    return (each.view_as(labels) * counted).sum() / counted.sum()


def train_on_frames(trainer: Trainer) -> None:
    """Stage 1."""
    args = trainer.args
    projector = trainer.llava.model.multi_modal_projector
    optimizers = trainer.optimizers([trainer.siglip, trainer.decoder, projector])
    make = FrameBatches(trainer.tokenizer.to_str(), 10 * args.seed, frames_per_batch=args.batch)
    for number, batch in enumerate(stream(make, args.frame_steps, args.workers)):
        frames, texts, labels = trainer.to_device(batch.clips.frames, batch.clips.texts, batch.clips.labels)
        near, facts = trainer.to_device(batch.near, batch.facts)
        phrases, stated = trainer.to_device(batch.phrases, batch.stated)
        with trainer.autocast():
            hidden = swap_background(trainer.encode(frames.flatten(0, 1)), near)
            matched = siglip_logits(trainer.siglip, pooled(trainer.tower, hidden), phrases)
            answered = trainer.answers(hidden, texts, 1.0, shuffled=True)
        true = phrases_true(facts, stated)
        sigmoid, answer_loss = siglip_loss(matched, true), loss_of(answered, labels)
        trainer.step(answer_loss + SIGMOID_WEIGHT * sigmoid, optimizers, number / args.frame_steps)
        if number % 100 == 0 or number == args.frame_steps - 1:
            phrases_log = {
                "sigmoid": round(sigmoid.item(), 2),
                "phrase_accuracy": round(phrase_accuracy(matched, true), 4),
            }
            trainer.log(
                stage=1,
                step=number,
                loss=round(answer_loss.item(), 4),
                **phrases_log,
                **tally([batch.clips], [answered]),
            )


@torch.no_grad()
def phrase_accuracy(logits: Tensor, true: Tensor) -> float:
    """Share of the frames that match their own phrase better than the phrase with one attribute changed.

    Args:
        logits: [N, P], P in pairs: a frame's own phrase and the changed one.
        true: [N, P], whether phrases are true; pairs whose changed phrase is also true are left out.
    """
    N, own = len(logits), torch.arange(len(logits), device=logits.device)
    pairs, both = (x.unflatten(1, (N, -1, 2))[own, own] for x in (logits, true))
    counted = both[..., 0] & ~both[..., 1]
    return float((pairs[..., 0] > pairs[..., 1])[counted].float().mean())


def train_on_clips(trainer: Trainer) -> None:
    """Stage 2."""
    args, rng = trainer.args, np.random.default_rng((trainer.args.seed, 3))
    optimizers = trainer.optimizers([trainer.decoder, trainer.llava.model.multi_modal_projector])

    def answer(batch: Clips, part: float) -> tuple[Tensor, Tensor]:
        frames, texts, labels = trainer.to_device(batch.frames, batch.texts, batch.labels)
        with trainer.autocast():
            with torch.no_grad():
                hidden = trainer.encode(frames.flatten(0, 1))
            return trainer.answers(hidden, texts, part, shuffled=False), labels

    def validate(step: int) -> None:
        for part in (1.0, *PARTS):
            with torch.no_grad():
                logits = [answer(batch, part)[0] for batch in validation]
            trainer.log(stage=2, step=step, validation=True, part=part, **tally(validation, logits))

    def batches(seed: int, lengths: tuple[int, ...], split: Split = "train") -> ClipBatches:
        return ClipBatches(trainer.tokenizer.to_str(), seed, lengths, split, frames_per_batch=args.batch)

    number = 0
    validation = list(stream(batches(0, (8, 16, 32, 16), "validation"), args.validation_batches, min(8, args.workers)))
    for phase, (share, lengths) in enumerate(CURRICULUM):
        make = batches(10 * args.seed + 1 + phase, lengths)
        for batch in stream(make, round(share * args.clip_steps), args.workers):
            part = PARTS[rng.integers(len(PARTS))] if rng.random() < args.thin else 1.0
            logits, labels = answer(batch, part)
            weights = torch.tensor([[WEIGHTS.get(kind, 1.0) for kind in kinds] for kinds in batch.types])
            loss = loss_of(logits, labels, *trainer.to_device(weights))
            trainer.step(loss, optimizers, number / args.clip_steps)
            if number % 100 == 0:
                about = {"frames": batch.frames.shape[1], "part": part, "loss": round(loss.item(), 4)}
                trainer.log(stage=2, step=number, **about, **tally([batch], [logits]))
            number += 1
        validate(number)


def tally(batches: Sequence[Clips], logits: Sequence[Tensor]) -> dict[str, Any]:
    """Share of completely correct answers, of all questions and of each type."""
    correct: dict[str, list[bool]] = {}
    for batch, found in zip(batches, logits, strict=True):
        labels = batch.labels.to(found.device)
        marks = ((found.argmax(-1) == labels) | (labels == IGNORED)).all(-1).tolist()
        for kinds, row in zip(batch.types, marks, strict=True):
            for kind, mark in zip(kinds, row, strict=True):
                correct.setdefault(kind, []).append(mark)
    types = {kind: round(sum(marks) / len(marks), 3) for kind, marks in sorted(correct.items())}
    return {"accuracy": round(sum(map(sum, correct.values())) / sum(map(len, correct.values())), 4), "types": types}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small LLaVA-OneVision on synthetic clips.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frame-steps", type=int, default=2000, help="steps of stage 1")
    parser.add_argument("--clip-steps", type=int, default=4400, help="steps of stage 2")
    parser.add_argument("--batch", type=int, default=256, help="frames of a batch")
    parser.add_argument("--validation-batches", type=int, default=8)
    parser.add_argument("--rate", type=float, default=7e-4, help="peak learning rate of AdamW")
    parser.add_argument("--matrix-rate", type=float, default=2e-3, help="peak learning rate of Muon")
    parser.add_argument("--thin", type=float, default=0.4, help="share of clips with only part of their tokens")
    parser.add_argument("--uneven", type=float, default=0.4, help="how unequal the parts of the frames are")
    parser.add_argument("--workers", type=int, default=14, help="processes that render")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the model")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan again for every length
    trainer = Trainer(args, Log(args.output / "training.jsonl"))
    train_on_frames(trainer)
    train_on_clips(trainer)
    save(args.output, trainer.llava, trainer.tower, trainer.tokenizer)
    trainer.log(done=True)


if __name__ == "__main__":
    main()
