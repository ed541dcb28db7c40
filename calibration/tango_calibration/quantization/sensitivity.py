"""Quantizes vision or the decoder: activation statistics, each layer's sensitivity, the choice of layers, new graphs.

A decoder with inner pruning consists of two graphs, which are measured together: a loss is that of the answer, and both
share one budget.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnxruntime

from tango_calibration.data.dataset import Video
from tango_calibration.quantization import replay
from tango_calibration.quantization.arithmetic import activation_aware_scaling, row_amax, smoothing
from tango_calibration.quantization.cache import ObservationCache
from tango_calibration.quantization.capture import Capture
from tango_calibration.quantization.clips import load_clip
from tango_calibration.quantization.formats import LayerFormat, Scheme, fused_quantizers, switches, takes
from tango_calibration.quantization.observe import Observer
from tango_calibration.quantization.ranges import Array, ChannelStats
from tango_calibration.quantization.replay import Sessions
from tango_calibration.quantization.stored import Part, StoredGraph, graphs_of
from tango_export.graph import PORTABLE, Form
from tango_export.graph.builder import Linear
from tango_export.graph.files import write_device, write_portable
from tango_plugins import TangoError
from tango_runtime.bundle import Bundle, GraphName, GraphSpec, Precision, Quantization, Runtime
from tango_runtime.util.console import progress

Found = TypeVar("Found")
Number = TypeVar("Number", int, float)

#: Formats of a precision: for most layers, then for those that would lose too much. A layer may also stay unquantized.
FORMATS: dict[Precision, tuple[LayerFormat, ...]] = {"int8": ("w8a8",), "fp8": ("fp8",), "int4": ("w4a16", "w8a16")}

#: Maximum loss of all quantized layers of a part together. Vision: noise over signal of its outputs. Decoder: KL
#: divergence of the next token's distribution, in nats.
BUDGETS: dict[Part, float] = {"vision": 0.01, "decoder": 0.02}

#: A layer is an outlier if its loss is this many times the median.
OUTLIER_FACTOR = 10
#: Outliers are excluded as long as they have no more than this share of the weights.
MAX_OUTLIER_SHARE = 0.1

#: Number of steps in which more layers are excluded.
_EXCLUSION_STEPS = 8

#: Number of sessions over which the layers of a part are spread, to measure each alone. On a GPU, opening one takes as
#: long as many runs.
_SESSIONS = {replay.CPU: 10, replay.CUDA: 2}

#: Clips that losses are measured on; for vision, one frame of each.
_LOSS_CLIPS = 8


@dataclass(frozen=True)
class LayerSensitivity:
    """A layer, and the loss of its part if only this layer is quantized.

    Attributes:
        layer: Its name.
        loss: The loss in the precision's first format, in the unit of ``BUDGETS``; NaN if it was not measured.
        format: The chosen format; None leaves the layer unquantized.
        scaled: Whether the channels of its input are scaled.
    """

    layer: str
    loss: float
    format: LayerFormat | None
    scaled: bool = False


@dataclass(frozen=True)
class QuantizedPart:
    """The quantized vision graph or decoder.

    Attributes:
        precision: The requested precision.
        layers: Its layers, in the order of its graphs.
        loss: Its loss after quantization, on the same clips as the layers' losses; NaN if they were not measured.
        bytes_before: Size of its graphs and their weights in the old bundle, without device graphs.
        bytes_after: Size of its graphs and their weights in the new bundle.
    """

    precision: Precision
    layers: tuple[LayerSensitivity, ...]
    loss: float
    bytes_before: int
    bytes_after: int

    @property
    def excluded(self) -> tuple[LayerSensitivity, ...]:
        """Layers that do not have the precision's first format."""
        return tuple(layer for layer in self.layers if layer.format != FORMATS[self.precision][0])


