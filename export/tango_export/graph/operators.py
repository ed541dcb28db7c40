"""The operators of the device form, as ONNX functions: what each takes and computes, in standard operators.

A graph carries the function of every operator that it uses (domain ``tango``), so that it also runs where the CUDA
library is not: slowly, and in more memory. Where the library is, a runtime takes its kernels instead
(plugins/tango_plugins/native/adapters).

F is the number of frames, T of tokens in a pass, D the width, H the heads, G the heads of the cache, d the width of a
head, P the capacity of the cache, K and N the widths of a linear layer's input and result. Activations are fp16, the
weights of norms fp32. Whatever may not overflow or lose bits is computed in fp32 and rounded once, as the kernels do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from onnx import FunctionProto, parser

from tango_plugins import op

#: The opset of graphs with FP8: the first that has it. The parser of TensorRT 10.0 reads up to 20.
FP8_OPSET = 19

#: x [..., D], bias [D] → [..., D].
_BIAS = """
Bias (x, bias) => (y) {
    y = Add (x, bias)
}
"""

#: The exact GELU of x + bias, x [..., D], bias [D] → [..., D].
_BIAS_GELU = """
BiasGelu (x, bias) => (y) {
    biased = Add (x, bias)
    u = Cast <to = 1> (biased)
    half = Constant <value = float {0.5}> ()
    one = Constant <value = float {1.0}> ()
    root = Constant <value = float {0.70710678118654752}> ()
    scaled = Mul (u, root)
    erf = Erf (scaled)
    share = Add (erf, one)
    twice = Mul (u, share)
    wide = Mul (twice, half)
    y = CastLike (wide, x)
}
"""

#: From u in fp32 to its GELU, ``wide``, in the tanh form.
_FAST_GELU = """    half = Constant <value = float {0.5}> ()
    one = Constant <value = float {1.0}> ()
    root = Constant <value = float {0.79788456080286536}> ()
    cubic = Constant <value = float {0.044715}> ()
    square = Mul (u, u)
    cube = Mul (square, u)
    bent = Mul (cube, cubic)
    sum = Add (u, bent)
    inner = Mul (sum, root)
    tanh = Tanh (inner)
    share = Add (tanh, one)
    twice = Mul (u, share)
    wide = Mul (twice, half)"""

#: As BiasGelu, with the tanh approximation.
_BIAS_FAST_GELU = f"""
BiasFastGelu (x, bias) => (y) {{
    biased = Add (x, bias)
    u = Cast <to = 1> (biased)
{_FAST_GELU}
    y = CastLike (wide, x)
}}
"""

#: silu(gate) · up, all of one shape.
_SWIGLU = """
SwiGLU (gate, up) => (y) {
    g = Cast <to = 1> (gate)
    u = Cast <to = 1> (up)
    sigmoid = Sigmoid (g)
    silu = Mul (g, sigmoid)
    wide = Mul (silu, u)
    y = CastLike (wide, gate)
}
"""

#: silu(gate + gate_bias) · (up + up_bias) · scale, gate and up of one shape [..., D], the biases [D].
_BIAS_SWIGLU = """
BiasSwiGLU <scale> (gate, gate_bias, up, up_bias) => (y) {
    biased_gate = Add (gate, gate_bias)
    biased_up = Add (up, up_bias)
    g = Cast <to = 1> (biased_gate)
    u = Cast <to = 1> (biased_up)
    factor = Constant <value_float: float = @scale> ()
    sigmoid = Sigmoid (g)
    silu = Mul (g, sigmoid)
    product = Mul (silu, u)
    wide = Mul (product, factor)
    y = CastLike (wide, gate)
}
"""

#: x [..., D], weight and bias [D] fp32 → [..., D].
_LAYER_NORM = """
LayerNorm <epsilon> (x, weight, bias) => (y) {
    wide = Cast <to = 1> (x)
    normed = LayerNormalization <axis = -1, epsilon: float = @epsilon> (wide, weight, bias)
    y = CastLike (normed, x)
}
"""

#: The norm of sum = residual + (branch + branch_bias); residual and sum are of one type, branch and y of one.
_ADD_LAYER_NORM = """
AddLayerNorm <epsilon> (residual, branch, branch_bias, weight, bias) => (y, sum) {
    r = Cast <to = 1> (residual)
    b = Cast <to = 1> (branch)
    c = Cast <to = 1> (branch_bias)
    biased = Add (b, c)
    added = Add (r, biased)
    sum = CastLike (added, residual)
    wide = Cast <to = 1> (sum)
    normed = LayerNormalization <axis = -1, epsilon: float = @epsilon> (wide, weight, bias)
    y = CastLike (normed, branch)
}
"""

#: From wide, fp32, to scaled.
_RMS_STEPS = """
    square = Mul (wide, wide)
    mean = ReduceMean <axes = [-1], keepdims = 1> (square)
    eps = Constant <value_float: float = @epsilon> ()
    variance = Add (mean, eps)
    root = Sqrt (variance)
    normed = Div (wide, root)
    scaled = Mul (normed, weight)
