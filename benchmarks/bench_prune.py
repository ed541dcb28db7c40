"""Times the pruning operator on a GPU, next to a straightforward PyTorch implementation and the machine's limits.

    python -m benchmarks.bench_prune --output benchmarks/results/prune-h200.json

Each figure is the median of device events over rotating inputs, with the 10th and 90th percentile. The library runs as
a replayed CUDA graph, the PyTorch peer eagerly. At the end it prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tango_plugins import PruneParams, native_library
from tango_plugins.pruner import CudaPruner
from tango_plugins.reference import segment, split_budget

SHAPES = [(32, (14, 14), 3584), (32, (14, 14), 896), (64, (13, 13), 3584), (128, (14, 14), 3584)]
RATIOS = [0.05, 0.10, 0.15, 0.25]
#: Noise between frames at moving and at static positions, and the share of moving ones. Cosines are 1 / (1 + noise²).
#: ``dynamic`` has all frames in one segment at r ≤ 0.1 and no static position, which is the most work.
CONTENTS = {"dynamic": (0.62, 0.62, 1.0), "mixed": (0.62, 0.2, 0.5), "static": (0.2, 0.2, 0.0)}
INPUTS = 4


def make_video(frames, tokens, width, content, seed):
    """Features [F, L, D] fp16, salience [F, L] and timestamps [F] fp32, on the GPU."""
    random = torch.Generator("cuda").manual_seed(seed)
    moving, still, share = CONTENTS[content]
    scene = torch.randn(tokens, width, generator=random, device="cuda")
    moves = torch.rand(tokens, generator=random, device="cuda") < share
    noise = torch.where(moves, moving, still)[:, None]
    X = torch.empty(frames, tokens, width, dtype=torch.float16, device="cuda")
    for f in range(frames):
        X[f] = scene + noise * torch.randn(tokens, width, generator=random, device="cuda")
    A = torch.rand(frames, tokens, generator=random, device="cuda")
    return X, A, torch.arange(frames, device="cuda") * 0.5


# The peer: the same steps in PyTorch, segment by segment from the host, with inner products in fp16.


def peer(X, A, t, params):
    """The operator in PyTorch. Returns tokens [K, D] and indices [K]."""
    L = X.shape[1]
    A = A.clone()
    A[:, list(params.sinks)] = 0
    unit = torch.nn.functional.normalize(X.float(), dim=-1)
    cosines = (unit[:-1] * unit[1:]).sum(-1)
    R = _peer_rope(unit, t, params).half()
    kept = []
    for a, b in segment(cosines.double().cpu().numpy(), params.tau_segment):
        n, place = b - a, torch.arange(a * L, b * L, device=X.device).view(b - a, L)
        if n == 1:
            kept += _peer_compress(X[a], A[a], R[a], place[0], params.retention_ratio, params)
            continue
        static = (cosines[a : b - 1] > params.static_threshold).all(0)
        count = int(static.sum())
        T, g = n * L, (n - 1) * count
        ratio = min(1.0, params.retention_ratio / ((T - g) / T))
        if count:
            means = X[a:b, static].float().mean(0), A[a:b, static].mean(0)
            kept += _peer_compress(*means, R[a, static], place[0, static], ratio, params)
        m_s, m_c = split_budget(math.ceil((L - count) * ratio), params)
        left_X, left_R, left_place = [], [], []
        for f in range(n):
            x, rotated, where = X[a + f, ~static], R[a + f, ~static], place[f, ~static]
            chosen = _peer_select(A[a + f, ~static], rotated, m_s, params)
            kept.append((x[chosen], where[chosen]))
            left_X.append(x[~chosen])
            left_R.append(rotated[~chosen])
            left_place.append(where[~chosen])
        kept.append(_peer_merge(torch.cat(left_X), torch.cat(left_R), torch.cat(left_place), m_c * n, params))
    tokens, indices = torch.cat([x.to(X.dtype) for x, _ in kept]), torch.cat([where for _, where in kept])
    order = indices.argsort()
    return tokens[order], indices[order]


def _peer_rope(unit, t, params):
    H, W = params.grid
    D, d = unit.shape[-1], 2 * (unit.shape[-1] // 6)
    row = torch.arange(H, device=unit.device).repeat_interleave(W)
    column = torch.arange(W, device=unit.device).repeat(H)
    parts = []
    for section, position, base in zip(
        unit.split([D - 2 * d, d, d], -1),
        (t[:, None], row[None], column[None]),
        (params.time_base, params.space_base, params.space_base),
        strict=True,
    ):
        half = section.shape[-1] // 2
        angle = position[..., None] * base ** (-torch.arange(half, device=unit.device) / half)
        (first, second), cos, sin = section.split(half, -1), angle.cos(), angle.sin()
        parts += [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(parts, -1)


def _peer_compress(X, A, R, place, ratio, params):
    m_s, m_c = split_budget(max(1, math.ceil(len(X) * ratio)), params)
    chosen = _peer_select(A, R, m_s, params)
    return [(X[chosen], place[chosen]), _peer_merge(X[~chosen], R[~chosen], place[~chosen], m_c, params)]


def _peer_select(A, R, m_s, params):
    """The selected of the tokens, as a mask."""
    mask = torch.zeros(len(A), dtype=torch.bool, device=A.device)
    candidates = A.topk(min(math.floor(params.expansion * m_s), len(A))).indices
    if len(candidates) > max(m_s, 1):
        D2 = _peer_distances(R[candidates])
        centers = _peer_peaks(D2, m_s, params.neighbors)
        owner = D2[:, centers].argmin(1)
        place = torch.arange(len(candidates), device=A.device)
        first = torch.full_like(centers, len(candidates)).scatter_reduce(0, owner, place, "amin")
        candidates = candidates[torch.where(first < len(candidates), first, centers)]
    mask[candidates] = True
    return mask


def _peer_merge(X, R, place, b, params):
    if len(X) <= b:
        return X, place
    D2 = _peer_distances(R)
    anchors = _peer_peaks(D2, b, params.neighbors).sort().values
    owner = D2[:, anchors].argmin(1)
    size = torch.bincount(owner, minlength=b).clamp(min=1)[:, None]
    mean = torch.zeros(b, X.shape[-1], device=X.device).index_add_(0, owner, X.float()) / size
    w = (1 / size).clamp(min=params.anchor_weight)
    return w * X[anchors].float() + (1 - w) * mean, place[anchors]


def _peer_distances(R):
    return (2 - 2 * (R @ R.T).float()).clamp_(min=0)


def _peer_peaks(D2, b, k):
    near = D2.topk(min(k + 1, len(D2)), largest=False).values
    density = (-near[:, 1:].mean(1)).exp()
    delta = D2.masked_fill(density[None, :] <= density[:, None], math.inf).min(1).values
    delta = torch.where(delta.isinf(), D2.max(), delta).sqrt()
    return (density * delta).topk(b).indices


# Timing


def measure(calls, repeats):
    """Median, 10th and 90th percentile, in microseconds, of calls in rotation."""
    for call in calls:
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (begin, end) in enumerate(events):
        begin.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    times = 1e3 * np.array([begin.elapsed_time(end) for begin, end in events])
    return [round(float(time), 1) for time in np.percentile(times, [50, 10, 90])]


class Replay(NamedTuple):
    """The library on one video as a CUDA graph, and the memory that it uses."""

    graph: torch.cuda.CUDAGraph
    memory: dict[str, torch.Tensor]
    video: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_graph(video, params, precision):
    """Captures the library on a video, and runs it once."""
    F, _, D = video[0].shape
    pruner = CudaPruner(params, F, D, precision=precision)
    memory = {
        "tokens": torch.empty(pruner.capacity, D, dtype=torch.float16, device="cuda"),
        "indices": torch.empty(pruner.capacity, dtype=torch.int32, device="cuda"),
        "count": torch.empty(1, dtype=torch.int32, device="cuda"),
        "workspace": torch.empty(pruner.workspace_bytes, dtype=torch.uint8, device="cuda"),
    }
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pruner.enqueue(*video, **memory, stream=torch.cuda.current_stream().cuda_stream)
    graph.replay()
    return Replay(graph, memory, video)


def limits():
    """This GPU's peak: fp16 matrix products in TFLOP/s, copies in TB/s (read plus written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    product = measure([lambda: a @ b], 30)[0]
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], 30)[0]
    return {"tflops": round(2 * 8192**3 / product / 1e6, 1), "tb_per_s": round(2 * 2**31 / copy / 1e6, 2)}


