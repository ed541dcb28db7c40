"""A graph of a bundle, built from its definition: its linear layers, and its weights as the bundle stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from tango_calibration.quantization.arithmetic import scale_rows
from tango_calibration.quantization.ranges import Array
from tango_export.families import FAMILIES
from tango_export.graph import PORTABLE, Form, Graph, build
from tango_export.graph.builder import Read
from tango_plugins import TangoError
from tango_runtime.bundle import MANIFEST, Bundle, GraphName, Manifest

#: What is quantized together.
Part = Literal["vision", "decoder"]


def graphs_of(manifest: Manifest, part: Part) -> tuple[GraphName, ...]:
    """The graphs of a part, in order."""
    return ("vision",) if part == "vision" else manifest.decoders


class StoredGraph:
    """The definition of a graph, and its memory-mapped weights.

    Args:
        bundle: The bundle, in which the graph is not quantized.
        name: Name of the graph.

    Attributes:
        spec: Its entry in bundle.json.
        folder: Folder of its files.
        definition: Its layers.
        linears: Its linear layers, in order.
        linear_inputs: The tensors that they take, each once.

    Raises:
        TangoError: The bundle's family is unknown, or the graph differs from the family's definition.
    """

    def __init__(self, bundle: Bundle, name: GraphName) -> None:
        manifest = bundle.manifest
        family = FAMILIES.get(manifest.family)
        if family is None:
            raise TangoError(
                f"{bundle.path}: there is no model family {manifest.family!r}", f"known are {', '.join(FAMILIES)}"
            )
        self.folder, self.spec = bundle.path, manifest.graphs[name]
        self.definition = next(found for found in family.definitions(manifest) if found.name == name)
        self._dtype = manifest.dtype
        plain = self.build(PORTABLE)
        self.linears = plain.linears
        self.linear_inputs = list(dict.fromkeys(layer.input for layer in self.linears))
        stored = {key: (weight.dtype, weight.shape) for key, weight in (self.spec.weights or {}).items()}
        wanted = {weight.name: (weight.dtype, weight.shape) for weight in plain.weights}
        if (stored, self.spec.inputs, self.spec.outputs) != (wanted, plain.inputs, plain.outputs):
            raise TangoError(
                f"{bundle.path / MANIFEST}: graphs: {name} is another graph than config defines",
                "export the bundle again with this tango-edge",
            )

    def build(self, form: Form) -> Graph:
        """The graph in a form, with weights as the bundle stores them."""
        return build(self.definition, form, self._dtype, self.spec.weights or {})

    def read(self, name: str) -> Array:
        """A weight, memory-mapped from the data file."""
        weight = (self.spec.weights or {})[name]
        return np.memmap(self.folder / self.spec.data, weight.dtype, "r", weight.offset, weight.shape)

    def smoothed(self, smoothing: Mapping[str, Array]) -> Read:
        """Reads weights with smoothing folded in: a layer's rows grow by what the channels of its input shrink by.

        Args:
            smoothing: Powers of two [in] by layer; they are the same for all layers that take one input.
        """
        rows = {layer.weight: smoothing[layer.name] for layer in self.linears if layer.name in smoothing}
        columns = {
            gain: smoothing[layer.name] for layer in self.linears if layer.name in smoothing for gain in layer.gain
        }

        def read(name: str) -> Array:
            values = self.read(name)
            if name in rows:
                values = scale_rows(values, rows[name])
            if name in columns:
                values = values / columns[name].astype(values.dtype)
            return values

        return read
