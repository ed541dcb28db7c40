"""Trains a small LLaVA-OneVision on the synthetic world, from a seed.

    python models/tiny/train.py OUTPUT --seed 0

Stage 1 trains everything on single frames: the tower and its pooling head by SigLIP's sigmoid loss on phrases and, at the
same time, tower, projector and decoder on questions (as SigLIP 2, arXiv 2502.14786, adds a decoder to the sigmoid loss).
Stage 2 leaves the tower as it is and trains projector and decoder on questions about clips. OUTPUT gets llava/ and
siglip/, which `tango-export` reads, and training.jsonl.
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
from batches import IGNORED, ClipBatches, Clips, FrameBatches, holds, stream
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

#: Stage 2: share of its steps and frames of a clip, in turn. Short clips teach before and after, long ones to search.
CURRICULUM: tuple[tuple[float, tuple[int, ...]], ...] = ((0.5, (8, 16)), (0.5, (8, 16, 32, 16, 8, 16, 32, 64)))

#: Tokens of a frame.
TOKENS = POOLED_SIDE**2

#: Parts of the tokens that the decoder is shown where it is not shown all.
PARTS = (0.5, 0.25)

#: Weight of a question's loss in stage 2: what needs most to be learnt is asked but once of a clip.
WEIGHTS = {"times": 6.0, "count": 2.0}

#: Weight of the sigmoid loss, a sum over a thousand phrases, beside the loss of the answers.
SIGMOID_WEIGHT = 0.01


class Log:
    """A line of JSON for whatever is worth a point on a curve."""

    def __init__(self, file: Path) -> None:
        self._file, self._begin = file.open("w", encoding="utf-8"), time.perf_counter()

    def __call__(self, **values: Any) -> None:
        """Writes the values with the seconds since the beginning."""
        line = json.dumps({"seconds": round(time.perf_counter() - self._begin, 1), **values})
        print(line, flush=True)
        print(line, file=self._file, flush=True)


class Trainer:
    """A model in training and all that its two stages share."""

    def __init__(self, args: argparse.Namespace, log: Log) -> None:
        self.args, self.log = args, log
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = make_tokenizer(corpus())
        ids = [self.tokenizer.token_to_id(t) for t in (VIDEO, IMAGE, END)]
        self.siglip: Any = make_siglip(rows(self.tokenizer)).to(self.device)
        self.tower = self.siglip.vision_model
        self.llava: Any = make_llava(rows(self.tokenizer), *ids).to(self.device)
        self.llava.model.vision_tower = nn.Identity()  # the tower is SigLIP's until it is saved
        self.decoder = self.llava.model.language_model
        self.decoder.config._attn_implementation = "questions_behind_video"
        self._before = torch.tensor(self.tokenizer.encode(BEFORE).ids, device=self.device)
        self._look = torch.compile(patches, dynamic=False) if args.compile else patches
        if args.compile:
            for layer in self.decoder.layers:
                layer.compile()

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def look(self, frames: Tensor) -> Tensor:
        """[N, 384, 384, 3] uint8 → last hidden states [N, 729, width]."""
        return self._look(self.tower, frames)

    def answers(self, hidden: Tensor, texts: Tensor, part: float, shuffled: bool) -> Tensor:
        """Logits [B, Q, T, vocabulary], from hidden states [B·F, 729, width].

        Args:
            hidden: Of all frames.
            texts: [B, Q, T], what stands behind each video.
            part: How much of the tokens the decoder is shown: a random choice, of some frames more than of others, as
                any method leaves them that looks at what is in them.
            shuffled: The tokens come in no order, so that a token's place is read from its features. After pruning
                the order says little of it.
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
        """One step; the learning rate warms up over 3 % of a stage, stays, and falls to 0 over its last 40 %."""
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
        """The same on the device, copied while it works."""
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]


def with_other_ground(hidden: Tensor, near: Tensor) -> Tensor:
    """Hidden states [N, 729, width] of frames, those away from figures taken from another clip's frame where it has none there.

    A patch of ground then says nothing true of the frame's figures, so the tower does not learn to write them there. If it
    did, it would matter little which tokens are kept.

    Args:
        hidden: The frames of a clip stand side by side, at most four.
        near: [N, 729] bool, the patches of figures.
    """
    other = int(torch.randint(4, max(5, len(near) - 3), ()))
    taken = ~near & ~near.roll(other, 0)
    return torch.where(taken[..., None], hidden.roll(other, 0), hidden)


