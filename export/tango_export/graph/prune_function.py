"""The Tango operator as ONNX functions: what the node of prune.onnx computes, in standard operators.

prune.onnx carries them, so that it also runs where the CUDA library is not, in about the time that the reference takes.
docs/reference/operator.md describes the steps, and the reference (plugins/tango_plugins/reference.py) has a function
for each; here each is a function of the same name in CamelCase. All arithmetic is fp64 (11, where a Cast names it),
counts and indices are int64 (7). A scalar has rank 0: ``one_0`` is the scalar of ``one`` [1]. Ties go to the lower
index: of equal entries TopK puts the lower first, and ArgMin takes it.

Letters are the reference's: F frames, L tokens per frame, D width, N tokens of a step's input, X features [N, D],
A salience [N], R rotated features [N, D], D2 squared distances [N, N]. The M tokens that a step keeps are four tensors:

- indices [M], indices into the step's input;
- tokens [M, D], their values;
- stage [M], 0 of a selected token, 1 of context that is left as it is, 2 of a merged token;
- score [M], density·delta of a merged token, else 0.

Opset 17 cannot compare strings, so what the attributes ``merge_order`` and ``budget`` choose is chosen when the file is
written: it has one ``MergedPlaces`` and one ``FitBudget``.
"""

from __future__ import annotations

from onnx import FunctionProto, parser

from tango_plugins import PruneParams, op

_HEADER = f'<domain: "{op.DOMAIN}", opset_import: ["" : 17, "{op.DOMAIN}" : 1]>'

_PRUNE = """
TangoPrune <retention_ratio, context_ratio, expansion, anchor_weight, segment_threshold, static_threshold, neighbors,
            time_base, space_base, grid, sink_positions, merge_order, budget, precision, plugin_namespace,
            plugin_version>
    (features, salience, timestamps) => (tokens, indices, count) {
    A = tango.SilenceSinks <sink_positions: ints = @sink_positions> (salience)
    unit = tango.Normalize (features)
    R = tango.Rope <grid: ints = @grid, time_base: int = @time_base, space_base: int = @space_base> (unit, timestamps)
    cosines = tango.Similarity (unit)
    starts, ends = tango.Segment <segment_threshold: int = @segment_threshold> (cosines)
    X = Cast <to = 11> (features)
    kept_indices, kept_tokens, stage, score = tango.CompressVideo <
        retention_ratio: int = @retention_ratio, context_ratio: int = @context_ratio, expansion: int = @expansion,
        anchor_weight: int = @anchor_weight, static_threshold: int = @static_threshold, neighbors: int = @neighbors
    > (X, A, R, cosines, starts, ends)
    fit_indices, fit_tokens = tango.FitBudget <retention_ratio: int = @retention_ratio>
        (kept_indices, kept_tokens, stage, score, X, A)
    order = tango.Ascending (fit_indices)
    indices_64 = Gather (fit_indices, order)
    indices = Cast <to = 6> (indices_64)
    rows = Gather (fit_tokens, order)
    tokens = CastLike (rows, features)
    kept = tango.Length (order)
    count = Cast <to = 6> (kept)
}
"""

# What the steps share.

#: An attribute in ten-thousandths as a scalar.
_RATIO = """
Ratio <ten_thousandths> () => (ratio) {
    whole = Constant <value_int: int = @ten_thousandths> ()
    wide = Cast <to = 11> (whole)
    scale = Constant <value = double {10000.0}> ()
    ratio = Div (wide, scale)
}
"""

#: The first dimension of x, a scalar.
_LENGTH = """
Length (x) => (n) {
    first = Shape <start = 0, end = 1> (x)
    n = Squeeze (first)
}
"""

#: 0 … n − 1, n a scalar → [n].
_INDICES = """
Indices (n) => (indices) {
    zero_0 = Constant <value_int = 0> ()
    one_0 = Constant <value_int = 1> ()
    indices = Range (zero_0, n, one_0)
}
"""

#: Where the mask [N] is true, ascending.
_POSITIONS = """
Positions (mask) => (positions) {
    zero = Constant <value_ints = [0]> ()
    row = NonZero (mask)
    positions = Squeeze (row, zero)
}
"""

#: Where the k largest of x [N] are, in this order, k a scalar.
_LARGEST = """
Largest (x, k) => (places) {
    zero = Constant <value_ints = [0]> ()
    size = Unsqueeze (k, zero)
    values, places = TopK <axis = 0, largest = 1, sorted = 1> (x, size)
}
"""