class PartQuantizer:
    """Vision or a decoder to be quantized, with the clips to measure it on.

    Args:
        bundle: The bundle.
        part: Vision or decoder.
        precision: The new precision.
        block: Weights that share a scale in int4.
        cache: Cache of the losses.
        observer: Runs the graph on the clips.
        videos: The clips.
        captures: What the pipeline computed for each clip.
    """

    def __init__(
        self,
        bundle: Bundle,
        part: Part,
        precision: Precision,
        block: int,
        cache: ObservationCache,
        observer: Observer,
        videos: Sequence[Video],
        captures: Sequence[Capture],
    ) -> None:
        self.part, self._precision, self._block = part, precision, block
        self._bundle, self._cache, self._videos, self._captures = bundle, cache, videos, captures
        self._observer = observer
        self._stored = {name: StoredGraph(bundle, name) for name in graphs_of(bundle.manifest, part)}
        self._layers = [layer for stored in self._stored.values() for layer in stored.linears]
        self._graph = {layer.name: name for name, stored in self._stored.items() for layer in stored.linears}
        self._inputs = list(dict.fromkeys(layer.input for layer in self._layers))

    def choose(self) -> tuple[Scheme, tuple[LayerSensitivity, ...]]:
        """Measures the activations and each layer's loss; chooses formats, and which inputs are scaled.

        Losses of single layers do not tell whether to scale: on models/tiny, scaling every input whose layers lost less
        with it more than doubled the loss of all layers together. So formats are chosen with and without scaling, and
        the choice with the smaller loss is taken.
        """
        choices = [(scheme, self._choose_formats(scheme)) for scheme in self._schemes()]
        return choices[0] if len(choices) == 1 else min(choices, key=lambda choice: self._loss_of(*choice))

    def take_all(self) -> tuple[Scheme, tuple[LayerSensitivity, ...]]:
        """The precision's first format for every layer that can have it; measures no more than activations."""
        form = FORMATS[self._precision][0]
        scheme = Scheme({}, block=self._block) if form == "w4a16" else self._schemes()[0]
        impossible = self._impossible(form)
        return scheme, tuple(
            LayerSensitivity(
                layer.name, math.nan, None if layer.input in impossible else form, layer.name in scheme.smoothing
            )
            for layer in self._layers
        )

    # Statistics

    def _schemes(self) -> list[Scheme]:
        """The schemes to choose from, without formats."""
        stats = self._observer.channel_stats(self.part, self._videos, self._captures)
        if self._precision == "int4":
            plain = Scheme({}, mean_squares=self._by_layer(stats.mean_squares()), block=self._block)
            scaling = self._better(plain, self._scaling(stats))
            return [plain, plain.scaled(scaling)] if scaling else [plain]
        # E4M3 has the same precision over 15 octaves, so an outlier takes none from the other channels.
        smooth = self._smoothing(stats) if (self.part, self._precision) == ("decoder", "int8") else {}
        takers = {layer.input: layer.name for layer in self._layers}
        ranges = stats.ranges([smooth.get(takers[name], 1.0) for name in self._inputs])
        return [Scheme({}, self._by_layer(ranges), smooth)]

    def _scaling(self, stats: ChannelStats) -> dict[str, Array]:
        """AWQ's factors for the layers whose input has a gain to absorb them; layers with one input share them."""
        found: dict[str, Array] = {}
        with progress(f"{self.part} scaling", len(self._inputs)) as on_progress:
            for name, mean_squares in zip(self._inputs, stats.mean_squares(), strict=True):
                if layers := self._with_gain(name):
                    weights = [self._read(layer) for layer in layers]
                    factors = activation_aware_scaling(weights, mean_squares, self._block)
                    if (factors != 1).any():
                        found |= dict.fromkeys((layer.name for layer in layers), factors)
                on_progress(1)
        return found

    def _better(self, plain: Scheme, scaling: Mapping[str, Array]) -> dict[str, Array]:
        """The factors of the inputs whose layers, each quantized alone, lose less with them."""
        form, inputs = FORMATS[self._precision][0], {layer.name: layer.input for layer in self._layers}
        before, after = (
            _sums(self._losses(scheme, form, list(scaling)), inputs) for scheme in (plain, plain.scaled(scaling))
        )
        return {name: s for name, s in scaling.items() if after[inputs[name]] < before[inputs[name]]}

    def _loss_of(self, scheme: Scheme, layers: Sequence[LayerSensitivity]) -> float:
        """Loss with the chosen formats; infinite if no layer has one."""
        formats = _formats(layers)
        if not formats:
            return math.inf
        form = replace(scheme, formats=formats).portable()
        scaling = {name: factors.tolist() for name, factors in scheme.smoothing.items()}
        what = f"of {formats} {scheme.block} {scaling}"
        return self._cached_loss(what, lambda: self._loss(self._open(dict.fromkeys(self._stored, form))))

    def _cached_loss(self, what: str, measure: Callable[[], float]) -> float:
        """A loss on the clips, from the cache or measured."""
        clips = [self._cache.key(video, self.part) for video in self._videos]
        key = hashlib.sha256(f"loss {self.part} {what} {clips}".encode()).hexdigest()[:24]
        return float(self._cache.arrays(key, lambda: {"loss": np.array(measure())})["loss"])

    def _with_gain(self, name: str) -> list[Linear]:
        """The layers that take an input whose channels can be scaled."""
        return [layer for layer in self._layers if layer.input == name and layer.gain]

    def _read(self, layer: Linear) -> Array:
        """The weight of a layer."""
        return self._stored[self._graph[layer.name]].read(layer.weight)

    def _by_layer(self, of_inputs: Sequence[Found]) -> dict[str, Found]:
        found = dict(zip(self._inputs, of_inputs, strict=True))
        return {layer.name: found[layer.input] for layer in self._layers}

    def _decode(self, sessions: Sessions, capture: Capture) -> Iterator[tuple[GraphName, list[Array]]]:
        return replay.run_decoder(sessions, self._bundle.manifest.graphs, capture.decoder_input)

    def _smoothing(self, stats: ChannelStats) -> dict[str, Array]:
        """Powers of two for the layers whose input has a gain to absorb them; layers with one input share them."""
        found: dict[str, Array] = {}
        for name, amax in zip(self._inputs, stats.amax, strict=True):
            if layers := self._with_gain(name):
                rows = np.maximum.reduce([row_amax(self._read(layer)) for layer in layers])
                found |= dict.fromkeys((layer.name for layer in layers), smoothing(amax, rows))
        return found

    # Sensitivity

    def _choose_formats(self, scheme: Scheme) -> tuple[LayerSensitivity, ...]:
        """Measures the loss of each layer alone and chooses its format.

        Layers that lose too much in one format are measured in the next, with the rest of the budget. Layers with one
        input have one format, because a decode step reads gate and up together.
        """
        inputs = {layer.name: layer.input for layer in self._layers}
        sizes = _sums({layer.name: layer.fan_in * layer.fan_out for layer in self._layers}, inputs)
        left, budget = list(inputs), BUDGETS[self.part]
        formats: dict[str, LayerFormat] = {}
        first: dict[str, float] = {}
        for form in FORMATS[self._precision]:
            losses = self._losses(scheme, form, left)
            first = first or losses
            excluded = layers_to_exclude(_sums(losses, inputs), sizes, budget)
            excluded |= self._impossible(form)
            kept = [name for name in left if inputs[name] not in excluded]
            formats |= dict.fromkeys(kept, form)
            budget -= math.fsum(losses[name] for name in kept)
            left = [name for name in left if inputs[name] in excluded]
            if not left:
                break
        return tuple(
            LayerSensitivity(name, loss, formats.get(name), name in scheme.smoothing) for name, loss in first.items()
        )

    def _impossible(self, form: LayerFormat) -> set[str]:
        """Inputs of layers that cannot have a format, for their widths."""
        return {layer.input for layer in self._layers if not takes(form, layer)}

    def _losses(self, scheme: Scheme, form: LayerFormat, names: Sequence[str]) -> dict[str, float]:
        """Loss of the part for each layer, when only this layer has a format.

        A session has several layers both plain and quantized: opening one takes longer than running a clip, and with
        all layers in one session, every pass would compute all of them twice. Only new weights are made, so the other
        layers are not smoothed.
        """
        losses = dict[str, float]()

        def measure(name: str, group: Sequence[str], sessions: Callable[[], Sessions]) -> float:
            graph, opened = self._graph[name], sessions()
            return self._loss({**opened, graph: opened[graph].given(switches(group, name))})

        with progress(f"{self.part} {form}", len(names)) as on_progress:
            for group in self._groups(names):
                both_ways = replace(scheme, formats=dict.fromkeys(group, form)).switched()
                sessions = cache(partial(self._open, {self._graph[group[0]]: both_ways}))  # opened if a loss is unknown
                for name in group:
                    scaling = scheme.smoothing.get(name, np.empty(0))
                    what = f"{name} {form} {scheme.block} {scaling.tolist()}"
                    losses[name] = self._cached_loss(what, partial(measure, name, group, sessions))
                    on_progress(1)
        return losses

    def _groups(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        """Groups of layers of one graph, whose losses are measured with the same sessions."""
        size = -(-len(names) // _SESSIONS[self._observer.backend])
        for graph in self._stored:
            own = [name for name in names if self._graph[name] == graph]
            yield from (own[begin : begin + size] for begin in range(0, len(own), size))

    def _open(self, forms: Mapping[GraphName, Form]) -> Sessions:
        """The graphs, some of them in another form."""
        backend = self._observer.backend
        return {
            name: replay.open_graph(stored, forms.get(name, PORTABLE), backend=backend)
            for name, stored in self._stored.items()
        }

    @cached_property
    def _loss(self) -> Callable[[Sessions], float]:
        """A function that maps sessions to their loss against the original graphs, which run once.

        It raises a TangoError if a loss is not finite, as with the 4-bit products of ONNX Runtime 1.22.
        """
        run: Callable[[Sessions], list[Array]]
        if self.part == "vision":
            clips = [load_clip(self._bundle, video).steps for video in self._videos[:_LOSS_CLIPS]]
            middle_frames = np.stack([frames[len(frames) // 2] for frames in clips])
            run, compare = partial(self._run_vision, middle_frames), noise
        else:
            run, compare = self._run_decoder, divergence
        original = run(self._open({}))

        def loss(sessions: Sessions) -> float:
            if math.isfinite(found := compare(original, run(sessions))):
                return found
            raise TangoError(
                f"{self.part} in {self._precision} gives no finite numbers on ONNX Runtime {onnxruntime.__version__}",
                "install a newer onnxruntime",
            )

        return loss

    def _run_vision(self, frames: Array, sessions: Sessions) -> list[Array]:
        """Features and salience of all frames."""
        outputs = replay.run_vision(sessions["vision"], frames)
        return [np.concatenate(tensors) for tensors in zip(*outputs, strict=True)]

    def _run_decoder(self, sessions: Sessions) -> list[Array]:
        """Logits at the end of each prompt and after each token of its answer."""
        logits, last = list[Array](), list(self._stored)[-1]
        for capture in self._captures[:_LOSS_CLIPS]:
            passes = [outputs[0] for graph, outputs in self._decode(sessions, capture) if graph == last]
            logits += passes[-1 - len(capture.decoder_input.answer) :]
        return logits

    def exclude_until(
        self, scheme: Scheme, layers: Sequence[LayerSensitivity], accepts: Callable[[Sessions], bool]
    ) -> tuple[LayerSensitivity, ...]:
        """Excludes more layers, in the order of their losses, until the result is accepted.

        How many are excluded matters more than which: on an earlier models/tiny, layers chosen by how many kept tokens
        each of them changes did no better than layers chosen by their loss.

        Raises:
            TangoError: Nothing is accepted.
        """
        worst = sorted((layer for layer in layers if layer.format), key=lambda layer: -layer.loss)
        for count in range(0, len(worst), -(-len(layers) // _EXCLUSION_STEPS)):
            excluded = {layer.layer for layer in worst[:count]}
            tried = tuple(replace(layer, format=None) if layer.layer in excluded else layer for layer in layers)
            form = replace(scheme, formats=_formats(tried)).portable()
            if accepts(self._open(dict.fromkeys(self._stored, form))):
                return tried
        raise TangoError(
            f"{self.part} keeps other tokens even with most layers excluded",
            f"accept a lower --min-overlap, or keep the graph: --{self.part} fp16",
        )

    # Output

    def write(
        self, folder: Path, scheme: Scheme, layers: Sequence[LayerSensitivity], runtime: Runtime, *, measured: bool
    ) -> tuple[QuantizedPart, dict[GraphName, GraphSpec]]:
        """Writes the graphs that have layers with a format, and measures the loss if it is to be ``measured``.

        Smoothing is folded into the weights. For ONNX Runtime, an fp16 graph that can have a device form is also
        written in that form, on the same weights.

        Returns:
            The result, and the entries of the written graphs in bundle.json. A graph without such layers is not
            written.

        Raises:
            TangoError: No layer has a format.
        """
        formats = _formats(layers)
        if not formats:
            raise TangoError(
                f"every layer of {self.part} loses too much in {self._precision}",
                f"use more clips (--videos), or keep the graph: --{self.part} fp16",
            )
        scheme = replace(scheme, formats=formats, float_weights=runtime == "tensorrt")
        places = {name: (stored.folder, stored.spec) for name, stored in self._stored.items()}
        written = {
            name: self._write(folder, self._stored[name], scheme, runtime)
            for name in dict.fromkeys(self._graph[layer] for layer in formats)
        }
        before = sum(_size(*place) for place in places.values())
        places |= {name: (folder, spec) for name, spec in written.items()}
        loss = math.nan
        if measured:
            loss = self._loss({name: replay.open_written(*at, self._observer.backend) for name, at in places.items()})
        after = sum(_size(*place) for place in places.values())
        part = QuantizedPart(self._precision, tuple(layers), loss, before, after)
        return part, {name: self._with_entry(name, spec, part) for name, spec in written.items()}

    def _write(self, folder: Path, stored: StoredGraph, scheme: Scheme, runtime: Runtime) -> GraphSpec:
        read, scheme = stored.smoothed(scheme.smoothing), replace(scheme, smoothing={})
        graph = stored.build(scheme.portable())
        size = sum(weight.bytes for weight in graph.weights)
        with progress(f"{stored.definition.name} write", size, size=True) as on_progress:
            spec = write_portable(graph, read, folder, on_progress)
        if runtime == "onnxruntime" and stored.spec.device is not None:
            spec = write_device(fused_quantizers(stored.build(scheme.device())), spec, read, folder)
        return spec

    def _with_entry(self, graph: GraphName, spec: GraphSpec, part: QuantizedPart) -> GraphSpec:
        """The entry of a graph in bundle.json, with its quantization."""
        excluded = tuple(layer.layer for layer in part.excluded if self._graph[layer.layer] == graph)
        return replace(spec, quantization=Quantization(self._precision, len(self._videos), excluded))


def _size(folder: Path, spec: GraphSpec) -> int:
    """Bytes of a graph and its weights."""
    return sum((folder / file).stat().st_size for file in (spec.file, spec.data))


def _formats(layers: Sequence[LayerSensitivity]) -> dict[str, LayerFormat]:
    return {layer.layer: layer.format for layer in layers if layer.format}


def _sums(of_layers: Mapping[str, Number], inputs: Mapping[str, str]) -> dict[str, Number]:
    """Sums values of layers over the layers that take the same input."""
    sums = dict[str, Number]()
    for layer, value in of_layers.items():
        sums[inputs[layer]] = sums[inputs[layer]] + value if inputs[layer] in sums else value
    return sums


def layers_to_exclude(losses: Mapping[str, float], sizes: Mapping[str, int], budget: float) -> set[str]:
    """Chooses the layers to exclude from a format.

    First come outliers that cost little: vision's first and last layers cause nine tenths of the noise that could
    change the kept tokens, with a few hundredths of the weights. Then come the worst layers, until the losses of the
    others add up to no more than the budget. The losses of single layers add up to about the loss of all of them.

    Args:
        losses: Loss of each layer alone.
        sizes: Number of weights of each layer.
        budget: Maximum loss of all remaining layers together.
    """
    excluded: set[str] = set()
    worst = sorted(losses, key=lambda name: -losses[name])
    median, room = float(np.median(list(losses.values()))), MAX_OUTLIER_SHARE * sum(sizes.values())
    for name in worst:
        if losses[name] > OUTLIER_FACTOR * median and sizes[name] <= room:
            excluded.add(name)
            room -= sizes[name]
    kept = [name for name in worst if name not in excluded]
    while kept and math.fsum(losses[name] for name in kept) > budget:
        excluded.add(kept.pop(0))
    return excluded


def noise(original: Sequence[Array], quantized: Sequence[Array]) -> float:
    """Noise over signal, as squared sums; the maximum over the outputs."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(original, quantized, strict=True)]
    return max(float(((a - b) ** 2).sum() / (a**2).sum()) for a, b in pairs)


def divergence(original: Sequence[Array], quantized: Sequence[Array]) -> float:
    """Kullback-Leibler divergence of the next token's distribution from the original's, mean in nats."""
    pairs = [(_log_softmax(a), _log_softmax(b)) for a, b in zip(original, quantized, strict=True)]
    return float(np.mean([(np.exp(p) * (p - q)).sum() for p, q in pairs]))


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
