"""The device form of attention among the patches of a frame of any size, whole or in windows (Qwen2.5-VL's tower).

Patches stay row by row, and the operator for windows reads the grid from the shape of its input. What each function
takes and returns: :class:`tango_export.graph.builder.Form`.
"""

from __future__ import annotations

from tango_export.graph import patches
from tango_export.graph.builder import Biased, GraphBuilder, PatchGrid
from tango_export.graph.device import bias_of, operator
from tango_export.graph.integers import integers


def patch_pixels(g: GraphBuilder, frames: str, mean: str, deviation: str, size: int) -> tuple[str, str, str]:
    if g.dtype == "float32":
        return patches.patch_pixels(g, frames, mean, deviation, size)
    cut = operator(g, "Patches", [frames, mean, deviation], "patches", size=size)  # [F, R, C, S, size, 3 size]
    return patches.length_of(g, cut, 1, "rows"), patches.length_of(g, cut, 2, "columns"), cut


def patch_grid(g: GraphBuilder, rows: str, columns: str, window: int, head_dim: int) -> PatchGrid:
    """Its shared values: cosines and sines [R·C, head_dim / 2] fp32, and the grid as a shape, [2] int64."""
    R, C = integers(g, "grid", rows, columns)
    patch = (R * C).range()
    angles = patches.patch_angles(g, "grid", patch // C, patch % C, head_dim)
    turns = [g.node(kind, [angles], f"grid.{kind.lower()}") for kind in ("Cos", "Sin")]
    lengths = [g.node("Unsqueeze", [x.name, g.constant([0])], f"{x.name}.length") for x in (R, C)]
    return PatchGrid(rows, columns, window, (*turns, g.node("Concat", lengths, "grid.shape", axis=0)))


def patch_query_key(
    g: GraphBuilder, name: str, qkv: Biased, grid: PatchGrid, heads: int, head_dim: int
) -> tuple[str, str]:
    cos, sin, _ = grid.shared
    rotated = f"{name}.queries.rows", f"{name}.keys.rows"
    operator(g, "RotateQueryKey", [qkv.value, bias_of(qkv), cos, sin], *rotated, num_heads=heads)
    query, key = (g.reshape(x, x.removesuffix(".rows"), 0, -1, heads, head_dim) for x in rotated)
    return query, key


def patch_attention(
    g: GraphBuilder, name: str, qkv: Biased, grid: PatchGrid, heads: int, head_dim: int, windowed: bool
) -> str:
    cos, sin, shape = grid.shared
    inputs = [qkv.value, bias_of(qkv), cos, sin]
    if not windowed:
        rotated = f"{name}.query", f"{name}.key"
        operator(g, "RotatePatches", inputs, *rotated, num_heads=heads)
        return operator(g, "FrameAttention", [*rotated, *inputs[:2]], name, num_heads=heads)
    if not g.has("grid.qkv"):
        ends = g.constant([0]), g.constant([3 * heads * head_dim])
        g.node("Concat", [ends[0], shape, ends[1]], "grid.qkv", axis=0)
    rows = g.node("Reshape", [qkv.value, "grid.qkv"], f"{name}.grid")  # [F, R, C, 3 D]
    mixed = operator(g, "WindowAttention", [rows, *inputs[1:]], f"{name}.mixed", num_heads=heads, window=grid.window)
    return g.reshape(mixed, name, 0, -1, heads * head_dim)