#: Where the entries of x [N] are, in ascending order.
_ASCENDING = """
Ascending (x) => (places) {
    size = Shape (x)
    values, places = TopK <axis = 0, largest = 0, sorted = 1> (x, size)
}
"""

#: Whether each of n tokens is among the indices [M], which may repeat; n a scalar → [n].
_MASK = """
Mask (indices, n) => (mask) {
    zero = Constant <value_ints = [0]> ()
    size = Unsqueeze (n, zero)
    zero_0 = Constant <value_int = 0> ()
    one_0 = Constant <value_int = 1> ()
    zeros = Expand (zero_0, size)
    all = Shape (indices)
    ones = Expand (one_0, all)
    marked = ScatterElements <axis = 0> (zeros, indices, ones)
    mask = Cast <to = 9> (marked)
}
"""

# Step 1: sinks

#: salience [F, L] → A [F, L].
_SILENCE_SINKS = """
SilenceSinks <sink_positions> (salience) => (A) {
    heard = Cast <to = 11> (salience)
    sinks = Constant <value_ints: ints = @sink_positions> ()
    width = Shape <start = 1> (salience)
    L = Squeeze (width)
    silent = tango.Mask (sinks, L)
    zero_double = Constant <value = double {0.0}> ()
    A = Where (silent, zero_double, heard)
}
"""

# Step 2: ST-RoPE

#: features [F, L, D] → unit [F, L, D].
_NORMALIZE = """
Normalize (features) => (unit) {
    X = Cast <to = 11> (features)
    square = Mul (X, X)
    two = Constant <value_ints = [2]> ()
    sum = ReduceSum <keepdims = 1> (square, two)
    norm = Sqrt (sum)
    epsilon = Constant <value = double {1e-12}> ()
    divisor = Max (norm, epsilon)
    unit = Div (X, divisor)
}
"""

#: unit [F, L, D], timestamps [F] → R [F, L, D].
_ROPE = """
Rope <grid, time_base, space_base> (unit, timestamps) => (R) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    six = Constant <value_ints = [6]> ()
    minus_one = Constant <value_ints = [-1]> ()
    D = Shape <start = -1> (unit)
    sixths = Div (D, six)
    d = Mul (sixths, two)
    height_end = Sub (D, d)
    time_end = Sub (height_end, d)
    time = Slice (unit, zero, time_end, minus_one)
    height = Slice (unit, time_end, height_end, minus_one)
    width = Slice (unit, height_end, D, minus_one)

    t = Cast <to = 11> (timestamps)
    by_frame = Constant <value_ints = [-1, 1, 1]> ()
    seconds = Reshape (t, by_frame)
    lengths = Shape <start = 1, end = 2> (unit)
    L = Squeeze (lengths)
    position = tango.Indices (L)
    sides = Constant <value_ints: ints = @grid> ()
    W = Gather (sides, one)
    row = Div (position, W)
    column = Mod (position, W)
    by_position = Constant <value_ints = [1, -1, 1]> ()
    row_double = Cast <to = 11> (row)
    column_double = Cast <to = 11> (column)
    rows = Reshape (row_double, by_position)
    columns = Reshape (column_double, by_position)

    time_rotated = tango.Rotate <base: int = @time_base> (time, seconds)
    height_rotated = tango.Rotate <base: int = @space_base> (height, rows)
    width_rotated = tango.Rotate <base: int = @space_base> (width, columns)
    R = Concat <axis = -1> (time_rotated, height_rotated, width_rotated)
}
"""

#: section [F, L, d], position [F, 1, 1] or [1, L, 1] → [F, L, d].
_ROTATE = """
Rotate <base> (section, position) => (rotated) {
    zero = Constant <value_ints = [0]> ()
    two = Constant <value_ints = [2]> ()
    minus_one = Constant <value_ints = [-1]> ()
    minus_two = Constant <value_int = -2> ()
    d = Shape <start = -1> (section)
    half = Div (d, two)
    rotating = Mul (half, two)
    pairs = Squeeze (half)
    j = tango.Indices (pairs)
    multiple = Mul (j, minus_two)
    multiple_double = Cast <to = 11> (multiple)
    d_double = Cast <to = 11> (d)
    exponent = Div (multiple_double, d_double)
    base_int = Constant <value_int: int = @base> ()
    base_double = Cast <to = 11> (base_int)
    frequency = Pow (base_double, exponent)
    angle = Mul (position, frequency)
    sine = Sin (angle)
    cosine = tango.Cosine (angle)
    first = Slice (section, zero, half, minus_one)
    second = Slice (section, half, rotating, minus_one)
    rest = Slice (section, rotating, d, minus_one)
    first_cosine = Mul (first, cosine)
    second_sine = Mul (second, sine)
    second_cosine = Mul (second, cosine)
    first_sine = Mul (first, sine)
    first_rotated = Sub (first_cosine, second_sine)
    second_rotated = Add (second_cosine, first_sine)
    rotated = Concat <axis = -1> (first_rotated, second_rotated, rest)
}
"""