def _cases(shapes, ratios):
    for frames, grid, width in shapes:
        for content in CONTENTS:
            videos = [make_video(frames, grid[0] * grid[1], width, content, seed) for seed in range(INPUTS)]
            for ratio in ratios:
                yield content, PruneParams(grid=grid, retention_ratio=ratio), videos


def bench(shapes, ratios, repeats, peer_repeats):
    """One record per shape, content and ratio; the peer at r = 0.1."""
    for content, params, videos in _cases(shapes, ratios):
        F, L, D = videos[0][0].shape
        record = {"frames": F, "tokens_per_frame": L, "width": D, "content": content, "ratio": params.retention_ratio}
        for precision in ("fast", "exact"):
            graphs = [make_graph(video, params, precision) for video in videos]
            record[precision] = measure([replay.graph.replay for replay in graphs], repeats)
            record["kept"] = int(graphs[0].memory["count"])
            record[f"workspace_{precision}"] = graphs[0].memory["workspace"].numel()
            del graphs
        if params.retention_ratio == 0.1 and peer_repeats:
            record["peer"] = measure([lambda v=video, p=params: peer(*v, p) for video in videos], peer_repeats)
            mine, theirs = library_indices(videos[0], params), peer(*videos[0], params)[1].cpu().numpy()
            record["peer_in_common"] = round(len(np.intersect1d(mine, theirs)) / len(mine), 4)
        print(json.dumps(record), flush=True)
        yield record


