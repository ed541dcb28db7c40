"""The operator restated naively, with Python numbers and loops. It shares no code with the reference."""

from __future__ import annotations

import itertools
import math


def unit(x):
    norm = max(math.hypot(*x), 1e-12)
    return [v / norm for v in x]


def rotate(x, position, base):
    d, y = len(x), list(x)
    for j in range(d // 2):
        angle = position * base ** (-2 * j / d)
        a, b = x[j], x[j + d // 2]
        y[j], y[j + d // 2] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
    return y


def rope(x, t, position, p):
    d = len(x) // 6 * 2
    x, at = unit(x), len(x) - 2 * d
    row, column = divmod(position, p.grid[1])
    time = rotate(x[:at], t, p.time_base)
    return time + rotate(x[at : at + d], row, p.space_base) + rotate(x[at + d :], column, p.space_base)


def gain(s, i, j, threshold):
    return (j - i) * sum(all(cosine > threshold for cosine in of_position) for of_position in zip(*s[i:j], strict=True))


def partitions(frames):
    for cut in itertools.product([False, True], repeat=frames - 1):
        starts = [0] + [f for f in range(1, frames) if cut[f - 1]]
        yield list(zip(starts, [*starts[1:], frames], strict=True))


def largest_gain(s, frames, threshold):
    return max(sum(gain(s, a, b - 1, threshold) for a, b in parts) for parts in partitions(frames))


def peaks(R, b, k):
    n = len(R)
    D = [[math.dist(x, y) for y in R] for x in R]
    density = []
    for row in D:
        near = sorted(d * d for d in row)[1 : k + 1]
        density.append(math.exp(-sum(near) / len(near)) if near else 1.0)
    largest = max(map(max, D))
    score = []
    for i in range(n):
        denser = [D[i][j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        score.append(density[i] * min(denser, default=largest))
    return sorted(range(n), key=lambda i: (-score[i], i))[:b], D


def select(A, R, m_s, p):
    order = sorted(range(len(A)), key=lambda i: (-A[i], i))[: math.floor(p.expansion * m_s)]
    if len(order) <= m_s or len(order) <= 1:
        return set(order)
    centers, D = peaks([R[i] for i in order], m_s, p.neighbors)
    centers.sort()
    joined = [min(centers, key=lambda c: D[i][c]) for i in range(len(order))]
    return {order[next((i for i in range(len(order)) if joined[i] == c), c)] for c in centers}


def merge(X, R, b, p):
    if len(X) <= b:
        return dict(enumerate(X))
    by_score, D = peaks(R, b, p.neighbors)
    anchors = sorted(by_score)
    joined = [min(anchors, key=lambda a: D[i][a]) for i in range(len(X))] if b else []
    rows = []
    for a in anchors:
        members = [X[i] for i in range(len(X)) if joined[i] == a]
        if not members:  # an equal anchor took even this one
            rows.append(X[a])
            continue
        w = max(1 / len(members), p.anchor_weight)
        rows.append([w * x + (1 - w) * sum(column) / len(members) for x, *column in zip(X[a], *members, strict=True)])
    return dict(zip(by_score if p.merge_order == "density" else anchors, rows, strict=True))


def group(frames, ratio, least, p):
    """Selects in each frame of [(index, x, a, r)], merges what is left of all: index → token."""
    m = max(least, math.ceil(len(frames[0]) * ratio)) if frames[0] else 0
    m_s = math.floor(m * (1 - p.context_ratio))
    kept, rest = {}, []
    for tokens in frames:
        chosen = select([a for _, _, a, _ in tokens], [r for *_, r in tokens], m_s, p)
        kept |= {tokens[i][0]: tokens[i][1] for i in chosen}
        rest += [token for i, token in enumerate(tokens) if i not in chosen]
    merged = merge([x for _, x, _, _ in rest], [r for *_, r in rest], (m - m_s) * len(frames), p)
    return kept | {rest[i][0]: row for i, row in merged.items()}


def mean(values):
    return sum(values) / len(values)


def prune(X, A, t, segments, p):
    """What is kept of each of the given segments: flat index → token. Paper's budget."""
    F, L = len(X), len(X[0])

    def cosine(f, i):
        return sum(a * b for a, b in zip(unit(X[f][i]), unit(X[f + 1][i]), strict=True))

    def token(f, i):
        return f * L + i, X[f][i], 0.0 if i in p.sinks else A[f][i], rope(X[f][i], t[f], i, p)

    def averaged(frames, i):
        tokens = [token(f, i) for f in frames]
        x = [mean(column) for column in zip(*(x for _, x, _, _ in tokens), strict=True)]
        return tokens[0][0], x, mean([a for _, _, a, _ in tokens]), tokens[0][3]

    s = [[cosine(f, i) for i in range(L)] for f in range(F - 1)]
    kept = {}
    for first, end in segments:
        frames = range(first, end)
        if len(frames) == 1:
            kept |= group([[token(first, i) for i in range(L)]], p.retention_ratio, 1, p)
            continue
        still = [i for i in range(L) if all(s[f][i] > p.static_threshold for f in frames[:-1])]
        T, g = len(frames) * L, (len(frames) - 1) * len(still)
        ratio = min(1.0, p.retention_ratio / ((T - g) / T))
        kept |= group([[averaged(frames, i) for i in still]], ratio, 1, p)
        kept |= group([[token(f, i) for i in range(L) if i not in still] for f in frames], ratio, 0, p)
    return kept