"""

#: x [..., D], weight [D] fp32 → [..., D].
_RMS_NORM = f"""
RMSNorm <epsilon> (x, weight) => (y) {{
    wide = Cast <to = 1> (x)
{_RMS_STEPS}
    y = CastLike (scaled, x)
}}
"""

#: The norm of sum = residual + branch; residual and sum are of one type, branch and y of one.
_ADD_RMS_NORM = f"""
AddRMSNorm <epsilon> (residual, branch, weight) => (y, sum) {{
    r = Cast <to = 1> (residual)
    b = Cast <to = 1> (branch)
    added = Add (r, b)
    sum = CastLike (added, residual)
    wide = Cast <to = 1> (sum)
{_RMS_STEPS}
    y = CastLike (scaled, branch)
}}
"""

#: x [..., D] fp32, weight [D] fp32 → [..., D] fp16.
_WIDE_RMS_NORM = f"""
WideRMSNorm <epsilon> (wide, weight) => (y) {{
{_RMS_STEPS}
    y = Cast <to = 10> (scaled)
}}
"""

#: The norm, in fp16, of sum = residual + (scale · branch + bias); residual and sum are fp32.
_ADD_WIDE_RMS_NORM = f"""
AddWideRMSNorm <epsilon, scale> (residual, branch, bias, weight) => (y, sum) {{
    b = Cast <to = 1> (branch)
    c = Cast <to = 1> (bias)
    factor = Constant <value_float: float = @scale> ()
    times = Mul (b, factor)
    biased = Add (times, c)
    sum = Add (residual, biased)
    wide = Identity (sum)
{_RMS_STEPS}
    y = Cast <to = 10> (scaled)
}}
"""

#: Attention among the tokens of each frame: qkv [F, T, 3·H·d], query, key and value of a token one after the other;
#: bias [3·H·d] → [F, T, H·d].
_VISION_ATTENTION = """
VisionAttention <num_heads> (qkv, bias) => (y) {
    biased = Add (qkv, bias)
    same = Constant <value_ints = [0, 0, 3]> ()
    heads = Constant <value_int: int = @num_heads> ()
    first = Constant <value_ints = [0]> ()
    heads_1 = Unsqueeze (heads, first)
    rest = Constant <value_ints = [-1]> ()
    split = Concat <axis = 0> (same, heads_1, rest)
    parts = Reshape (biased, split)
    turned = Transpose <perm = [2, 0, 3, 1, 4]> (parts)
    query, key, value = Split <axis = 0> (turned)
    q = Cast <to = 1> (query)
    k = Cast <to = 1> (key)
    width = Shape <start = -1> (key)
    width_fp32 = Cast <to = 1> (width)
    root = Sqrt (width_fp32)
    scaled = Div (q, root)
    columns = Transpose <perm = [0, 1, 2, 4, 3]> (k)
    scores = MatMul (scaled, columns)
    softmax = Softmax <axis = -1> (scores)
    shares = CastLike (softmax, qkv)
    mixed = MatMul (shares, value)
    rows = Transpose <perm = [1, 3, 0, 2, 4]> (mixed)
    flat = Constant <value_ints = [0, 0, -1]> ()
    y = Reshape (rows, flat)
}
"""

#: Pixels uint8 [F, S, H, W, 3], and mean and deviation of their channels [3] fp32 → normalized patches of size² pixels
#: in S steps, [F, H / size, W / size, S, size, 3·size] fp16.
_PATCHES = """
Patches <size> (pixels, mean, deviation) => (patches) {
    wide = Cast <to = 1> (pixels)
    most = Constant <value = float {255.0}> ()
    unit = Div (wide, most)
    centered = Sub (unit, mean)
    scaled = Div (centered, deviation)
    narrow = Cast <to = 10> (scaled)
    frames = Shape <start = 0, end = 2> (pixels)
    rows = Shape <start = 2, end = 3> (pixels)
    columns = Shape <start = 3, end = 4> (pixels)
    channels = Shape <start = 4> (pixels)
    first = Constant <value_ints = [0]> ()
    edge_0 = Constant <value_int: int = @size> ()
    edge = Unsqueeze (edge_0, first)
    down = Div (rows, edge)
    across = Div (columns, edge)
    width = Mul (edge, channels)
    split = Concat <axis = 0> (frames, down, edge, across, width)
    parts = Reshape (narrow, split)
    patches = Transpose <perm = [0, 2, 4, 1, 3, 5]> (parts)
}
"""

#: Patches' queries and keys with their bias, rotated by the half-split rule: qkv [F, T, 3·H·d], query, key and value of
#: a patch one after the other; bias [3·H·d]; cosines and sines of each patch's angles [T, d / 2] fp32. From these to
#: query and key, [F, T, H, d] fp32 each, and value [F, T, H·d].
_ROTATION_STEPS = """
    biased = Add (qkv, bias)
    same = Constant <value_ints = [0, 0]> ()
    first = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    heads_0 = Constant <value_int: int = @num_heads> ()
    heads = Unsqueeze (heads_0, first)
    query_rows, key_rows, value = Split <axis = 2> (biased)
    split = Concat <axis = 0> (same, heads, rest)
    query_heads = Reshape (query_rows, split)
    key_heads = Reshape (key_rows, split)
    both = Concat <axis = 2> (query_heads, key_heads)
    wide = Cast <to = 1> (both)
    low, high = Split <axis = 3> (wide)
    one = Constant <value_ints = [1]> ()
    c = Unsqueeze (cosines, one)
    s = Unsqueeze (sines, one)
    low_c = Mul (low, c)
    high_s = Mul (high, s)
    high_c = Mul (high, c)
    low_s = Mul (low, s)
    low_rotated = Sub (low_c, high_s)
    high_rotated = Add (high_c, low_s)
    rotated = Concat <axis = 3> (low_rotated, high_rotated)
    query, key = Split <axis = 2> (rotated)
    flat = Constant <value_ints = [0, 0, -1]> ()
