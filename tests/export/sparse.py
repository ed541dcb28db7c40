"""Checkpoint files with true headers and no values: shapes of any size take no disk."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path


def write_sparse(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, width: int) -> None:
    """A safetensors file with a true header and a hole for its tensors, of so many bytes an element."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def write_shards(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, shards: int) -> None:
    """Sparse files of two bytes an element, with their index where there are several."""
    parts = [list(shapes)[i::shards] for i in range(shards)]
    index: dict[str, str] = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        write_sparse(folder / file, {name: shapes[name] for name in part}, dtype, 2)
        index |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