#: cos x = 1 − 2 sin² x/2, with an error below 1e-15: ONNX Runtime 1.19 has Sin in fp64, but not Cos.
_COSINE = """
Cosine (x) => (cosine) {
    one_double = Constant <value = double {1.0}> ()
    two_double = Constant <value = double {2.0}> ()
    half = Div (x, two_double)
    sine = Sin (half)
    square = Mul (sine, sine)
    twice = Mul (square, two_double)
    cosine = Sub (one_double, twice)
}
"""

# Step 3: segments

#: unit [F, L, D] → cosines [F − 1, L]. Of a single frame, ONNX Runtime would not sum over an axis that is counted from
#: the end.
_SIMILARITY = """
Similarity (unit) => (cosines) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    minus_one = Constant <value_ints = [-1]> ()
    two = Constant <value_ints = [2]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    before = Slice (unit, zero, minus_one, zero)
    after = Slice (unit, one, end, zero)
    product = Mul (before, after)
    sum = ReduceSum <keepdims = 0> (product, two)
    one_double = Constant <value = double {1.0}> ()
    cosines = Min (sum, one_double)
}
"""

#: cosines [F − 1, L] → first frame and one past the last of each of S segments [S], the last segment first. The first
#: loop finds, for the first i + 1 frames, the largest gain and the length of the last segment: ``steps`` are those from
#: the first frame of a window to its last, and windows have at most 1024 frames. The second goes back from the end.
_SEGMENT = """
Segment <segment_threshold> (cosines) => (starts, ends) {
    zero_0 = Constant <value_int = 0> ()
    one_0 = Constant <value_int = 1> ()
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    threshold = tango.Ratio <ten_thousandths: int = @segment_threshold> ()
    exceeds = Greater (cosines, threshold)
    unchanged_since = Cast <to = 7> (exceeds)
    L = Shape <start = 1> (cosines)
    no_run = Expand (zero_0, L)
    no_runs = Unsqueeze (no_run, zero)
    unchanged = Concat <axis = 0> (no_runs, unchanged_since)
    F = tango.Length (unchanged)
    best, run, length = Loop (F, , zero, no_run) <body = window (int64 i, bool go_in, best_in, run_in)
        => (go_out, best_out, run_out, length_out) {
        go_out = Identity (go_in)
        unchanged_i = Gather (unchanged, i)
        longer = Add (run_in, one_0)
        run_out = Mul (longer, unchanged_i)
        end = Add (i, one_0)
        largest = Constant <value_int = 1024> ()
        windows = Min (end, largest)
        steps = tango.Indices (windows)
        steps_column = Unsqueeze (steps, one)
        holds = LessOrEqual (steps_column, run_out)
        holds_int = Cast <to = 7> (holds)
        static = ReduceSum <keepdims = 0> (holds_int, one)
        gain = Mul (static, steps)
        before = Sub (i, steps)
        best_before = Gather (best_in, before)
        total = Add (best_before, gain)
        best_total, step = TopK <axis = 0, largest = 1, sorted = 1> (total, one)
        best_out = Concat <axis = 0> (best_in, best_total)
        frames = Add (step, one_0)
        length_out = Squeeze (frames, zero)
    }>
    begin, starts, ends = Loop (F, , F) <body = back (int64 k, bool more_in, end_in)
        => (more_out, begin_out, start, end_scan) {
        end_frame = Sub (end_in, one_0)
        frames_back = Gather (length, end_frame)
        begin_out = Sub (end_in, frames_back)
        more_out = Greater (begin_out, zero_0)
        start = Identity (begin_out)
        end_scan = Identity (end_in)
    }>
}
"""

# Step 4: each segment