"""

#: → rotated queries and keys, [F, T, H·d] each.
_ROTATE_PATCHES = f"""
RotatePatches <num_heads> (qkv, bias, cosines, sines) => (query_narrow, key_narrow) {{
{_ROTATION_STEPS}
    query_flat = Reshape (query, flat)
    key_flat = Reshape (key, flat)
    query_narrow = CastLike (query_flat, qkv)
    key_narrow = CastLike (key_flat, qkv)
}}
"""

#: → the same, [F, T, H·d] fp32 each.
_ROTATE_QUERY_KEY = f"""
RotateQueryKey <num_heads> (qkv, bias, cosines, sines) => (query_flat, key_flat) {{
{_ROTATION_STEPS}
    query_flat = Reshape (query, flat)
    key_flat = Reshape (key, flat)
}}
"""

#: From rotated queries and keys [F, T, H, d] to scores [F, H, T, T] fp32.
_SCORE_STEPS = """
    query_turned = Transpose <perm = [0, 2, 1, 3]> (query_narrow)
    key_turned = Transpose <perm = [0, 2, 3, 1]> (key_narrow)
    q = Cast <to = 1> (query_turned)
    k = Cast <to = 1> (key_turned)
    width = Shape <start = -1> (query_narrow)
    width_fp32 = Cast <to = 1> (width)
    root = Sqrt (width_fp32)
    scaled = Div (q, root)
    scores = MatMul (scaled, k)
"""

#: From masked scores and values [F, T, H·d] to their means, [F, T, H, d].
_MEAN_STEPS = """
    softmax = Softmax <axis = -1> (masked)
    shares = CastLike (softmax, qkv)
    value_heads = Reshape (value, split)
    value_turned = Transpose <perm = [0, 2, 1, 3]> (value_heads)
    mixed = MatMul (shares, value_turned)
    mean = Transpose <perm = [0, 2, 1, 3]> (mixed)
