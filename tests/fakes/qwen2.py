"""A Qwen2 decoder in NumPy, in fp64: it shares nothing with what is exported, and reads the checkpoint by itself."""

from __future__ import annotations

import json

import numpy as np
from safetensors.torch import load_file


class Qwen2:
    """The decoder of a checkpoint in lmms-lab's format.

    Args:
        folder: The checkpoint.
    """

    def __init__(self, folder):
        c = json.loads((folder / "config.json").read_text())
        self.heads, self.kv_heads, self.layers = (
            c[f"num_{name}"] for name in ("attention_heads", "key_value_heads", "hidden_layers")
        )
        self.theta, self.eps = c["rope_theta"], c["rms_norm_eps"]
        files = sorted(folder.glob("*.safetensors"))
        self.w = {name: x.double().numpy() for file in files for name, x in load_file(file).items()}
        self.table = self.w["model.embed_tokens.weight"]
        self.newline = self.w["model.image_newline"]
        self.head = self.w.get("lm_head.weight", self.table)

    def layer(self, i, x, positions, past=None):
        """Rows [N, D] → the same, the layer's cache, and the last row's attention averaged over heads [P + N]."""
        name, N = f"model.layers.{i}.", len(x)
        normed = self.norm(f"{name}input_layernorm", x)
        q, k, v = (self.project(f"{name}self_attn.{part}_proj", normed) for part in "qkv")
        q, k = (rotate(part.reshape(N, -1, self.width), positions, self.theta) for part in (q, k))
        v = v.reshape(N, -1, self.width)
        if past is not None:
            k, v = np.concatenate((past[0], k)), np.concatenate((past[1], v))
        group = self.heads // self.kv_heads
        scores = np.einsum("qhd,khd->hqk", q, np.repeat(k, group, 1)) * self.width**-0.5
        later = np.arange(len(k)) > len(k) - N + np.arange(N)[:, None]
        shares = softmax(np.where(later, -np.inf, scores))
        mixed = np.einsum("hqk,khd->qhd", shares, np.repeat(v, group, 1)).reshape(N, -1)
        x = x + self.project(f"{name}self_attn.o_proj", mixed)
        normed = self.norm(f"{name}post_attention_layernorm", x)
        gate, up = (self.project(f"{name}mlp.{part}_proj", normed) for part in ("gate", "up"))
        return x + self.project(f"{name}mlp.down_proj", gate / (1 + np.exp(-gate)) * up), (k, v), shares[:, -1].mean(0)

    def greedy(self, prompt, count, vocabulary, drop=None):
        """The ids that follow a prompt [N, D], one by one; ``drop`` (layer, x, share) → (x, places) thins it."""
        logits, caches = self.prefill(prompt, drop)
        ids = [int(logits[:vocabulary].argmax())]
        while len(ids) < count:
            logits = self.step(ids[-1], len(prompt) + len(ids) - 1, caches)
            ids.append(int(logits[:vocabulary].argmax()))
        return ids

    def prefill(self, x, drop=None):
        """Logits after a prompt [N, D], and the cache of each layer."""
        positions, caches, share = np.arange(len(x)), [], None
        for i in range(self.layers):
            if drop:
                x, stay = drop(i, x, share)
                positions = positions[stay]
            x, cache, share = self.layer(i, x, positions)
            caches.append(cache)
        return self.logits(x), caches

    def step(self, token, position, caches):
        """Logits after one token, which is added to the caches."""
        x = self.table[[token]]
        for i in range(self.layers):
            x, caches[i], _ = self.layer(i, x, np.array([position]), caches[i])
        return self.logits(x)

    def logits(self, x):
        """Of the last of some rows."""
        return self.norm("model.norm", x[-1]) @ self.head.T

    @property
    def width(self):
        return self.table.shape[1] // self.heads

    def norm(self, name, x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[f"{name}.weight"]

    def project(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)


def rotate(x, positions, theta):
    """[N, heads, d] by the half-split rule."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)), -1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