#: X, R [F, L, D], A [F, L], cosines [F − 1, L], starts and ends [S] → tokens kept of F·L.
_COMPRESS_VIDEO = """
CompressVideo <retention_ratio, context_ratio, expansion, anchor_weight, static_threshold, neighbors>
    (X, A, R, cosines, starts, ends) => (indices, tokens, stage, score) {
    one_0 = Constant <value_int = 1> ()
    zero = Constant <value_ints = [0]> ()
    L_1 = Shape <start = 1, end = 2> (X)
    L = Squeeze (L_1)
    S = tango.Length (starts)
    no_indices = Slice (starts, zero, zero)
    no_score = Cast <to = 11> (no_indices)
    no_frames = Slice (X, zero, zero)
    rest = Constant <value_ints = [-1]> ()
    D = Shape <start = -1> (X)
    by_token = Concat <axis = 0> (rest, D)
    no_tokens = Reshape (no_frames, by_token)
    indices, tokens, stage, score = Loop (S, , no_indices, no_tokens, no_indices, no_score) <body = segment
        (int64 i, bool go_in, indices_in, tokens_in, stage_in, score_in)
        => (go_out, indices_out, tokens_out, stage_out, score_out) {
        go_out = Identity (go_in)
        start = Gather (starts, i)
        end = Gather (ends, i)
        start_1 = Unsqueeze (start, zero)
        end_1 = Unsqueeze (end, zero)
        last = Sub (end, one_0)
        last_1 = Unsqueeze (last, zero)
        X_i = Slice (X, start_1, end_1, zero)
        A_i = Slice (A, start_1, end_1, zero)
        R_i = Slice (R, start_1, end_1, zero)
        cosines_i = Slice (cosines, start_1, last_1, zero)
        indices_i, tokens_i, stage_i, score_i = tango.CompressSegment <
            retention_ratio: int = @retention_ratio, context_ratio: int = @context_ratio,
            expansion: int = @expansion, anchor_weight: int = @anchor_weight,
            static_threshold: int = @static_threshold, neighbors: int = @neighbors
        > (X_i, A_i, R_i, cosines_i)
        offset = Mul (start, L)
        places_i = Add (indices_i, offset)
        indices_out = Concat <axis = 0> (indices_in, places_i)
        tokens_out = Concat <axis = 0> (tokens_in, tokens_i)
        stage_out = Concat <axis = 0> (stage_in, stage_i)
        score_out = Concat <axis = 0> (score_in, score_i)
    }>
}
"""

#: X, R [n, L, D], A [n, L], cosines [n − 1, L] → tokens kept of n·L. With n = 1 every position is static and ρ = r, so
#: the static part is the frame itself.
_COMPRESS_SEGMENT = """
CompressSegment <retention_ratio, context_ratio, expansion, anchor_weight, static_threshold, neighbors>
    (X, A, R, cosines) => (indices, tokens, stage, score) {
    zero_0 = Constant <value_int = 0> ()
    one_0 = Constant <value_int = 1> ()
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    rest = Constant <value_ints = [-1]> ()
    n = tango.Length (X)
    L_1 = Shape <start = 1, end = 2> (X)
    L = Squeeze (L_1)

    threshold = tango.Ratio <ten_thousandths: int = @static_threshold> ()
    exceeds = Greater (cosines, threshold)
    exceeds_int = Cast <to = 7> (exceeds)
    exceeding = ReduceSum <keepdims = 0> (exceeds_int, zero)
    pairs = Sub (n, one_0)
    is_static = Equal (exceeding, pairs)
    is_dynamic = Not (is_static)
    S = tango.Positions (is_static)
    dynamic = tango.Positions (is_dynamic)
    T = Mul (n, L)
    size_S = tango.Length (S)
    g = Mul (pairs, size_S)
    different = Sub (T, g)
    different_double = Cast <to = 11> (different)
    T_double = Cast <to = 11> (T)
    share = Div (different_double, T_double)
    r = tango.Ratio <ten_thousandths: int = @retention_ratio> ()
    quotient = Div (r, share)
    whole = Constant <value = double {1.0}> ()
    ratio = Min (quotient, whole)

    X_S = Gather <axis = 1> (X, S)
    A_S = Gather <axis = 1> (A, S)
    X_mean = ReduceMean <axes = [0], keepdims = 0> (X_S)
    A_mean = ReduceMean <axes = [0], keepdims = 0> (A_S)
    R_0 = Gather <axis = 0> (R, zero_0)
    R_S = Gather <axis = 0> (R_0, S)
    static_indices, static_tokens, static_stage, static_score = tango.Compress <
        context_ratio: int = @context_ratio, expansion: int = @expansion, anchor_weight: int = @anchor_weight,
        neighbors: int = @neighbors
    > (X_mean, A_mean, R_S, ratio)
    static_places = Gather (S, static_indices)

    X_d = Gather <axis = 1> (X, dynamic)
    A_d = Gather <axis = 1> (A, dynamic)
    R_d = Gather <axis = 1> (R, dynamic)
    dynamic_indices, dynamic_tokens, dynamic_stage, dynamic_score = tango.CompressDynamic <
        context_ratio: int = @context_ratio, expansion: int = @expansion, anchor_weight: int = @anchor_weight,
        neighbors: int = @neighbors
    > (X_d, A_d, R_d, ratio)
    frame = tango.Indices (n)
    offset = Mul (frame, L)
    offsets = Unsqueeze (offset, one)
    grid_places = Add (offsets, dynamic)
    all_places = Reshape (grid_places, rest)
    dynamic_places = Gather (all_places, dynamic_indices)

    indices = Concat <axis = 0> (static_places, dynamic_places)
    tokens = Concat <axis = 0> (static_tokens, dynamic_tokens)
    stage = Concat <axis = 0> (static_stage, dynamic_stage)
    score = Concat <axis = 0> (static_score, dynamic_score)
}
"""

