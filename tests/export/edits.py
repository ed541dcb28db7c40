"""Copies of the shared checkpoints to be changed, and the changes; graphs to be run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionForConditionalGeneration

from tango_runtime.bundle import Bundle

Array = NDArray[Any]


def copied(folders: tuple[Path, Path], to: Path) -> tuple[Path, Path]:
    llava, siglip = (Path(shutil.copytree(folder, to / folder.name)) for folder in folders)
    return llava, siglip


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)


def rename(folder: Path, old: str, new: str) -> None:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.startswith(old)]:
            weights[new + name.removeprefix(old)] = weights.pop(name)

    edit_weights(folder, edit)


@cache
def original(llava: Path, **options: Any) -> Any:
    """The checkpoint as transformers loads it, every weight of it and no other."""
    model, info = LlavaOnevisionForConditionalGeneration.from_pretrained(
        llava, **{"dtype": torch.float32, **options}, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert not set(info["missing_keys"]) - {"lm_head.weight"}
    return model.eval()


@cache
def session(graph: Path) -> Any:
    return onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])


def run(bundle: Path, graph: str, **inputs: Array) -> list[Array]:
    outputs: list[Array] = session(bundle / f"{graph}.onnx").run(None, inputs)
    return outputs


def frames(count: int, size: int = 112) -> Array:
    """[F, size, size, 3] uint8: noise on a gradient."""
    noise = np.random.default_rng(count).integers(0, 120, (count, size, size, 3))
    return (noise + np.linspace(0, 130, size)[:, None]).astype(np.uint8)


class Decoder:
    """The decoder graph and its cache of fixed capacity, which holds garbage where it is not filled."""

    def __init__(self, bundle: Path, capacity: int) -> None:
        self.bundle, self.length = bundle, 0
        spec = Bundle.load(bundle).manifest.graphs["decoder"]
        rng = np.random.default_rng(0)
        self.cache = {
            t.name: (rng.normal(size=(t.shape[0], capacity, t.shape[2])) * 1e3).astype(t.dtype) for t in spec.inputs[2:]
        }

    def step(self, embeddings: Array) -> Array:
        """Takes [N, D] more embeddings; gives the logits of the last."""
        end = self.length + len(embeddings)
        positions = np.arange(self.length, end, dtype=np.int64)
        logits, *rows = run(self.bundle, "decoder", embeddings=embeddings, positions=positions, **self.cache)
        for cached, new in zip(self.cache.values(), rows, strict=True):
            cached[:, self.length : end] = new[:, : cached.shape[1] - self.length]
        self.length = end
        return logits


def embed(bundle: Path, ids: Array) -> Array:
    return run(bundle, "embed", ids=ids)[0]


def logits(bundle: Path, ids: Array) -> Array:
    """Logits of the last position after one pass over an empty cache."""
    return Decoder(bundle, 0).step(embed(bundle, ids))


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Within ``tolerance`` of the largest expected magnitude."""
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
