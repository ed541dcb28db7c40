"""Logits of a thinned prompt, and how far from fp32 they may be.

Small checkpoints that answer differently to everything amplify rounding. Of the one in families.py, fp16 on a CPU is
0.01 to 0.035 away from fp32, whether its decoder is in one graph or in two. Decoders in fp16 that round in other places
are as far from one another as from fp32. So what a device computes is compared with fp32, and its distance with that of
the portable graphs in fp16.
"""

from __future__ import annotations

import numpy as np

from tango_plugins.thinning import Thinning

#: How much further than the portable graphs another form of them may be. The device graphs' function bodies on a CPU
#: are at most twice as far. Of 60 rows and 30 kept, a place in the cache for a position makes it 34 times as far, rows
#: that are not merged 15 times, and a merge that weighs 0.5 in place of 0.6 seven times.
FACTOR = 3.0


def logits(llm, rows, kept):
    """Logits [21, V] of a prompt of which ``kept`` of so many rows stay, and after each of 20 tokens."""
    backend, decoder = llm._backend, llm.bundle.manifest.decoder
    ids, cache = np.arange(20, 40), backend.new_cache(1024)
    video = np.random.default_rng(rows).standard_normal((rows, decoder.hidden_size)).astype(np.float16)
    prompt = [backend.embed(ids), video.astype(llm.bundle.manifest.dtype), backend.embed(ids[:2])]
    found = [np.array(backend.extend(cache, prompt, Thinning(len(ids), rows, kept)))]
    found += [np.array(backend.decode(cache, int(token))) for token in ids]
    cache.release()
    return np.stack(found).astype(np.float64)


def assert_rounded_only(found, portable, exact):
    """``found`` and ``portable`` are logits in fp16, ``exact`` those in fp32."""
    assert np.isfinite(found).all()
    distance, allowed = (np.linalg.norm(each - exact) / np.linalg.norm(exact) for each in (found, portable))
    print(f"distance to fp32 {distance:.4f}, of the portable graphs {allowed:.4f}")
    assert distance <= FACTOR * allowed
