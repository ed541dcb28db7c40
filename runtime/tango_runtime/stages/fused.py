"""A bundle's fused graphs on ONNX Runtime's CUDA provider: attention is one operator, the cache grows in place.

A step of decoding is one CUDA graph, which ONNX Runtime records itself: nothing of the fused decoder runs on the CPU.
What a recording may not bake in is on the device: the token, and its position. The length that the host tells is only a
bound. For a first pass, whose tokens attend to nothing but one another, it is their number. For the others it decides
into how many parts attention divides the cache, each of which costs time though it be empty (total_sequence_length in
ONNX Runtime's group_query_attention.cc); where rows lie, the cache's shape says. So a step is recorded for each of a
few bounds, at its first use, and the least one that holds the sequence is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count, takewhile
from typing import Any

import numpy as np

from tango_plugins.library import Memory
from tango_runtime.bundle import Bundle, GraphName
from tango_runtime.device import Stream, rows
from tango_runtime.stages.cuda import Run
from tango_runtime.stages.sessions import CUDA, OrtGraphs, Tensor

#: Provider options. The norms sum in fp32: before microsoft/onnxruntime#28682 they did so only if they were told.
_EXACT_NORMS = {"enable_skip_layer_norm_strict_mode": "1"}
#: Flash or memory-efficient attention (AttentionBackend in ONNX Runtime's attention_common.h), and not cuDNN's, which
#: is told the cache's capacity as the length.
_DECODER = {"enable_cuda_graph": "1", "sdpa_kernel": "3", **_EXACT_NORMS}
#: Parts are equal shares of the whole cache: a lesser bound gives fewer and longer ones, and a sequence fills fewer.
_LEAST_BOUND = 1024


class FusedGraphs(OrtGraphs):
    """Sessions of a bundle's fused graphs, where it has them, and of its plain ones; made as :class:`OrtGraphs`."""

    def __init__(self, onnxruntime: Any, bundle: Bundle, stream: Stream, provider: tuple[str, str] = CUDA) -> None:
        plain = bundle.manifest.graphs
        self._cached = [t.name for t in plain["decoder"].outputs[1:]]
        self.waiting = [graph for graph in OrtGraphs.waiting if not plain[graph].fused]
        if plain["vision"].fused:
            self.frames_at_once = 32
            self.settings = {"vision": _EXACT_NORMS}
        if plain["decoder"].fused:
            self.in_place, self.tokens_at_once = True, 4096
            self.capacity = context = bundle.manifest.decoder.context  # or each new one would be recorded anew
            self.bounds = list(takewhile(lambda bound: bound < context, (_LEAST_BOUND << i for i in count())))
            self.settings = {**self.settings, "decoder": _DECODER}
        super().__init__(onnxruntime, _fused(bundle), stream, provider)

    def dtype(self, graph: GraphName, tensor: str) -> str:
        """The graph's own type of a tensor; positions are what the last of them is in the fused decoder."""
        return "int32" if self.in_place and tensor == "positions" else super().dtype(graph, tensor)

    def bind(self, graph: GraphName, tensors: Mapping[str, Memory], *, replay: int = 0) -> Run:
        """Prepares a session to read and write these tensors; gives the function that runs it.

        With ``replay``, the first run runs several times, to the same end, and records.
        """
        if graph != "decoder" or not self.in_place:
            return super().bind(graph, tensors, replay=replay)
        # A recording is known by a number; what has -1 is not recorded.
        return self._bind(graph, self._in_place(tensors, replay), replay, gpu_graph_id=str(replay or -1))

    def _in_place(self, tensors: Mapping[str, Memory], replay: int) -> dict[str, Tensor]:
        """The plain decoder's tensors as those of the fused one."""
        spec, positions = self._specs["decoder"], tensors["positions"]
        tokens = positions.shape[0]
        _, last, bound, *past = (t.name for t in spec.inputs)
        assert self.capacity is not None
        first = not tensors[past[0]].shape[1]
        cache = [tensors[name] for name in self._cached]
        cache = [replace(memory, shape=(1, *memory.shape)) for memory in cache]
        return {
            "embeddings": tensors["embeddings"],
            last: rows(positions, tokens - 1, tokens),
            bound: np.array([tokens if first else replay or self.capacity], np.int32),
            **dict(zip(past, cache, strict=True)),
            "logits": tensors["logits"],
            **dict(zip((t.name for t in spec.outputs[1:]), cache, strict=True)),
        }


def _fused(bundle: Bundle) -> Bundle:
    """A bundle with its fused graphs in the place of the plain ones, where it has them."""
    graphs = {name: spec.fused or spec for name, spec in bundle.manifest.graphs.items()}
    return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))