#: The dynamic part of a segment: X, R [n, L_d, D], A [n, L_d], ratio a scalar → tokens kept of n·L_d.
_COMPRESS_DYNAMIC = """
CompressDynamic <context_ratio, expansion, anchor_weight, neighbors>
    (X, A, R, ratio) => (indices, tokens, stage, score) {
    rest = Constant <value_ints = [-1]> ()
    n = tango.Length (X)
    L_d_1 = Shape <start = 1, end = 2> (X)
    L_d = Squeeze (L_d_1)
    L_d_double = Cast <to = 11> (L_d)
    product = Mul (L_d_double, ratio)
    ceil = Ceil (product)
    m = Cast <to = 7> (ceil)
    m_s, m_c = tango.SplitBudget <context_ratio: int = @context_ratio> (m)
    chosen_by_frame = Scan <num_scan_inputs = 2, body = frame (A_f, R_f) => (chosen_f) {
        chosen_f = tango.Select <expansion: int = @expansion, neighbors: int = @neighbors> (A_f, R_f, m_s)
    }> (A, R)
    chosen = Reshape (chosen_by_frame, rest)
    D = Shape <start = -1> (X)
    by_token = Concat <axis = 0> (rest, D)
    X_flat = Reshape (X, by_token)
    R_flat = Reshape (R, by_token)
    b = Mul (m_c, n)
    indices, tokens, stage, score = tango.SelectAndMerge <
        anchor_weight: int = @anchor_weight, neighbors: int = @neighbors
    > (X_flat, R_flat, chosen, b)
}
"""

# Step 5: compress

#: X, R [N, D], A [N], ratio a scalar → tokens kept of N. No tokens become none.
_COMPRESS = """
Compress <context_ratio, expansion, anchor_weight, neighbors> (X, A, R, ratio) => (indices, tokens, stage, score) {
    N = tango.Length (X)
    N_double = Cast <to = 11> (N)
    product = Mul (N_double, ratio)
    ceil = Ceil (product)
    budget = Cast <to = 7> (ceil)
    one_0 = Constant <value_int = 1> ()
    at_least_one = Max (budget, one_0)
    m = Min (at_least_one, N)
    m_s, m_c = tango.SplitBudget <context_ratio: int = @context_ratio> (m)
    chosen = tango.Select <expansion: int = @expansion, neighbors: int = @neighbors> (A, R, m_s)
    indices, tokens, stage, score = tango.SelectAndMerge <
        anchor_weight: int = @anchor_weight, neighbors: int = @neighbors
    > (X, R, chosen, m_c)
}
"""

#: A budget m → its salient and its context tokens, all scalars.
_SPLIT_BUDGET = """
SplitBudget <context_ratio> (m) => (m_s, m_c) {
    one_double = Constant <value = double {1.0}> ()
    c = tango.Ratio <ten_thousandths: int = @context_ratio> ()
    share = Sub (one_double, c)
    m_double = Cast <to = 11> (m)
    product = Mul (m_double, share)
    floor = Floor (product)
    m_s = Cast <to = 7> (floor)
    m_c = Sub (m, m_s)
}
"""

