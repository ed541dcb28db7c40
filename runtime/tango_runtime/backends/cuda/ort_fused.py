"""A bundle's device graphs on ONNX Runtime's CUDA provider, with the operators of the CUDA library.

The graphs take their weights as inputs. These lie in the device's memory once and are bound once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tango_plugins.device_array import DeviceArray
from tango_runtime.backends.cuda.device import Pool, Stream
from tango_runtime.backends.cuda.device_decoder import DeviceDecoder
from tango_runtime.backends.cuda.ort_runner import CUDA, OrtRunner
from tango_runtime.backends.cuda.runner import BatchedStep, DeviceStep, Run
from tango_runtime.backends.cuda.weights import upload_weights
from tango_runtime.bundle import Bundle, GraphName
from tango_runtime.sizing import memory


class FusedOrtRunner(OrtRunner):
    """Sessions of a bundle's device graphs, where it has them, and of its plain ones; made as :class:`OrtRunner`."""

    def __init__(
        self,
        onnxruntime: Any,
        bundle: Bundle,
        stream: Stream,
        provider: tuple[str, str] = CUDA,
        operators: Path | None = None,
    ) -> None:
        plain, last = bundle.manifest.graphs, bundle.manifest.decoders[-1]
        self.waiting = [graph for graph in OrtRunner.waiting if graph in plain and not plain[graph].device]
        if plain["vision"].device:
            self.steps_at_once, self.fuses_vision = memory.STEPS_AT_ONCE, True
        if plain[last].device:
            self.in_place, self.tokens_at_once = True, memory.TOKENS_AT_ONCE
            self.capacity = bundle.manifest.decoder.context  # the decode kernel of a cache is made for its length
        load = partial(super().__init__, onnxruntime, _with_device_graphs(bundle), stream, provider, operators)
        taken = [graph for graph, spec in plain.items() if spec.device_weights and graph != "embed"]  # see word_table()
        weights = upload_weights(bundle, taken, load)
        if operators is not None:
            for each in weights.values():
                each.interleave(stream, operators)
        self._decoder = DeviceDecoder(bundle.manifest, weights, stream) if self.in_place else None
        self._weights, self._plain = weights, plain
        # Once: of a binding that is made anew, what is not named stays.
        for graph in weights:
            self._bind(graph, self._taken(graph))

    def dtype(self, graph: GraphName, tensor: str) -> str:
        """The graph's own type of a tensor."""
        return self._decoder.positions if self._decoder and tensor == "positions" else super().dtype(graph, tensor)

    def bind(self, graph: GraphName, tensors: Mapping[str, DeviceArray], *, replay: bool = False) -> Run:
        """Prepares a session to read and write these tensors; gives the function that runs it."""
        if graph == "vision" or self._decoder is None:
            return super().bind(graph, tensors, replay=replay)
        weights = self._taken(graph) if replay else {}  # that binding is another
        return self._bind(graph, self._decoder.tensors(graph, tensors) | weights, replay)

    def step(self, cache: Sequence[DeviceArray], pool: Pool) -> DeviceStep | None:
        """The CUDA library's, where the decoder has a device graph."""
        return self._decoder.step(cache, pool) if self._decoder else None

    def batched_step(self, pool: Pool) -> BatchedStep | None:
        """The CUDA library's, where the decoder's graph is a device graph."""
        return self._decoder.batched_step(pool) if self._decoder else None

    def _taken(self, graph: GraphName) -> dict[str, DeviceArray]:
        """The weights that a device graph takes as inputs."""
        return {name: self._weights[graph][name] for name in self._plain[graph].device_weights}


def _with_device_graphs(bundle: Bundle) -> Bundle:
    """A bundle with its device graphs in the place of the plain ones, where it has them."""
    graphs = {name: spec.device or spec for name, spec in bundle.manifest.graphs.items()}
    return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))
