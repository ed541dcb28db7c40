"""Small checkpoints and bundles, made once a session and shared by every room. Nobody writes into them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

#: Edge of a frame: 8×8 patches and 4×4 tokens are enough for most tests.
IMAGE = 112

# A shell lets what runs in its background ignore ctrl-C, and whatever that starts does so too; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """``checkpoint(layout="llava-hf", dtype=…, shards=…, outliers=…, **shape)``: the folders (llava, siglip)."""
    from examples.make_checkpoint import Shape, make

    @cache
    def made(
        layout: str = "llava-hf", *, dtype: Any = None, shards: int = 1, outliers: bool = True, **shape: Any
    ) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("checkpoint")
        dimensions = Shape(**{"image": IMAGE, **shape})
        return make(folder, layout, dimensions, dtype=dtype, shards=shards, outliers=outliers)

    return made


@pytest.fixture(scope="session")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., tuple[Path, Path]]
) -> Callable[..., Path]:
    """``bundle(layout="llava-hf", precision="fp16", fused=…, **of the checkpoint)``: the folder of a bundle of it."""
    from tango_export.export import Request, export

    @cache
    def made(layout: str = "llava-hf", precision: str = "fp16", fused: bool = False, **options: Any) -> Path:
        llava, siglip = checkpoint(layout, **options)
        output = tmp_path_factory.mktemp("bundle") / f"{layout}-{precision}"
        named = {"checkpoint": str(llava), "siglip": str(siglip)}
        return export(Request(**named, output=output, dtype=precision, fused=fused))

    return made
