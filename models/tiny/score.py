"""Evaluates trained checkpoints on a GPU with the clips, methods and scores of `tango evaluate`.

    python models/tiny/score.py OUTPUT CHECKPOINT [CHECKPOINT …] --jobs 16

A checkpoint is a folder that train.py wrote, or the results.json of an earlier evaluation with the same options.
Its results are written to OUTPUT/<its name>, those of all checkpoints to OUTPUT/all.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from network import SIZE, answer_logits, patches, project, salience
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlavaOnevisionForConditionalGeneration, SiglipVisionConfig, SiglipVisionModel
from vocabulary import AFTER, BEFORE, END, PAD

from tango_calibration.data.dataset import synthetic
from tango_calibration.data.synthetic import Split
from tango_calibration.evaluation import methods, results
from tango_calibration.evaluation.evaluate import Record, evaluate_in_parallel, trials_of
from tango_calibration.evaluation.scores import Scores, combine
from tango_plugins import PruneParams
from tango_runtime.util.console import progress
from tango_runtime.util.files import check_output
from tango_runtime.video import Clock, FrameStream, Source, sample
from tango_runtime.video.shape import ClipShape

#: Frames in one pass of the tower.
CHUNK = 64


class TorchEvaluator:
    """Evaluates a trained checkpoint in PyTorch, under fp16 autocast on a GPU.

    Args:
        folder: A folder that train.py wrote.
        device: A PyTorch device such as ``cuda:0``.
        max_new_tokens: Maximum length of an answer.
    """

    def __init__(self, folder: Path, device: str, max_new_tokens: int = 6) -> None:
        torch.set_num_threads(1)
        self._device, self._max_new_tokens = torch.device(device), max_new_tokens
        self._model: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(folder / "llava", dtype=torch.float32)
        self._model.to(self._device).eval()
        self._model.model.language_model.config._attn_implementation = "questions_after_video"
        self._tower = self._salient_tower(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / "llava" / "tokenizer.json"))
        self._before = torch.tensor(self._tokenizer.encode(BEFORE).ids, device=self._device)
        self._autocast = partial(torch.autocast, self._device.type, torch.float16, enabled=self._device.type == "cuda")

    def _salient_tower(self, folder: Path) -> Any:
        """The tower of LLaVA with the pooling head of SigLIP."""
        config = SiglipVisionConfig.from_dict({**self._model.config.vision_config.to_dict(), "vision_use_head": True})
        tower = SiglipVisionModel(config)
        head = {
            name.removeprefix("vision_model."): t.float()
            for name, t in load_file(folder / "siglip" / "model.safetensors").items()
        }
        tower.load_state_dict(
            {**self._model.model.vision_tower.state_dict(), **{n: t for n, t in head.items() if n.startswith("head.")}}
        )
        return tower.to(self._device).eval()

    def __str__(self) -> str:
        return f"PyTorch {torch.__version__}, {self._device}"

    def open_video(self, source: Source, frames: int) -> tuple[FrameStream, ClipShape]:
        """The sampled frames of a video, and what they become."""
        return sample(source, frames), ClipShape(frames, (SIZE, SIZE), 1, (14, 14))

    @torch.inference_mode()
    def encode_video(self, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """[F, 384, 384, 3] → features [F, 196, width] and salience [F, 196]."""
        features, salient = [], []
        for part in torch.from_numpy(frames).split(CHUNK):
            with self._autocast():
                hidden = patches(self._tower, part.to(self._device))
                features.append(project(self._model.model.multi_modal_projector, hidden))
            salient.append(salience(self._tower, hidden.float()))
        return torch.cat(features).half().cpu().numpy(), torch.cat(salient).cpu().numpy()

    @torch.inference_mode()
    def answer(
        self, kept: methods.Selection, shape: ClipShape, clock: Clock, questions: Sequence[str]
    ) -> tuple[list[str], float]:
        """Greedy answers to questions about one video, and the milliseconds until the first tokens; no prompt has times."""
        video = torch.from_numpy(kept.tokens).to(self._device)[None].float()
        asked = [self._tokenizer.encode(f"\n{question}{AFTER}").ids for question in questions]
        pad, end = (self._tokenizer.token_to_id(t) for t in (PAD, END))
        given: list[list[int]] = [[] for _ in questions]
        begin, first = time.perf_counter(), 0.0  # of all questions together: the video has no prefill of its own
        for _ in range(self._max_new_tokens):
            longest = max(len(a) + len(g) for a, g in zip(asked, given, strict=True))
            texts = [a + g + [pad] * (longest - len(a) - len(g)) for a, g in zip(asked, given, strict=True)]
            with self._autocast():
                logits = answer_logits(self._model, video, self._before, torch.tensor([texts], device=self._device))[0]
            ends = torch.tensor([len(a) + len(g) - 1 for a, g in zip(asked, given, strict=True)], device=self._device)
            chosen = logits[torch.arange(len(asked), device=self._device), ends].argmax(-1).tolist()
            first = first or 1e3 * (time.perf_counter() - begin)
            for ids, token in zip(given, chosen, strict=True):
                if end not in ids:
                    ids.append(token)
            if all(end in ids for ids in given):
                break
        return [self._tokenizer.decode(ids[: ids.index(end)] if end in ids else ids) for ids in given], first


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate trained checkpoints on a GPU.")
    parser.add_argument("output", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--videos", type=int, default=280)
    parser.add_argument("--questions", type=int, default=16, help="maximum number of questions about one clip")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clips and of random methods")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--retention-ratio", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2])
    parser.add_argument("--method", nargs="+", default=list(methods.METHODS))
    parser.add_argument("--jobs", type=int, default=16)
    args = parser.parse_args()
    results.require_matplotlib()  # now rather than after hours of work
    fresh = [checkpoint.name for checkpoint in args.checkpoints if not checkpoint.is_file()]
    for name in fresh + ["all"] * (len(args.checkpoints) > 1):
        check_output(args.output / name, holding=results.RESULTS, overwrite=False)
    params = PruneParams(sink_positions=())
    split: Split = args.split
    videos = synthetic(args.videos, seed=args.seed, questions=args.questions, split=split)
    videos.sort(key=lambda video: -video.frames)  # long ones first, so that no process ends with one alone
    trials = trials_of(args.method, args.retention_ratio)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    conditions = {
        "data": f"synthetic, split {args.split}, seed {args.seed}, clips of 8 to 64 frames",
        "videos": len(videos),
        "questions": sum(len(video.questions) for video in videos),
        "parameters of tango": asdict(params),
    }
    here = f"PyTorch {torch.__version__}, {device}, {'fp16 autocast' if device == 'cuda' else 'fp32'}"
    found: list[tuple[str, Scores, list[Record]]] = []
    runs = []
    for checkpoint in args.checkpoints:
        if checkpoint.is_file():
            runs.append(results.read(checkpoint))
            continue
        with progress(checkpoint.name, len(videos)) as on_progress:
            evaluator = partial(TorchEvaluator, checkpoint, device)
            runs.append(
                evaluate_in_parallel(evaluator, videos, trials, params, on_progress, jobs=args.jobs, seed=args.seed)
            )
        found.append((checkpoint.name, Scores(runs[-1]), runs[-1]))
    if len(runs) > 1:
        found.append(("all", Scores.of_runs(runs), combine(runs)))
    models = [model_of(checkpoint) if checkpoint.is_file() else here for checkpoint in args.checkpoints]
    for name, scores, records in found:
        summaries = [scores.summary(trial) for trial in trials]
        print("\n".join([f"# {name}", *results.overall(summaries)]))
        model = ", ".join(dict.fromkeys(models)) if name == "all" else here
        results.write(
            args.output / name, {**conditions, "model": model, "checkpoint": name}, videos, records, summaries
        )


def model_of(file: Path) -> str:
    """The model of a results.json."""
    return str(json.loads(file.read_text(encoding="utf-8"))["conditions"]["model"])


if __name__ == "__main__":
    main()