"""

#: Attention among the patches of each frame: rotated queries and keys, [F, T, H·d] each; qkv [F, T, 3·H·d] and its bias
#: [3·H·d], of which the values are read → [F, T, H·d].
_FRAME_ATTENTION = f"""
FrameAttention <num_heads> (query, key, qkv, bias) => (y) {{
    biased = Add (qkv, bias)
    query_before, key_before, value = Split <axis = 2> (biased)
    same = Constant <value_ints = [0, 0]> ()
    first = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    heads_0 = Constant <value_int: int = @num_heads> ()
    heads = Unsqueeze (heads_0, first)
    split = Concat <axis = 0> (same, heads, rest)
    query_narrow = Reshape (query, split)
    key_narrow = Reshape (key, split)
{_SCORE_STEPS}
    masked = Identity (scores)
{_MEAN_STEPS}
    flat = Constant <value_ints = [0, 0, -1]> ()
    y = Reshape (mean, flat)
}}
"""

#: Attention among the patches of each window of window² patches, cut from the grid's first patch on, whose queries and
#: keys it rotates: packed [F, R, C, 3·H·d], query, key and value of a patch one after the other; bias [3·H·d]; cosines
#: and sines [R·C, d / 2] fp32 → [F, R, C, H·d].
_WINDOW_ATTENTION = f"""
WindowAttention <num_heads, window> (packed, bias, cosines, sines) => (y) {{
    frames = Shape <start = 0, end = 1> (packed)
    rows = Shape <start = 1, end = 2> (packed)
    columns = Shape <start = 2, end = 3> (packed)
    total = Shape <start = -1> (packed)
    any = Constant <value_ints = [-1]> ()
    by_patch = Concat <axis = 0> (frames, any, total)
    qkv = Reshape (packed, by_patch)
{_ROTATION_STEPS}
    query_narrow = CastLike (query, qkv)
    key_narrow = CastLike (key, qkv)
{_SCORE_STEPS}
    zero_0 = Constant <value_int = 0> ()
    one_0 = Constant <value_int = 1> ()
    edge = Constant <value_int: int = @window> ()
    rows_0 = Squeeze (rows, first)
    columns_0 = Squeeze (columns, first)
    patches_0 = Mul (rows_0, columns_0)
    patch = Range (zero_0, patches_0, one_0)
    row = Div (patch, columns_0)
    column = Mod (patch, columns_0)
    down = Div (row, edge)
    across = Div (column, edge)
    windows_down = Mul (down, columns_0)
    which = Add (windows_down, across)
    which_query = Unsqueeze (which, one)
    there = Equal (which_query, which)
    lowest = Constant <value = float {{-3.4028234663852886e38}}> ()
    masked = Where (there, scores, lowest)
{_MEAN_STEPS}
    grid = Concat <axis = 0> (frames, rows, columns, rest)
    y = Reshape (mean, grid)
}}
"""

#: Causal attention over a cache: qkv [T, (H + 2 G)·d], query, key and value of a token one after the other; bias
#: [(H + 2 G)·d]; past_key and past_value [G, P, d], of which the rows before the first new token count; last [1] int32,
#: the last token's position; cosines and sines of every position's angles [at least P, d / 2] → attn_out [T, H·d], and
#: the cache with the new rows, which may be the same memory.
_CACHED_ATTENTION = """
CachedAttention <num_heads, kv_num_heads> (qkv, bias, past_key, past_value, last, cosines, sines)
    => (attn_out, present_key, present_value) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    rest = Constant <value_ints = [-1]> ()
    infinite = Constant <value_ints = [2147483647]> ()
    heads_0 = Constant <value_int: int = @num_heads> ()
    kv_heads_0 = Constant <value_int: int = @kv_num_heads> ()
    heads = Unsqueeze (heads_0, zero)
    kv_heads = Unsqueeze (kv_heads_0, zero)
    rotary = Add (heads, kv_heads)
    width = Shape <start = -1> (past_key)
    tokens = Shape <start = 0, end = 1> (qkv)
    last_64 = Cast <to = 7> (last)
    end = Add (last_64, one)
    begin = Sub (end, tokens)
    begin_0 = Squeeze (begin, zero)
    end_0 = Squeeze (end, zero)
    one_0 = Squeeze (one, zero)
    zero_0 = Squeeze (zero, zero)
    positions = Range (begin_0, end_0, one_0)
    slots = Range (zero_0, end_0, one_0)

    biased = Add (qkv, bias)
    by_head = Concat <axis = 0> (zero, rest, width)
    packed = Reshape (biased, by_head)
    sizes = Concat <axis = 0> (rotary, kv_heads)
    query_key, value = Split <axis = 1> (packed, sizes)
    wide = Cast <to = 1> (query_key)
    low, high = Split <axis = 2> (wide)
    cosine_rows = Gather <axis = 0> (cosines, positions)
    sine_rows = Gather <axis = 0> (sines, positions)
    cosine_fp32 = Cast <to = 1> (cosine_rows)
    sine_fp32 = Cast <to = 1> (sine_rows)
    c = Unsqueeze (cosine_fp32, one)
    s = Unsqueeze (sine_fp32, one)
    low_c = Mul (low, c)
    high_s = Mul (high, s)
    high_c = Mul (high, c)
    low_s = Mul (low, s)
    low_rotated = Sub (low_c, high_s)
    high_rotated = Add (high_c, low_s)
    rotated = Concat <axis = 2> (low_rotated, high_rotated)
    query_key_sizes = Concat <axis = 0> (heads, kv_heads)
    query, key_fp32 = Split <axis = 1> (rotated, query_key_sizes)
    key = CastLike (key_fp32, qkv)
    new_key = Transpose <perm = [1, 0, 2]> (key)
    new_value = Transpose <perm = [1, 0, 2]> (value)

    key_before = Slice (past_key, zero, begin, one)
    key_behind = Slice (past_key, end, infinite, one)
    present_key = Concat <axis = 1> (key_before, new_key, key_behind)
    value_before = Slice (past_value, zero, begin, one)
    value_behind = Slice (past_value, end, infinite, one)
    present_value = Concat <axis = 1> (value_before, new_value, value_behind)
    held_key = Slice (present_key, zero, end, one)
    held_value = Slice (present_value, zero, end, one)

    width_fp32 = Cast <to = 1> (width)
    root = Sqrt (width_fp32)
    scaled_fp32 = Div (query, root)
    group = Concat <axis = 0> (zero, kv_heads, rest, width)
    grouped = Reshape (scaled_fp32, group)
    queries = Transpose <perm = [1, 2, 0, 3]> (grouped)
    keys = Unsqueeze (held_key, one)
    keys_fp32 = Cast <to = 1> (keys)
    columns = Transpose <perm = [0, 1, 3, 2]> (keys_fp32)
    scores = MatMul (queries, columns)
    query_positions = Unsqueeze (positions, one)
    later = Greater (slots, query_positions)
    lowest = Constant <value = float {-3.4028234663852886e38}> ()
    masked = Where (later, lowest, scores)
    softmax = Softmax <axis = -1> (masked)
    shares = CastLike (softmax, qkv)
    values = Unsqueeze (held_value, one)
    mixed = MatMul (shares, values)
    by_token = Transpose <perm = [2, 0, 1, 3]> (mixed)
    flat = Concat <axis = 0> (zero, rest)
    attn_out = Reshape (by_token, flat)
}
"""

#: The same for tokens whose rotary positions are not their places in the cache: cosines and sines are those of the
#: angles of each token [T, d / 2].
_POSITIONED_ATTENTION = (
    _CACHED_ATTENTION.replace("CachedAttention", "PositionedAttention")
    .replace("Gather <axis = 0> (cosines, positions)", "Identity (cosines)")
    .replace("Gather <axis = 0> (sines, positions)", "Identity (sines)")
)

#: What the last token of a CachedAttention gives each position of the cache in each head: its inputs, with the keys
#: that it returned → [H, P] fp32, 0 after the last token.
_ATTENTION_SHARES = """
AttentionShares <num_heads, kv_num_heads> (qkv, bias, present_key, last, cosines, sines) => (shares) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    rest = Constant <value_ints = [-1]> ()
    infinite = Constant <value_ints = [2147483647]> ()
    heads_0 = Constant <value_int: int = @num_heads> ()
    kv_heads_0 = Constant <value_int: int = @kv_num_heads> ()
    heads = Unsqueeze (heads_0, zero)
    kv_heads = Unsqueeze (kv_heads_0, zero)
    width = Shape <start = -1> (present_key)
    capacity = Shape <start = 1, end = 2> (present_key)

    row = Slice (qkv, rest, infinite, zero)
    biased = Add (row, bias)
    by_head = Concat <axis = 0> (rest, width)
    packed = Reshape (biased, by_head)
    query_fp16 = Slice (packed, zero, heads, zero)
    query = Cast <to = 1> (query_fp16)
    low, high = Split <axis = 1> (query)
    last_64 = Cast <to = 7> (last)
    cosine_row = Gather <axis = 0> (cosines, last_64)
    sine_row = Gather <axis = 0> (sines, last_64)
    c = Cast <to = 1> (cosine_row)
    s = Cast <to = 1> (sine_row)
    low_c = Mul (low, c)
    high_s = Mul (high, s)
    high_c = Mul (high, c)
    low_s = Mul (low, s)
    low_rotated = Sub (low_c, high_s)
    high_rotated = Add (high_c, low_s)
    rotated = Concat <axis = 1> (low_rotated, high_rotated)

    width_fp32 = Cast <to = 1> (width)
    root = Sqrt (width_fp32)
    scaled = Div (rotated, root)
    group = Concat <axis = 0> (kv_heads, rest, width)
    queries = Reshape (scaled, group)
    keys = Cast <to = 1> (present_key)
    columns = Transpose <perm = [0, 2, 1]> (keys)
    scores = MatMul (queries, columns)
    zero_0 = Squeeze (zero, zero)
    one_0 = Squeeze (one, zero)
    capacity_0 = Squeeze (capacity, zero)
    slots = Range (zero_0, capacity_0, one_0)
    behind = Greater (slots, last_64)
    lowest = Constant <value = float {-3.4028234663852886e38}> ()
    masked = Where (behind, lowest, scores)
    softmax = Softmax <axis = -1> (masked)
    flat = Concat <axis = 0> (heads, capacity)
    shares = Reshape (softmax, flat)
}
"""

#: x [..., K]; weight [K, N] → x · weight, [..., N].
_LINEAR = """
Linear (x, weight) => (y) {
    y = MatMul (x, weight)
}
"""

#: The same with bias [N] → GELU(x · weight + bias), in its tanh form, rounded once.
_LINEAR_GELU = f"""
LinearGelu (x, weight, bias) => (y) {{
    left = Cast <to = 1> (x)
    right = Cast <to = 1> (weight)
    product = MatMul (left, right)
    wide_bias = Cast <to = 1> (bias)
    u = Add (product, wide_bias)
{_FAST_GELU}
    y = CastLike (wide, x)
}}
"""

#: x [..., K]; weight [K, N] int8; scales [N] fp32 → x · (weight · scales), [..., N]. INT8 bundles that were made before
#: their device graphs rounded activations have it.
_PER_CHANNEL_LINEAR = """
PerChannelLinear (x, weight, scales) => (y) {
    steps = Cast <to = 1> (weight)
    wide = Mul (steps, scales)
    matrix = CastLike (wide, x)
    y = MatMul (x, matrix)
}
"""

#: x [..., K] int8; weight [K, N] int8; scales [N] fp32 → x · weight · x_scale · scales, [..., N] fp16. Sums are exact.
#: ONNX Runtime's kernels of MatMulInteger are not, on some CPUs.
_INT8_LINEAR = """
Int8Linear <x_scale> (x, weight, scales) => (y) {
    left = Cast <to = 6> (x)
    right = Cast <to = 6> (weight)
    sums = MatMul (left, right)
    product = Cast <to = 1> (sums)
    factor = Constant <value_float: float = @x_scale> ()
    factors = Mul (factor, scales)
    scaled = Mul (product, factors)
    y = Cast <to = 10> (scaled)
}
"""

#: Elements of ``bits`` bits in bytes [..., bytes], the first in the lowest bits → numbers [..., elements].
_ELEMENTS = """
    last = Constant <value_ints = [-1]> ()
    {0}_fp32 = Cast <to = 1> ({0})
    {0}_column = Unsqueeze ({0}_fp32, last)
    {0}_shifted = Div ({0}_column, units)
    {0}_whole = Floor ({0}_shifted)
    {0}_above = Div ({0}_whole, range)
    {0}_above_whole = Floor ({0}_above)
    {0}_above_part = Mul ({0}_above_whole, range)
    {0}_elements = Sub ({0}_whole, {0}_above_part)