#: X, R [N, D], which tokens were chosen [N], budget b of the others, a scalar → tokens kept of N.
_SELECT_AND_MERGE = """
SelectAndMerge <anchor_weight, neighbors> (X, R, chosen, b) => (indices, tokens, stage, score) {
    others = Not (chosen)
    salient = tango.Positions (chosen)
    rest = tango.Positions (others)
    X_salient = Gather (X, salient)
    M = Shape (salient)
    zero_0 = Constant <value_int = 0> ()
    no_score = Constant <value = double {0.0}> ()
    salient_stage = Expand (zero_0, M)
    salient_score = Expand (no_score, M)
    X_rest = Gather (X, rest)
    R_rest = Gather (R, rest)
    merged_indices, merged_tokens, merged_stage, merged_score = tango.Merge <
        anchor_weight: int = @anchor_weight, neighbors: int = @neighbors
    > (X_rest, R_rest, b)
    context = Gather (rest, merged_indices)
    indices = Concat <axis = 0> (salient, context)
    tokens = Concat <axis = 0> (X_salient, merged_tokens)
    stage = Concat <axis = 0> (salient_stage, merged_stage)
    score = Concat <axis = 0> (salient_score, merged_score)
}
"""

# Step 6: select

#: A [N], R [N, D], m_s a scalar → which are selected [N].
_SELECT = """
Select <expansion, neighbors> (A, R, m_s) => (chosen) {
    N = tango.Length (A)
    factor = tango.Ratio <ten_thousandths: int = @expansion> ()
    m_s_double = Cast <to = 11> (m_s)
    product = Mul (factor, m_s_double)
    floor = Floor (product)
    wanted = Cast <to = 7> (floor)
    size = Min (wanted, N)
    candidates = tango.Largest (A, size)
    one_0 = Constant <value_int = 1> ()
    enough = Max (m_s, one_0)
    few = LessOrEqual (size, enough)
    selected = If (few) <
        then_branch = everyone () => (all_candidates) { all_candidates = Identity (candidates) },
        else_branch = clustered () => (representatives) {
            R_candidates = Gather (R, candidates)
            representatives_of = tango.SelectFromClusters <neighbors: int = @neighbors> (R_candidates, m_s)
            representatives = Gather (candidates, representatives_of)
        }
    >
    chosen = tango.Mask (selected, N)
}
"""

#: R [C, D] of candidates by salience, m_s a scalar → the first candidate of each of m_s clusters [m_s], or its center
#: where it is empty.
_SELECT_FROM_CLUSTERS = """
SelectFromClusters <neighbors> (R, m_s) => (selected) {
    D2 = tango.SquaredDistances (R)
    by_score, score = tango.DensityPeaks <neighbors: int = @neighbors> (D2, m_s)
    order = tango.Ascending (by_score)
    centers = Gather (by_score, order)
    members = tango.Members (D2, centers)
    members_int = Cast <to = 7> (members)
    one = Constant <value_ints = [1]> ()
    any, most_salient = TopK <axis = 1, largest = 1, sorted = 1> (members_int, one)
    has_any = Cast <to = 9> (any)
    has = Squeeze (has_any, one)
    most_salient_flat = Squeeze (most_salient, one)
    selected = Where (has, most_salient_flat, centers)
}
"""

# Step 7: merge

#: X, R [N, D], b a scalar → at most b tokens.
_MERGE = """
Merge <anchor_weight, neighbors> (X, R, b) => (indices, tokens, stage, score) {
    N = tango.Length (X)
    zero_0 = Constant <value_int = 0> ()
    fits = LessOrEqual (N, b)
    none = Equal (b, zero_0)
    as_is = Or (fits, none)
    indices, tokens, stage, score = If (as_is) <
        then_branch = leave () => (left_indices, left_tokens, left_stage, left_score) {
            size = Min (N, b)
            left_indices = tango.Indices (size)
            left_tokens = Gather (X, left_indices)
            all_left = Shape (left_indices)
            one_0 = Constant <value_int = 1> ()
            no_score = Constant <value = double {0.0}> ()
            left_stage = Expand (one_0, all_left)
            left_score = Expand (no_score, all_left)
        },
        else_branch = join () => (merged_indices, merged_tokens, merged_stage, merged_score) {
            merged_indices, merged_tokens, merged_score = tango.MergeToAnchors <
                anchor_weight: int = @anchor_weight, neighbors: int = @neighbors
            > (X, R, b)
            all_merged = Shape (merged_indices)
            two_0 = Constant <value_int = 2> ()
            merged_stage = Expand (two_0, all_merged)
        }
    >
}
"""