def library_indices(video, params):
    """The kept indices [K], by the fast library."""
    memory = make_graph(video, params, "fast").memory
    return memory["indices"][: int(memory["count"])].cpu().numpy()


def table(records):
    """Markdown, r = 0.1."""
    lines = [
        "| F×L×D | content | kept | fast | exact | PyTorch peer | workspace fast / exact |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        if record["ratio"] != 0.1:
            continue
        shape = f"{record['frames']}×{record['tokens_per_frame']}×{record['width']}"
        fast, exact, peers = (
            f"{time[0] / 1e3:.3f} ({time[1] / 1e3:.3f}–{time[2] / 1e3:.3f})" if time else "–"
            for time in (record["fast"], record["exact"], record.get("peer"))
        )
        memory = f"{record['workspace_fast'] / 1e6:.0f} / {record['workspace_exact'] / 1e6:.0f} MB"
        lines.append(f"| {shape} | {record['content']} | {record['kept']} | {fast} | {exact} | {peers} | {memory} |")
    return "\n".join(lines)


def main():
    """Measures everything; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    parser.add_argument("--repeats", type=int, default=60, help="repeats of the library (default: %(default)s)")
    parser.add_argument(
        "--peer-repeats", type=int, default=8, help="repeats of the PyTorch peer (default: %(default)s)"
    )
    options = parser.parse_args()
    conditions = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "library": native_library.load().tango_version().decode(),
        "unit": "microseconds: median, 10th and 90th percentile of device events",
        "limits": limits(),
    }
    print(json.dumps(conditions))
    records = list(bench(SHAPES, RATIOS, options.repeats, options.peer_repeats))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"conditions": conditions, "records": records}, indent=1) + "\n")
    print(f"\nmilliseconds, median (10th–90th percentile), r = 0.1\n\n{table(records)}")


if __name__ == "__main__":
    main()
