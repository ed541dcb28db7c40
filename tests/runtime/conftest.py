"""Small checkpoints, their bundles and a clip, each made once a session."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A function: makes a small talkative checkpoint and a bundle of it → (checkpoint's folder, bundle's folder)."""
    from examples.make_checkpoint import Shape, make
    from tango_export.export import Request, export

    @cache
    def make_and_export(layout="llava-hf", tied=True, outliers=False, seed=0, dtype="fp32", context=2048):
        root = tmp_path_factory.mktemp("exported")
        llava, siglip = make(root, layout, Shape(tied=tied), seed=seed, outliers=outliers)
        _make_talkative(llava)
        request = Request(
            checkpoint=str(llava), siglip=str(siglip), output=root / "bundle", dtype=dtype, frames=4, context=context
        )
        return llava, export(request)

    return make_and_export


def _make_talkative(llava):
    """Rescales a random decoder so that its answers depend on the video, the question and all that was said.

    As they are made, random weights answer with one token for ever: the mean over hundreds of positions, and with
    outliers a constant of the value biases, drown everything else. So attention is sharpened, its output loses what is
    the same for all tokens, the layers speak up against the residual, and all tokens are as likely but the stop tokens.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(llava / "tokenizer.json"))
    stop = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    file = llava / "model.safetensors"
    weights = {name: weight.float() for name, weight in load_file(file).items()}
    for name, weight in weights.items():
        if name.endswith((".q_proj.weight", ".k_proj.weight")) and "tower" not in name:
            weight *= 3
        elif name.endswith(".down_proj.weight"):
            weight *= 16
        elif name.endswith(".o_proj.weight"):
            quiet = weight.abs().amax(1) < 3  # all rows but a planted outlier's
            weight[quiet] = 16 * (weight[quiet] - weight[quiet].mean(1, keepdim=True))
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weight *= (2 if "embed" in name else 1) * weight[0].norm() / weight.norm(dim=1, keepdim=True)
            weight[stop] *= 0.01
    save_file({name: weight.to(torch.float16) for name, weight in weights.items()}, file, {"format": "pt"})


@pytest.fixture(scope="session")
def bundle(exported):
    """An fp32 bundle of 4 frames and 2048 positions."""
    return exported()[1]


@pytest.fixture(scope="session")
def llm(bundle):
    from tango_runtime import VideoLLM

    return VideoLLM(bundle)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A video file: 8 seconds, two scenes."""
    from examples.make_video import write

    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write(path)
    return path


@pytest.fixture
def frames():
    """uint8 [8, 36, 64, 3]: a bright block wanders over noise that changes after the fifth frame."""
    rng = np.random.default_rng(0)
    scenes = rng.integers(0, 120, (2, 36, 64, 3), dtype=np.uint8)
    video = scenes[[0, 0, 0, 0, 0, 1, 1, 1]].copy()
    for i, frame in enumerate(video):
        frame[10:20, 6 * i : 6 * i + 10] = (230, 60, 40)
    return video