#: X, R [N, D], b < N a scalar → indices [b], tokens [b, D], score [b]. An anchor that no token joins has w = 1, and so
#: keeps its own features.
_MERGE_TO_ANCHORS = """
MergeToAnchors <anchor_weight, neighbors> (X, R, b) => (indices, tokens, score) {
    D2 = tango.SquaredDistances (R)
    by_score, scores = tango.DensityPeaks <neighbors: int = @neighbors> (D2, b)
    order = tango.Ascending (by_score)
    anchors = Gather (by_score, order)
    members = tango.Members (D2, anchors)
    members_double = Cast <to = 11> (members)
    one = Constant <value_ints = [1]> ()
    one_double = Constant <value = double {1.0}> ()
    group_size = ReduceSum <keepdims = 1> (members_double, one)
    divisor = Max (group_size, one_double)
    sum = MatMul (members_double, X)
    mean = Div (sum, divisor)
    equal_weight = Div (one_double, divisor)
    least = tango.Ratio <ten_thousandths: int = @anchor_weight> ()
    w = Max (equal_weight, least)
    rest = Sub (one_double, w)
    own = Gather (X, anchors)
    own_part = Mul (w, own)
    mean_part = Mul (rest, mean)
    tokens = Add (own_part, mean_part)
    indices = tango.MergedPlaces (anchors, by_score)
    score = Gather (scores, indices)
}
"""

#: The index of each merged row, given the anchors ascending and by score [b].
_MERGED_PLACES = {
    "anchor": """
MergedPlaces (anchors, by_score) => (places) {
    places = Identity (anchors)
}
""",
    "density": """
MergedPlaces (anchors, by_score) => (places) {
    places = Identity (by_score)
}
""",
}

# Step 8: density peaks

#: R [N, D] → D2 [N, N]. A product may round ⟨R_i, R_j⟩ and ⟨R_j, R_i⟩ differently; their mean is symmetric.
_SQUARED_DISTANCES = """
SquaredDistances (R) => (D2) {
    product = Gemm <transB = 1> (R, R)
    product_transposed = Transpose <perm = [1, 0]> (product)
    twice = Add (product, product_transposed)
    N = tango.Length (R)
    i = tango.Indices (N)
    one = Constant <value_ints = [1]> ()
    diagonal = Unsqueeze (i, one)
    norm = GatherElements <axis = 1> (product, diagonal)
    norm_row = Transpose <perm = [1, 0]> (norm)
    norms = Add (norm, norm_row)
    difference = Sub (norms, twice)
    zero_double = Constant <value = double {0.0}> ()
    D2 = Max (difference, zero_double)
}
"""

#: D2 [N, N], b a scalar → the b tokens of highest density·delta, in that order [b], and density·delta of all [N].
_DENSITY_PEAKS = """
DensityPeaks <neighbors> (D2, b) => (by_score, score) {
    density = tango.Densities <neighbors: int = @neighbors> (D2)
    delta = tango.Deltas (D2, density)
    score = Mul (density, delta)
    by_score = tango.Largest (score, b)
}
"""

#: D2 [N, N], N ≥ 2 → [N]. Equal neighbors must give equal densities, wherever a token stands: ONNX Runtime's ReduceMean
#: and Exp round what fills a vector register otherwise than the rest, CumSum and Pow do not.
_DENSITIES = """
Densities <neighbors> (D2) => (density) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    last = Constant <value_int = -1> ()
    axis = Constant <value_int = 1> ()
    one_0 = Constant <value_int = 1> ()
    N = tango.Length (D2)
    others = Sub (N, one_0)
    limit = Constant <value_int: int = @neighbors> ()
    k = Min (limit, others)
    with_itself = Add (k, one_0)
    size = Unsqueeze (with_itself, zero)
    near, places = TopK <axis = 1, largest = 0, sorted = 1> (D2, size)
    nearest = Slice (near, one, end, one)
    sums = CumSum (nearest, axis)
    sum = Gather <axis = 1> (sums, last)
    k_double = Cast <to = 11> (k)
    mean = Div (sum, k_double)
    negative = Neg (mean)
    e = Constant <value = double {2.718281828459045}> ()
    density = Pow (e, negative)
}
"""

#: D2 [N, N], density [N] → [N]. The largest distance takes the place of those to tokens that are not denser.
_DELTAS = """
Deltas (D2, density) => (delta) {
    one = Constant <value_ints = [1]> ()
    N = tango.Length (density)
    i = tango.Indices (N)
    order = tango.Largest (density, N)
    rank = ScatterElements <axis = 0> (i, order, i)
    rank_column = Unsqueeze (rank, one)
    denser = Less (rank, rank_column)
    largest = ReduceMax <keepdims = 0> (D2)
    candidates = Where (denser, D2, largest)
    nearest_denser = ReduceMin <axes = [1], keepdims = 0> (candidates)
    delta = Sqrt (nearest_denser)
}
"""

