"""Qwen2.5-VL in NumPy, written from its arithmetic: frames → features and salience → positions → logits.

It shares nothing with what is exported or run, and reads a checkpoint by itself. Everything is fp64 unless said
otherwise; one video, one sequence.

Letters: F frames, T = ceil(F / 2) temporal grids, H × W merged tokens per grid, L = H·W, D width of the decoder.
"""

from __future__ import annotations

import json
import math

import numpy as np
import torch
from safetensors.torch import load_file

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


# Sizes


def smart_resize(height, width, factor=28, least=128 * 28 * 28, most=768 * 28 * 28):
    """Height and width in pixels, multiples of `factor`, with an area in [least, most] and nearly the same aspect."""
    if max(height, width) / min(height, width) > 200:
        raise ValueError("aspect ratio")
    h, w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if h * w > most:
        scale = math.sqrt(height * width / most)
        h, w = (max(factor, math.floor(n / scale / factor) * factor) for n in (height, width))
    elif h * w < least:
        scale = math.sqrt(least / (height * width))
        h, w = (math.ceil(n * scale / factor) * factor for n in (height, width))
    return h, w


def frame_budget(frames, least=128 * 784, most=768 * 784, total=int(128000 * 784 * 0.9)):
    """Most pixels of one frame when `frames` of them share `total` (a temporal grid holds two frames)."""
    return max(min(most, total / frames * 2), int(least * 1.05))


def sample_count(total, video_fps, fps=2.0, least=4, most=768):
    """Frames that are taken of a video when it is sampled at `fps`; even."""
    least, most = math.ceil(least / 2) * 2, math.floor(min(most, total) / 2) * 2
    n = min(min(max(total / video_fps * fps, least), most), total)
    return math.floor(n / 2) * 2


def sample_indices(total, count):
    """round(linspace(0, total − 1, count)), halves to even."""
    return np.round(np.linspace(0, total - 1, count)).astype(np.int64)