def loss_of(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross entropy of the answers' tokens; ``weights`` [B, Q] of the questions."""
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
            hidden = with_other_ground(trainer.look(frames.flatten(0, 1)), near)
            matched = siglip_logits(trainer.siglip, pooled(trainer.tower, hidden), phrases)
            answered = trainer.answers(hidden, texts, 1.0, shuffled=True)
        true = holds(facts, stated)
        sigmoid, told = siglip_loss(matched, true), loss_of(answered, labels)
        trainer.step(told + SIGMOID_WEIGHT * sigmoid, optimizers, number / args.frame_steps)
        if number % 100 == 0 or number == args.frame_steps - 1:
            right = {"sigmoid": round(sigmoid.item(), 2), "told_apart": round(told_apart(matched, true), 4)}
            trainer.log(stage=1, step=number, loss=round(told.item(), 4), **right, **tally([batch.clips], [answered]))


@torch.no_grad()
def told_apart(logits: Tensor, true: Tensor) -> float:
    """Share of the frames that lie nearer to their own phrase than to the same phrase with one thing changed.

    Args:
        logits: [N, P], of each frame's own phrases in turn with their changed ones.
        true: [N, P], which phrases hold: changed ones that hold as well are left out.
    """
    N, own = len(logits), torch.arange(len(logits), device=logits.device)
    pairs, holding = (x.unflatten(1, (N, -1, 2))[own, own] for x in (logits, true))
    counted = holding[..., 0] & ~holding[..., 1]
    return float((pairs[..., 0] > pairs[..., 1])[counted].float().mean())


def train_on_clips(trainer: Trainer) -> None:
    """Stage 2."""
    args, rng = trainer.args, np.random.default_rng((trainer.args.seed, 3))
    optimizers = trainer.optimizers([trainer.decoder, trainer.llava.model.multi_modal_projector])

    def answer(batch: Clips, part: float) -> tuple[Tensor, Tensor]:
        frames, texts, labels = trainer.to_device(batch.frames, batch.texts, batch.labels)
        with trainer.autocast():
            with torch.no_grad():
                hidden = trainer.look(frames.flatten(0, 1))
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
    """Share of the answers that are right to the last token, of all and of each type of question."""
    right: dict[str, list[bool]] = {}
    for batch, found in zip(batches, logits, strict=True):
        labels = batch.labels.to(found.device)
        marks = ((found.argmax(-1) == labels) | (labels == IGNORED)).all(-1).tolist()
        for kinds, row in zip(batch.types, marks, strict=True):
            for kind, mark in zip(kinds, row, strict=True):
                right.setdefault(kind, []).append(mark)
    types = {kind: round(sum(marks) / len(marks), 3) for kind, marks in sorted(right.items())}
    return {"accuracy": round(sum(map(sum, right.values())) / sum(map(len, right.values())), 4), "types": types}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small LLaVA-OneVision on the synthetic world.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frame-steps", type=int, default=2000, help="steps of stage 1")
    parser.add_argument("--clip-steps", type=int, default=4400, help="steps of stage 2")
    parser.add_argument("--batch", type=int, default=256, help="frames of a batch")
    parser.add_argument("--validation-batches", type=int, default=8)
    parser.add_argument("--rate", type=float, default=7e-4, help="AdamW's peak learning rate")
    parser.add_argument("--matrix-rate", type=float, default=2e-3, help="Muon's")
    parser.add_argument(
        "--thin", type=float, default=0.4, help="share of clips shown with a random part of their tokens"
    )
    parser.add_argument(
        "--uneven", type=float, default=0.4, help="how much more of some frames is shown than of others"
    )
    parser.add_argument("--workers", type=int, default=14, help="processes that render")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the model")
    args = parser.parse_args()
    args.output.mkdir(parents=True)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length
    trainer = Trainer(args, Log(args.output / "training.jsonl"))
    train_on_frames(trainer)
    train_on_clips(trainer)
    save(args.output, trainer.llava, trainer.tower, trainer.tokenizer)
    trainer.log(done=True)


if __name__ == "__main__":
    main()