#: D2 [N, N], centers [b] ascending → which tokens join each center, the nearest one [b, N].
_MEMBERS = """
Members (D2, centers) => (members) {
    one = Constant <value_ints = [1]> ()
    to_centers = Gather <axis = 1> (D2, centers)
    nearest = ArgMin <axis = 1, keepdims = 0> (to_centers)
    b = tango.Length (centers)
    center = tango.Indices (b)
    center_column = Unsqueeze (center, one)
    members = Equal (center_column, nearest)
}
"""

#: Tokens kept of F·L, X [F, L, D], A [F, L] → indices [K], tokens [K, D]. ``exact`` drops or adds tokens until
#: ceil(r·F·L) are kept: TopK is stable, so tokens are sorted by index, then by score or salience, then by stage.
_FIT_BUDGET = {
    "paper": """
FitBudget <retention_ratio> (indices, tokens, stage, score, X, A) => (fit_indices, fit_tokens) {
    fit_indices = Identity (indices)
    fit_tokens = Identity (tokens)
}
""",
    "exact": """
FitBudget <retention_ratio> (indices, tokens, stage, score, X, A) => (fit_indices, fit_tokens) {
    zero = Constant <value_ints = [0]> ()
    rest = Constant <value_ints = [-1]> ()
    r = tango.Ratio <ten_thousandths: int = @retention_ratio> ()
    F = tango.Length (X)
    L_1 = Shape <start = 1, end = 2> (X)
    L = Squeeze (L_1)
    F_double = Cast <to = 11> (F)
    L_double = Cast <to = 11> (L)
    r_F = Mul (r, F_double)
    r_F_L = Mul (r_F, L_double)
    ceil = Ceil (r_F_L)
    count = Cast <to = 7> (ceil)
    A_flat = Reshape (A, rest)

    two_0 = Constant <value_int = 2> ()
    is_merged = Equal (stage, two_0)
    own_salience = Gather (A_flat, indices)
    priority = Where (is_merged, score, own_salience)
    by_index = tango.Ascending (indices)
    kept = tango.Length (indices)
    priority_by_index = Gather (priority, by_index)
    descending = tango.Largest (priority_by_index, kept)
    by_priority = Gather (by_index, descending)
    stage_by_priority = Gather (stage, by_priority)
    first_stages = tango.Ascending (stage_by_priority)
    by_stage = Gather (by_priority, first_stages)
    stay = Min (kept, count)
    stay_1 = Unsqueeze (stay, zero)
    staying = Slice (by_stage, zero, stay_1)
    staying_indices = Gather (indices, staying)
    staying_tokens = Gather (tokens, staying)

    F_L = Mul (F, L)
    is_kept = tango.Mask (indices, F_L)
    is_unkept = Not (is_kept)
    unkept = tango.Positions (is_unkept)
    A_unkept = Gather (A_flat, unkept)
    lacking = Sub (count, stay)
    most_salient = tango.Largest (A_unkept, lacking)
    added = Gather (unkept, most_salient)
    D = Shape <start = -1> (X)
    by_token = Concat <axis = 0> (rest, D)
    X_flat = Reshape (X, by_token)
    added_tokens = Gather (X_flat, added)
    fit_indices = Concat <axis = 0> (staying_indices, added)
    fit_tokens = Concat <axis = 0> (staying_tokens, added_tokens)
}
""",
}

_STEPS = (
    _PRUNE,
    _RATIO,
    _LENGTH,
    _INDICES,
    _POSITIONS,
    _LARGEST,
    _ASCENDING,
    _MASK,
    _SILENCE_SINKS,
    _NORMALIZE,
    _ROPE,
    _ROTATE,
    _COSINE,
    _SIMILARITY,
    _SEGMENT,
    _COMPRESS_VIDEO,
    _COMPRESS_SEGMENT,
    _COMPRESS_DYNAMIC,
    _COMPRESS,
    _SPLIT_BUDGET,
    _SELECT_AND_MERGE,
    _SELECT,
    _SELECT_FROM_CLUSTERS,
    _MERGE,
    _MERGE_TO_ANCHORS,
    _SQUARED_DISTANCES,
    _DENSITY_PEAKS,
    _DENSITIES,
    _DELTAS,
    _MEMBERS,
)


def prune_functions(params: PruneParams) -> list[FunctionProto]:
    """The functions of a node with these parameters: ``TangoPrune``, and those that it calls.

    Only ``merge_order`` and ``budget`` are taken from the parameters; the others are the node's attributes.
    """
    chosen = (_MERGED_PLACES[params.merge_order], _FIT_BUDGET[params.budget])
    return [parser.parse_function(f"{_HEADER}{text}") for text in (*_STEPS, *chosen)]
