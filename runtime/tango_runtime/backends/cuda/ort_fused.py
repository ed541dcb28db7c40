"""A bundle's device graphs on ONNX Runtime's CUDA provider, and decoding by the CUDA library, on the same weights.

ONNX Runtime takes passes over many tokens, with the operators of the CUDA library: attention is one of them, and the
cache grows in place. A decode step is one kernel of that library. Both are given the addresses of weights
that lie in the device's memory once: the graphs take them as inputs, which are bound once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tango_plugins.decoder import CudaDecoder, DecoderShape
from tango_plugins.device_array import DeviceArray
from tango_runtime.backends.cuda.device import Pool, Stream, rows
from tango_runtime.backends.cuda.ort_runner import CUDA, OrtRunner
from tango_runtime.backends.cuda.runner import Run, Step
from tango_runtime.backends.cuda.weights import Weights
from tango_runtime.bundle import Bundle, GraphName, Manifest


class FusedOrtRunner(OrtRunner):
    """Sessions of a bundle's device graphs, where it has them, and of its plain ones; made as :class:`OrtRunner`."""

    #: Whether quantized graphs run fused: without kernels for their weights, which the CUDA library does not have yet,
    #: every pass would unpack all of them, and the plain graphs are faster.
    fuses_quantized = False

    def __init__(
        self,
        onnxruntime: Any,
        bundle: Bundle,
        stream: Stream,
        provider: tuple[str, str] = CUDA,
        operators: Path | None = None,
    ) -> None:
        bundle = bundle if self.fuses_quantized else _without_quantized_device_graphs(bundle)
        self._manifest, self._stream = bundle.manifest, stream
        plain, last = bundle.manifest.graphs, bundle.manifest.decoders[-1]
        self._cached = [t.name for t in plain[last].outputs[1:]]
        self.waiting = [graph for graph in OrtRunner.waiting if graph in plain and not plain[graph].device]
        if plain["vision"].device:
            self.steps_at_once = 32
        if plain[last].device:
            self.in_place, self.tokens_at_once = True, 4096
            self.capacity = bundle.manifest.decoder.context  # the decode kernel of a cache is made for its length
        taking, given_up = [graph for graph, spec in plain.items() if spec.device_weights], threading.Event()
        with ThreadPoolExecutor() as threads:  # while the sessions are loaded
            uploading = threads.map(lambda graph: Weights(bundle.path, plain[graph], given_up), taking)
            try:
                super().__init__(onnxruntime, _with_device_graphs(bundle), stream, provider, operators)
                self._weights = dict(zip(taking, uploading, strict=True))
            except BaseException:  # ctrl-C too: leaving this block waits for the uploads
                given_up.set()
                raise
        # Once: of a binding that is made anew, what is not named stays.
        for graph in taking:
            self._bind(graph, self._taken(graph))

    def dtype(self, graph: GraphName, tensor: str) -> str:
        """The graph's own type of a tensor; positions are what the last of them is in the fused decoder."""
        return "int32" if self.in_place and tensor == "positions" else super().dtype(graph, tensor)

    def bind(self, graph: GraphName, tensors: Mapping[str, DeviceArray], *, replay: bool = False) -> Run:
        """Prepares a session to read and write these tensors; gives the function that runs it."""
        if graph != "decoder" or not self.in_place:
            return super().bind(graph, tensors, replay=replay)
        weights = self._taken(graph) if replay else {}  # that binding is another
        return self._bind(graph, self._in_place(tensors) | weights, replay)

    def step(self, cache: Sequence[DeviceArray], logits: DeviceArray, pool: Pool) -> Step | None:
        """The CUDA library's, where the decoder is fused: the token's embedding is a row of the table.

        None where it is not, or has quantized weights: then a step is a pass of the graphs.
        """
        if not self.in_place or self._manifest.graphs["decoder"].quantization:
            return None
        weights, (words,) = self._weights["decoder"], self._manifest.graphs["embed"].device_weights
        decoder = CudaDecoder(_shape(self._manifest, weights, cache[0].shape[1]), weights, cache)
        table = pool.take("decoder table", decoder.table.shape, np.uint8)
        workspace = pool.take("decoder workspace", (decoder.workspace_bytes,), np.uint8)
        embeddings = self._weights["embed"][words]
        self._stream.upload(decoder.table, table)
        self._stream.clear(workspace)  # the kernel's to write alone from here on
        stream = self._stream.handle

        def step(token: int, position: int, rotation: int) -> None:
            embedding = rows(embeddings, token, token + 1)
            memory = {"logits": logits, "table": table, "workspace": workspace}
            decoder.enqueue(embedding, position, rotation, **memory, stream=stream)

        return step

    def _taken(self, graph: GraphName) -> dict[str, DeviceArray]:
        """The weights that a fused graph takes as inputs."""
        return {name: self._weights[graph][name] for name in self._manifest.graphs[graph].device_weights}

    def _in_place(self, tensors: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        """The plain decoder's tensors as those of the fused one: past and present are the whole cache."""
        spec, positions = self._specs["decoder"], tensors["positions"]
        tokens, taken = positions.shape[0], self._manifest.graphs["decoder"].device_weights
        _, last, *past = (t.name for t in spec.inputs if t.name not in taken)
        cache = [tensors[name] for name in self._cached]
        return {
            "embeddings": tensors["embeddings"],
            last: rows(positions, tokens - 1, tokens),
            **dict(zip(past, cache, strict=True)),
            "logits": tensors["logits"],
            **dict(zip((t.name for t in spec.outputs[1:]), cache, strict=True)),
        }


def _without_quantized_device_graphs(bundle: Bundle) -> Bundle:
    graphs = {n: replace(g, device=None) if g.quantization else g for n, g in bundle.manifest.graphs.items()}
    return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))


def _with_device_graphs(bundle: Bundle) -> Bundle:
    """A bundle with its device graphs in the place of the plain ones, where it has them."""
    graphs = {name: spec.device or spec for name, spec in bundle.manifest.graphs.items()}
    return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))


def _shape(manifest: Manifest, weights: Weights, capacity: int) -> DecoderShape:
    """The decoder's dimensions; the shapes of the weights have those that bundle.json has not."""
    spec, layer = manifest.decoder, "layers.0"
    return DecoderShape(
        layers=spec.layers,
        hidden_size=spec.hidden_size,
        heads=weights[f"{layer}.self_attn.o_proj.weight"].shape[0] // spec.head_dim,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        intermediate=weights[f"{layer}.mlp.gate_proj.weight"].shape[1],
        vocabulary=manifest.prompt.vocabulary,
        head_columns=weights["lm_head.weight"].shape[1],
        capacity=capacity,
        norm_eps=spec.norm_eps,
    )