"""

_UNITS = """
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    first = Constant <value_int = 0> ()
    next = Constant <value_int = 1> ()
    byte = Constant <value_int = 8> ()
    two = Constant <value = float {2.0}> ()
    bits = Constant <value_int: int = @bits> ()
    in_byte = Div (byte, bits)
    places = Range (first, in_byte, next)
    shifts = Mul (places, bits)
    shifts_fp32 = Cast <to = 1> (shifts)
    units = Pow (two, shifts_fp32)
    bits_fp32 = Cast <to = 1> (bits)
    range = Pow (two, bits_fp32)
"""

#: From signed [N, groups, elements] on.
_BLOCKWISE_STEPS = """
    scales_fp32 = Cast <to = 1> (scales)
    scale_column = Unsqueeze (scales_fp32, last)
    wide = Mul (signed, scale_column)
    flat = Constant <value_ints = [0, -1]> ()
    padded = Reshape (wide, flat)
    width = Shape <start = -1> (x)
    rows = Slice (padded, zero, width, one)
    columns = Transpose <perm = [1, 0]> (rows)
    matrix = CastLike (columns, x)
    y = MatMul (x, matrix)
"""

#: x [..., K]; weight [N, groups, bytes of a group] uint8: unsigned elements of ``bits`` bits, the first in the lowest;
#: scales [N, groups] → x · ((weight − 2^(bits − 1)) · scales)ᵀ, [..., N]. What fills up a column's last group does not
#: count. ONNX Runtime's MatMulNBits takes the same weights.
_BLOCKWISE_LINEAR = f"""
BlockwiseLinear <bits> (x, weight, scales) => (y) {{
{_UNITS}
    middle = Div (range, two)
{_ELEMENTS.format("weight")}
    group = Constant <value_ints = [0, 0, -1]> ()
    grouped = Reshape (weight_elements, group)
    signed = Sub (grouped, middle)
{_BLOCKWISE_STEPS}
}}
"""

#: The same with a zero point of each group in the place of 2^(bits − 1), packed as the elements are: zeros [N, bytes].
_BLOCKWISE_AFFINE_LINEAR = f"""
BlockwiseAffineLinear <bits> (x, weight, scales, zeros) => (y) {{
{_UNITS}
{_ELEMENTS.format("weight")}
    group = Constant <value_ints = [0, 0, -1]> ()
    grouped = Reshape (weight_elements, group)
{_ELEMENTS.format("zeros").replace("last = Constant <value_ints = [-1]> ()", "")}
    zeros_flat = Constant <value_ints = [0, -1]> ()
    zeros_padded = Reshape (zeros_elements, zeros_flat)
    groups = Shape <start = 1, end = 2> (weight)
    zero_rows = Slice (zeros_padded, zero, groups, one)
    zero_column = Unsqueeze (zero_rows, last)
    signed = Sub (grouped, zero_column)
{_BLOCKWISE_STEPS}
}}
"""

#: x [..., D], which only its quantized versions change.
_QUANTIZE = """
Quantize (x) => (y) {
    wide = Cast <to = 1> (x)
    y = CastLike (wide, x)
}
"""

#: From FP8 matrices to their product in fp32, ``scaled``.
_FP8_PRODUCT = """    left = Cast <to = 1> (x)
    rows = Cast <to = 1> (weight)
    right = Transpose <perm = [1, 0]> (rows)
    product = MatMul (left, right)
    factor = Constant <value_float: float = @x_scale> ()
    scales = Mul (factor, scale)
    scaled = Mul (product, scales)"""

#: x [..., K] FP8; weight [N, K] FP8; scale [] fp32 → x · weightᵀ · x_scale · scale, [..., N] fp16.
_FP8_LINEAR = f"""
Fp8Linear <x_scale> (x, weight, scale) => (y) {{
{_FP8_PRODUCT}
    y = Cast <to = 10> (scaled)
}}
"""

#: The same with bias [N] and y_factor [] fp32 → GELU(that + bias) · y_factor, [..., N] FP8. GELU has its tanh form.
_FP8_LINEAR_GELU = f"""
Fp8LinearGelu <x_scale> (x, weight, scale, bias, y_factor) => (y) {{
{_FP8_PRODUCT}
    wide_bias = Cast <to = 1> (bias)
    u = Add (scaled, wide_bias)
{_FAST_GELU}
    y_steps = Mul (wide, y_factor)
    y = Cast <to = 17> (y_steps)
}}
"""

_TEXTS = (
    _BIAS,
    _BIAS_GELU,
    _BIAS_FAST_GELU,
    _SWIGLU,
    _BIAS_SWIGLU,
    _LAYER_NORM,
    _ADD_LAYER_NORM,
    _RMS_NORM,
    _ADD_RMS_NORM,
    _WIDE_RMS_NORM,
    _ADD_WIDE_RMS_NORM,
    _VISION_ATTENTION,
    _PATCHES,
    _ROTATE_PATCHES,
    _ROTATE_QUERY_KEY,
    _FRAME_ATTENTION,
    _WINDOW_ATTENTION,
    _CACHED_ATTENTION,
    _POSITIONED_ATTENTION,
    _ATTENTION_SHARES,
    _LINEAR,
    _LINEAR_GELU,
    _PER_CHANNEL_LINEAR,
    _INT8_LINEAR,
    _BLOCKWISE_LINEAR,
    _BLOCKWISE_AFFINE_LINEAR,
)

#: The operators whose first result may also be FP8 or INT8, and whose names then end in Fp8 or Int8: times the
#: attribute y_scale it is the result, rounded to nearest and saturated.
_ALSO_QUANTIZED = (
    _QUANTIZE,
    _BIAS_GELU,
    _BIAS_FAST_GELU,
    _SWIGLU,
    _BIAS_SWIGLU,
    _LAYER_NORM,
    _ADD_LAYER_NORM,
    _RMS_NORM,
    _ADD_RMS_NORM,
    _WIDE_RMS_NORM,
    _ADD_WIDE_RMS_NORM,
)


#: How the result ``wide``, in fp32, becomes y in a type, by the end of the operator's name.
_QUANTIZED = {
    "Fp8": """y_steps = Div (wide, y_factor)
    y = Cast <to = 17> (y_steps)""",
    "Int8": """y_zero = Constant <value = int8 {0}> ()
    y = QuantizeLinear (wide, y_factor, y_zero)""",
}


def _quantized(text: str, kind: str) -> str:
    """A function with its first result, y, in FP8 or INT8."""
    name, attributes, rest = re.findall(r"^(\w+)(?: <([^>]*)>)? (\(.*)", text.strip(), re.DOTALL)[0]
    factor = "y_factor = Constant <value_float: float = @y_scale> ()\n    "
    converted = re.sub(r"\bwide\b", r"\\1", f"{factor}{_QUANTIZED[kind]}")
    rest = re.sub(r"\by = Cast.*\((\w+).*\)", converted, rest)
    return f"{name}{kind} <{', '.join(filter(None, [attributes, 'y_scale']))}> {rest}"


def _at_fp8_opset(text: str) -> str:
    """A function as of opset 18 on: axes are an input of ReduceMean, and Split says how many parts there are."""
    axes = "last_axis = Constant <value_ints = [-1]> ()\n    mean = ReduceMean <keepdims = 1> (square, last_axis)"
    text = text.replace("mean = ReduceMean <axes = [-1], keepdims = 1> (square)", axes)

    def split(found: re.Match[str]) -> str:
        parts, axis, whole = found.groups()
        return f"{parts} = Split <axis = {axis}, num_outputs = {parts.count(',') + 1}> ({whole})"

    return re.sub(r"(\w+(?:, \w+)+) = Split <axis = (\d)> \((\w+)\)", split, text)


def _parsed(opset: int, texts: Iterable[str]) -> dict[str, FunctionProto]:
    header = f'<domain: "{op.DOMAIN}", opset_import: ["" : {opset}]>'
    functions = [parser.parse_function(f"{header}{text}") for text in texts]
    return {function.name: function for function in functions}


_ALL_TEXTS = (*_TEXTS, *(_quantized(text, "Int8") for text in _ALSO_QUANTIZED))
_FP8_TEXTS = (_FP8_LINEAR, _FP8_LINEAR_GELU, *(_quantized(text, "Fp8") for text in _ALSO_QUANTIZED))

#: The function of each operator, by its name.
FUNCTIONS = _parsed(17, _ALL_TEXTS)

#: The same for a graph with FP8: ONNX Runtime does not convert a function to the opset of its graph.
FP8_FUNCTIONS = _parsed(FP8_OPSET, map(_at_fp8_opset, (*_ALL_TEXTS, *_FP8_TEXTS)))