def grid_times(seconds):
    """Times of the T temporal grids from those of the F frames: F samples stretched over T places, ends kept."""
    seconds = np.asarray(seconds, np.float64)
    T = -(-len(seconds) // 2)
    at = np.linspace(0, len(seconds) - 1, T)
    return np.interp(at, np.arange(len(seconds)), seconds)


# Vision


def patchify(frames, patch=14, merge=2):
    """uint8 [F, h, w, 3] → patch vectors [T, H, W, merge², 3·2·patch²] and their rows and columns [H, W, merge²].

    A patch vector runs over channel, frame of the pair, pixel row, pixel column; patches of one merged token are
    neighbours, row first.
    """
    x = (frames.astype(np.float64) / 255 - CLIP_MEAN) / CLIP_STD
    if len(x) % 2:
        x = np.concatenate((x, x[-1:]))
    F, h, w, _ = x.shape
    T, H, W = F // 2, h // (patch * merge), w // (patch * merge)
    x = x.reshape(T, 2, H, merge, patch, W, merge, patch, 3)
    #              0  1  2  3      4     5  6      7      8
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    row, column = np.meshgrid(np.arange(H * merge), np.arange(W * merge), indexing="ij")

    def by_token(a):
        return a.reshape(H, merge, W, merge).transpose(0, 2, 1, 3).reshape(H, W, merge * merge)

    return x.reshape(T, H, W, merge * merge, -1), by_token(row), by_token(column)


def rms(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rotate(x, angle):
    """[..., d] by angles [..., d/2], half-split."""
    half = x.shape[-1] // 2
    a, b, c, s = x[..., :half], x[..., half:], np.cos(angle), np.sin(angle)
    return np.concatenate((a * c - b * s, b * c + a * s), -1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(torch.from_numpy(x / math.sqrt(2))).numpy())


def window_of(H, W, tokens=4):
    """Window of each merged token [H·W]: squares of `tokens` from the top left, whatever is left over at the ends."""
    row, column = np.divmod(np.arange(H * W), W)
    return (row // tokens) * (-(-W // tokens)) + column // tokens


def vision(frames, w, c):
    """uint8 [F, h, w, 3] → features [T, L, D], salience [T, L].

    Nothing is permuted: attention looks at sets of patches, so a window is only a partition of a frame.
    """
    patches, row, column = patchify(frames, c["patch_size"], c["merge"])
    T, H, W, M, _ = patches.shape
    heads, width = c["heads"], c["hidden"]
    d = width // heads
    x = patches.reshape(T, H * W * M, -1) @ w["patch_embed.proj.weight"].reshape(width, -1).T
    frequency = 10000.0 ** (-np.arange(0, d // 2, 2) / (d // 2))
    angle = np.concatenate((row.reshape(-1, 1) * frequency, column.reshape(-1, 1) * frequency), -1)[:, None]
    side = c["window"] // c["merge"] // c["patch_size"]
    window = np.repeat(window_of(H, W, side), M)
    sets = [np.flatnonzero(window == i) for i in np.unique(window)]
    whole = [np.arange(H * W * M)]
    for i in range(c["depth"]):
        b = f"blocks.{i}."
        y = rms(x, w[b + "norm1.weight"], 1e-6)
        qkv = (y @ w[b + "attn.qkv.weight"].T + w[b + "attn.qkv.bias"]).reshape(T, -1, 3, heads, d)
        q, k, v = rotate(qkv[:, :, 0], angle), rotate(qkv[:, :, 1], angle), qkv[:, :, 2]
        mixed = np.empty_like(v)
        for part in whole if i in c["full"] else sets:
            query, key, value = (each[:, part].transpose(0, 2, 1, 3) for each in (q, k, v))
            shares = softmax(query @ key.transpose(0, 1, 3, 2) * d**-0.5)
            mixed[:, part] = (shares @ value).transpose(0, 2, 1, 3)
        x = x + mixed.reshape(T, -1, width) @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]
        y = rms(x, w[b + "norm2.weight"], 1e-6)
        m = b + "mlp."
        gate, up = (y @ w[m + n + ".weight"].T + w[m + n + ".bias"] for n in ("gate_proj", "up_proj"))
        x = x + (silu(gate) * up) @ w[m + "down_proj.weight"].T + w[m + "down_proj.bias"]
        last = q, k
    y = rms(x, w["merger.ln_q.weight"], 1e-6).reshape(T, H * W, M * width)
    y = gelu(y @ w["merger.mlp.0.weight"].T + w["merger.mlp.0.bias"])
    features = y @ w["merger.mlp.2.weight"].T + w["merger.mlp.2.bias"]
    return features, salience(*last, M)


def salience(q, k, M):
    """Rotated queries and keys of the last block [T, L·M, heads, d] → [T, L].

    One query for a frame, the mean over all its patches; one key for a token, the mean over its M patches.
    """
    T, _, heads, d = q.shape
    query, key = q.mean(1), k.reshape(T, -1, M, heads, d).mean(2)
    return softmax(np.einsum("thd,tlhd->thl", query, key) * d**-0.5).mean(1)


# Positions


def positions(before, grid, after, step=2.0):
    """M-RoPE ids [3, before + T·H·W + after] int64 (time, row, column).

    Args:
        before: Text tokens in front of the video's first token, `<|vision_start|>` included.
        grid: (T, H, W) in merged tokens.
        after: Text tokens behind the video.
        step: Ids between two temporal grids, seconds per grid × tokens per second; need not be whole.
    """
    T, H, W = grid
    t, r, c = np.meshgrid(np.arange(T), np.arange(H), np.arange(W), indexing="ij")
    video = np.stack((np.floor(t * step), r, c)).reshape(3, -1).astype(np.int64) + before
    behind = np.arange(after) + video.max() + 1
    return np.concatenate((np.tile(np.arange(before), (3, 1)), video, np.tile(behind, (3, 1))), 1)


# Decoder


def decoder(x, pos, w, c, cache=None):
    """Embeddings [N, D] at positions [3, N] → logits [N, vocabulary] and the cache, a list of (keys, values).

    Causality goes by order, not by position: row n sees the cache and rows 0 … n.
    """
    heads, kv, width = c["heads"], c["kv_heads"], c["hidden"]
    d = width // heads
    frequency = c["theta"] ** (-np.arange(0, d, 2) / d)
    axis = np.repeat(np.arange(3), c["sections"])  # of each frequency
    angle = (pos[axis].T * frequency)[:, None]
    N = len(x)
    new = []
    for i in range(c["layers"]):
        b = f"layers.{i}."
        a = b + "self_attn."
        y = rms(x, w[b + "input_layernorm.weight"], c["eps"])
        q, k, v = ((y @ w[f"{a}{n}_proj.weight"].T + w[f"{a}{n}_proj.bias"]).reshape(N, -1, d) for n in ("q", "k", "v"))
        q, k = rotate(q, angle), rotate(k, angle)
        if cache is not None:
            k, v = np.concatenate((cache[i][0], k)), np.concatenate((cache[i][1], v))
        new.append((k, v))
        P = len(k) - N
        K, V = np.repeat(k, heads // kv, 1), np.repeat(v, heads // kv, 1)
        scores = np.einsum("qhd,khd->hqk", q, K) * d**-0.5
        scores = np.where(np.arange(P + N)[None] > P + np.arange(N)[:, None], -np.inf, scores)
        mixed = np.einsum("hqk,khd->qhd", softmax(scores), V).reshape(N, -1)
        x = x + mixed @ w[a + "o_proj.weight"].T
        y = rms(x, w[b + "post_attention_layernorm.weight"], c["eps"])
        m = b + "mlp."
        x = x + (silu(y @ w[m + "gate_proj.weight"].T) * (y @ w[m + "up_proj.weight"].T)) @ w[m + "down_proj.weight"].T
    return rms(x, w["norm.weight"], c["eps"]) @ w["lm_head.weight"].T, new


# A checkpoint


class Qwen25VL:
    """A checkpoint in either layout, its config.json as on the hub.

    Args:
        folder: The checkpoint.
    """

    def __init__(self, folder):
        c = json.loads((folder / "config.json").read_text())
        v = c["vision_config"]
        self.vision_config = {
            "patch_size": v["patch_size"], "merge": v["spatial_merge_size"], "heads": v["num_heads"],
            "hidden": v["hidden_size"], "window": v["window_size"], "depth": v["depth"],
            "full": v["fullatt_block_indexes"],
        }  # fmt: skip
        self.config = {
            "heads": c["num_attention_heads"], "kv_heads": c["num_key_value_heads"], "hidden": c["hidden_size"],
            "layers": c["num_hidden_layers"], "theta": c["rope_theta"], "eps": c["rms_norm_eps"],
            "sections": c["rope_scaling"]["mrope_section"],
        }  # fmt: skip
        self.tower, self.decoder = {}, {}
        for file in sorted(folder.glob("*.safetensors")):
            for name, x in load_file(file).items():
                where, _, rest = name.removeprefix("model.").removeprefix("language_model.").partition("visual.")
                (self.tower if rest else self.decoder)[rest or where] = x.double().numpy()
        self.table = self.decoder["embed_tokens.weight"]
        self.decoder.setdefault("lm_head.weight", self.table)

    def vision(self, frames):
        """uint8 [F, h, w, 3] → features [T, L, D], salience [T, L]."""
        return vision(frames, self.tower, self.vision_config)

    def logits(self, x, pos, cache=None):
        """Embeddings [N, D] at positions [3, N] → logits of the last, and the cache."""
        found, cache = decoder(x, pos, self.decoder, self.config, cache)
        return found[-1], cache

    def greedy(self, x, pos, count, vocabulary):
        """The ids that follow a prompt, one by one; their positions go on from the largest so far."""
        ids, cache, following = [], None, pos.max() + 1
        for i in range(count):
            found, cache = self.logits(x, pos, cache)
            ids.append(int(found[:vocabulary].argmax()))
            x, pos = self.table[ids[-1:]], np.full((3, 1), following + i)
        return ids
