"""Put a selection of your own in Tango's place: python top_k.py BUNDLE VIDEO QUESTION"""

import sys
from typing import Any

import numpy as np

from tango_plugins import PruneParams, op
from tango_runtime import VideoLLM
from tango_runtime.backends.base import PrunedTokens, Trace
from tango_runtime.backends.registry import select
from tango_runtime.bundle import Bundle


class TopK:
    """A CPU backend that keeps the most salient tokens; the wrapped backend does everything else."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def prune(
        self, features: np.ndarray, salience: np.ndarray, seconds: np.ndarray, params: PruneParams
    ) -> PrunedTokens:
        """features [F, L, D] and salience [F, L] → K tokens [K, D] and their flat indices f·L + l, ascending."""
        F, L, D = features.shape
        count = op.exact_count(F, L, params)
        indices = np.sort(np.argsort(-salience, axis=None, kind="stable")[:count]).astype(np.int32)
        trace = Trace(indices, np.zeros(count, np.bool_), np.array([[0, F]], np.int32))
        return PrunedTokens(features.reshape(-1, D)[indices], indices, count, lambda: trace)


path, video, question = sys.argv[1:]
bundle = Bundle.load(path)
tango = select(bundle, "ort-cpu")
for name, backend in (("Tango", tango), ("top-k", TopK(tango))):
    answer = VideoLLM(bundle, backend).generate(video, question, frames=16, max_new_tokens=8)
    print(f"{name}: {answer.text}  ({answer.kept} of {answer.total} tokens)")
