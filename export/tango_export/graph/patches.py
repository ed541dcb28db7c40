"""The portable form of attention among the patches of a frame of any size, whole or in windows (Qwen2.5-VL's tower).

Patches stay in their order, row by row: a window gathers its own and gives them back. Of a tensor's sizes only those of
the frame are read, and integers made of them say which patch is where: every Reshape has numbers only. What each
function takes and returns: :class:`tango_export.graph.builder.Form`.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from tango_export.graph.builder import Biased, GraphBuilder, PatchGrid
from tango_export.graph.integers import Integers, integers
from tango_export.graph.portable import add_bias, attend, cos_sin, frequency_weight, rotate

#: Base of the rotary frequencies of a patch's row and column.
PATCH_THETA = 10000.0


def patch_pixels(g: GraphBuilder, frames: str, mean: str, deviation: str, size: int) -> tuple[str, str, str]:
    """In an order of a patch's pixels that takes reshapes of one open size only."""
    pixels = g.node("Cast", [frames], "pixels.fp32", to=TensorProto.FLOAT)
    along = (length_of(g, pixels, axis, f"{name}.pixels") for name, axis in (("rows", 2), ("columns", 3)))
    rows, columns = (g.node("Div", [x, g.constant(size)], x.removesuffix(".pixels")) for x in along)
    unit = g.node("Div", [pixels, g.constant(255.0, "float32")], "pixels.unit")
    scaled = g.node("Div", [g.node("Sub", [unit, mean], "pixels.centered"), deviation], "pixels.scaled")
    x = g.reshape(g.narrow(scaled, "pixels"), "patches.columns", 0, 0, 0, -1, size * 3)
    x = g.node("Transpose", [x], "patches.column_first", perm=[0, 1, 3, 2, 4])  # [F, S, C, H, size · 3]
    x = g.reshape(x, "patches.rows", 0, 0, 0, -1, size * size * 3)
    x = g.node("Transpose", [x], "patches", perm=[0, 3, 2, 1, 4])  # [F, R, C, S, size · size · 3]
    return rows, columns, x


def length_of(g: GraphBuilder, x: str, axis: int, name: str) -> str:
    """The length of an axis, an int64 scalar."""
    return g.node("Gather", [g.node("Shape", [x], f"{name}.shape"), g.constant(axis)], name, axis=0)


def patch_grid(g: GraphBuilder, rows: str, columns: str, window: int, head_dim: int) -> PatchGrid:
    """Its shared values: cosines and sines of the patches row by row, and of those of the windows one after the other;
    which patch each of the latter is, and where among them each patch is; what a window's queries may attend to.

    Windows are all alike: where the grid ends inside of one, its last patches stand in for those that are not there,
    and no query attends to them.
    """
    area = window**2
    R, C = integers(g, "grid", rows, columns)
    patch = (R * C).range()
    row, column = patch // C, patch % C
    down, across = (R + window - 1) // window, (C + window - 1) // window
    place = (down * across * area).range()  # among the patches of all windows
    which, inside = place // area, place % area
    r, c = which // across * window + inside // window, which % across * window + inside % window
    clamped = r.least(R - 1), c.least(C - 1)
    order = clamped[0] * C + clamped[1]
    back = (row // window * across + column // window) * area + row % window * window + column % window
    there = g.node("And", [r.below(R), c.below(C)], "windows.there")
    values = (g.constant(value, "float32") for value in (0.0, float(np.finfo(np.float32).min)))
    mask = g.reshape(g.node("Where", [there, *values], "windows.masked"), "windows.mask", 1, -1, 1, 1, area)
    whole = _patch_angles(g, "grid", row, column, head_dim)
    windows = _patch_angles(g, "windows", *clamped, head_dim)
    windows = [g.reshape(x, f"{x}.each", -1, area, 1, head_dim) for x in windows]
    return PatchGrid(rows, columns, window, (*whole, *windows, order.name, back.name, mask))


def patch_query_key(
    g: GraphBuilder, name: str, qkv: Biased, grid: PatchGrid, heads: int, head_dim: int
) -> tuple[str, str]:
    cos, sin, *_ = grid.shared
    packed = g.reshape(add_bias(g, qkv), f"{name}.heads", 0, -1, 3 * heads, head_dim)
    query_key = g.slice(packed, f"{name}.query_key", axis=2, end=2 * heads)
    rotated = rotate(g, name, query_key, cos, sin, head_dim, axis=3)
    query = g.slice(rotated, f"{name}.queries", axis=2, end=heads)
    return query, g.slice(rotated, f"{name}.keys", axis=2, begin=heads)


def patch_attention(
    g: GraphBuilder, name: str, qkv: Biased, grid: PatchGrid, heads: int, head_dim: int, windowed: bool
) -> str:
    cos, sin, window_cos, window_sin, order, back, mask = grid.shared
    packed, shape = add_bias(g, qkv), (0, 1, -1)
    if windowed:
        packed, shape = g.node("Gather", [packed, order], f"{name}.windows", axis=1), (0, -1, grid.window**2)
        cos, sin = window_cos, window_sin
    packed = g.reshape(packed, f"{name}.heads", *shape, 3 * heads, head_dim)  # [F, windows, patches, heads, head_dim]
    query_key = g.slice(packed, f"{name}.query_key", axis=3, end=2 * heads)
    rotated = rotate(g, name, query_key, cos, sin, head_dim, axis=4)
    parts = {
        "query": g.slice(rotated, f"{name}.query.slice", axis=3, end=heads),  # fp32
        "key": g.narrow(g.slice(rotated, f"{name}.key.slice", axis=3, begin=heads), f"{name}.key.narrow"),
        "value": g.slice(packed, f"{name}.value.slice", axis=3, begin=2 * heads),
    }
    query, key, value = (g.node("Transpose", [x], f"{name}.{part}", perm=[0, 1, 3, 2, 4]) for part, x in parts.items())
    mixed = attend(g, name, query, key, value, head_dim, mask if windowed else None, axes=5)
    mixed = g.node("Transpose", [mixed], f"{name}.transposed", perm=[0, 1, 3, 2, 4])
    mixed = g.reshape(mixed, f"{name}.merged" if windowed else name, 0, -1, heads * head_dim)
    return g.node("Gather", [mixed, back], name, axis=1) if windowed else mixed


def _patch_angles(g: GraphBuilder, name: str, row: Integers, column: Integers, head_dim: int) -> list[str]:
    """Cosines and sines [T, 1, head_dim] fp32 of patches at rows and columns [T]."""
    return list(cos_sin(g, name, patch_angles(g, name, row, column, head_dim)))


def patch_angles(g: GraphBuilder, name: str, row: Integers, column: Integers, head_dim: int) -> str:
    """Rotary angles [T, head_dim / 2] fp32 of patches at rows and columns [T]: half of the frequencies turn by the row,
    the others, which are the same, by the column."""
    frequencies = frequency_weight(g, "grid.inv_freq", PATCH_THETA, head_dim // 2)
    angles = []
    for kind, place in (("row", row), ("column", column)):
        wide = g.node("Cast", [place.name], f"{name}.{kind}.fp32", to=TensorProto.FLOAT)
        wide = g.node("Unsqueeze", [wide, g.constant([1])], f"{name}.{kind}.each_frequency")
        angles.append(g.node("Mul", [wide, frequencies], f"{name}.{kind}.angles"))
    return g.node("Concat", angles, f"{name}.angles", axis=-1)
