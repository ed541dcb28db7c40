"""What do tokens know about figures elsewhere? Accuracy from the parts of a frame without figures.

    python models/tiny/locality.py CHECKPOINT [CHECKPOINT …]

Methods that choose tokens differ only if a token describes its own place. Uses clips of the validation split.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from batches import near_figures
from network import pool
from numpy.typing import NDArray
from score import TorchEvaluator

from tango_calibration.data.judging import is_correct
from tango_calibration.data.synthetic import Clip, make_clip
from tango_calibration.evaluation.methods import Selection
from tango_runtime.video import Clock
from tango_runtime.video.shape import ClipShape


def tokens_near_figures(clip: Clip) -> NDArray[np.bool_]:
    """Tokens [F·196] with a patch that has a figure or is next to one."""
    near = np.stack([near_figures(clip, i) for i in range(len(clip.seconds))])
    found: NDArray[np.bool_] = (pool(torch.from_numpy(near).float()[..., None]) > 0).numpy().ravel()
    return found


def parts(near: NDArray[np.bool_], rng: np.random.Generator) -> dict[str, NDArray[np.bool_]]:
    """The tokens [F·196] of each row of the table."""
    tenth = np.zeros_like(near)
    tenth[rng.permutation(np.flatnonzero(~near))[: round(0.1 * near.size)]] = True
    return {"all": np.ones_like(near), "figures": near, "background": ~near, "a tenth, of the background": tenth}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure accuracy from tokens with and without figures.")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--clips", type=int, default=40)
    args = parser.parse_args()
    for checkpoint in args.checkpoints:
        evaluator = TorchEvaluator(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
        correct: dict[str, list[bool]] = defaultdict(list)
        shares: dict[str, list[float]] = defaultdict(list)
        for seed in range(args.clips):
            clip, rng = make_clip(seed, "validation", (16, 8)[seed % 2]), np.random.default_rng((seed, 2))
            questions = clip.questions(rng, 16)
            features, _ = evaluator.encode_video(clip.render())
            for name, part in parts(tokens_near_figures(clip), rng).items():
                kept = Selection(features.reshape(len(part), -1)[part], np.flatnonzero(part).astype(np.int32))
                shape, clock = ClipShape(len(features), (384, 384), 1, (14, 14)), Clock(np.zeros(0), None)
                answers, _ = evaluator.answer(kept, shape, clock, [q.text for q in questions])
                correct[name] += [is_correct(q, answer) for q, answer in zip(questions, answers, strict=True)]
                shares[name].append(float(part.mean()))
        print(f"{checkpoint}: {len(correct['all'])} questions")
        for name, marks in correct.items():
            print(
                f"  {name:<28}{100 * np.mean(shares[name]):6.1f} % of the tokens{100 * np.mean(marks):8.1f} % correct"
            )


if __name__ == "__main__":
    main()
