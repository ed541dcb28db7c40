"""One graph: what its layers see, what each of them loses when it is quantised, and the new graph."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import ModelProto

from tango_calibration.data.dataset import Video
from tango_calibration.quantization import observe
from tango_calibration.quantization.observe import Array, Cache, Channels, Histograms, Method, Watched
from tango_calibration.quantization.quantize import (
    Embedded,
    Form,
    Linear,
    Scheme,
    Weights,
    linears,
    quantize,
    read_graph,
    smoothing,
    written,
)
from tango_plugins import TangoError
from tango_runtime.bundle import Bundle, GraphName, Precision
from tango_runtime.util.console import progress

#: What a precision makes of a layer, and then of one that would lose too much; beyond them it stays as it was.
FORMS: dict[Precision, tuple[Form, ...]] = {"int8": ("w8a8",), "fp8": ("fp8",), "int4": ("w4a16", "w8a16")}

#: What all quantised layers of a graph together may lose: of vision, noise over signal of its outputs; of the decoder,
#: nats between the distributions of the next token.
BUDGETS: dict[GraphName, float] = {"vision": 0.01, "decoder": 0.02}

#: A layer that loses so many times what the middle one loses stands out,
STANDS_OUT = 10
#: and those that stand out are spared as long as they hold no more than this share of the weights.
CHEAP = 0.1

#: Steps in which more layers are spared until a graph will do.
_STEPS = 8

#: Clips that losses are measured on, of vision one frame each.
_WEIGHED = 8


@dataclass(frozen=True)
class Weighed:
    """A layer, and what the graph loses when only it is quantised.

    Attributes:
        layer: Its name.
        loss: In the first of the precision's forms, in the unit of ``BUDGETS``.
        form: The one that it takes; None leaves it as it was.
    """

    layer: str
    loss: float
    form: Form | None


@dataclass(frozen=True)
class Quantized:
    """What was done to a graph.

    Attributes:
        precision: What was asked for.
        layers: Its layers, in the graph's order.
        loss: What the graph loses as it was written, on the clips that the layers were weighed on.
        before: Bytes of its files in the old bundle.
        after: In the new one.
    """

    precision: Precision
    layers: tuple[Weighed, ...]
    loss: float
    before: int
    after: int

    @property
    def spared(self) -> tuple[Weighed, ...]:
        """Layers that did not take the precision's first form."""
        return tuple(layer for layer in self.layers if layer.form != FORMS[self.precision][0])


class GraphWork:
    """A graph to be quantised, and the clips that tell how.

    Args:
        bundle: The bundle.
        name: Vision or decoder.
        precision: What it is to have.
        method: How the ranges of 8-bit activations are found.
        cache: Where observations and losses are kept.
        videos: The clips.
        watched: What came of them in the chain.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: GraphName,
        precision: Precision,
        method: Method,
        cache: Cache,
        videos: Sequence[Video],
        watched: Sequence[Watched],
    ) -> None:
        self.name, self._precision, self._method = name, precision, method
        self._bundle, self._cache, self._videos, self._watched = bundle, cache, videos, watched
        self._model = read_graph(bundle.graph(name))
        self._weights = Weights(self._model, bundle.path)
        self._layers = linears(self._model)
        self._inputs = list(dict.fromkeys(layer.input for layer in self._layers))

    # Observing

    def observe(self) -> Scheme:
        """What every form needs to know of the layers; none has a form yet."""
        if self._precision == "int4":
            return Scheme({}, energies=dict(zip(self._inputs, self._channels().energies(), strict=True)))
        # E4M3 has the same precision over 15 octaves: an outlier takes nothing from the other channels.
        smooth = self._smoothing(self._channels()) if (self.name, self._precision) == ("decoder", "int8") else {}
        histograms = self._histograms(smooth)
        return Scheme({}, dict(zip(self._inputs, histograms.ranges(self._method), strict=True)), smooth)

    def _channels(self) -> Channels:
        session = cache(self._observing)

        def made(i: int) -> Channels:
            return reduce(Channels.merge, map(Channels.of, self._passes(session(), i)))

        with progress(f"{self.name} channels", len(self._videos)) as on_progress:
            videos = enumerate(observe.counted(self._videos, on_progress))
            each = [self._cache.channels(video, self.name, partial(made, i)) for i, video in videos]
        return reduce(Channels.merge, each)

    def _histograms(self, smooth: Mapping[str, Array]) -> Histograms:
        session = cache(self._observing)
        divisors = [smooth.get(name, np.float32(1)) for name in self._inputs]

        def made(i: int) -> Histograms:
            passes = self._passes(session(), i)
            scaled = ([x / s for x, s in zip(tensors, divisors, strict=True)] for tensors in passes)
            return reduce(Histograms.merge, map(Histograms.of, scaled))

        digest = hashlib.sha256(b"".join(name.encode() + s.tobytes() for name, s in smooth.items())).hexdigest()
        with progress(f"{self.name} ranges", len(self._videos)) as on_progress:
            videos = enumerate(observe.counted(self._videos, on_progress))
            each = [self._cache.histograms(video, f"{self.name} {digest}", partial(made, i)) for i, video in videos]
        return reduce(Histograms.merge, each)

    def _smoothing(self, channels: Channels) -> dict[str, Array]:
        peaks = dict(zip(self._inputs, channels.peaks, strict=True))
        readers: dict[str, list[Linear]] = {}
        for layer in self._layers:
            readers.setdefault(layer.input, []).append(layer)
        return {
            name: smoothing(peaks[name], np.maximum.reduce([_row_peaks(self._weights[m.weight]) for m in layers]))
            for name, layers in readers.items()
            if layers[0].gain
        }

    def _observing(self) -> onnxruntime.InferenceSession:
        return observe.open_graph(self._model, self._bundle.path, self._inputs)

    def _passes(self, session: onnxruntime.InferenceSession, i: int) -> Iterator[list[Array]]:
        """What the layers take, pass by pass over a clip."""
        if self.name == "vision":
            frames, _ = observe.see(self._bundle, self._videos[i])
            return (outputs[2:] for outputs in observe.run_vision(session, frames))
        return (outputs[1:] for outputs in self._decoded(session, self._watched[i]))

    def _decoded(self, session: onnxruntime.InferenceSession, watched: Watched) -> Iterator[list[Array]]:
        return observe.run_decoder(session, self._bundle.manifest.graphs["decoder"].inputs, watched.prompted)

    # Weighing

    def weigh(self, scheme: Scheme) -> tuple[Weighed, ...]:
        """Measures each layer's loss alone and gives each a form.

        Those that lose too much in one form are weighed in the next, with what is left of the budget.
        """
        sizes = {layer.name: math.prod(self._weights.shape(layer.weight)) for layer in self._layers}
        left, budget = list(sizes), BUDGETS[self.name]
        forms: dict[str, Form] = {}
        first: dict[str, float] = {}
        for form in FORMS[self._precision]:
            losses = self._losses(scheme, form, left)
            first = first or losses
            spared = too_much(losses, sizes, budget)
            forms |= {name: form for name in left if name not in spared}
            budget -= math.fsum(losses[name] for name in left if name not in spared)
            left = [name for name in left if name in spared]
        return tuple(Weighed(name, loss, forms.get(name)) for name, loss in first.items())

    def _losses(self, scheme: Scheme, form: Form, names: Sequence[str]) -> dict[str, float]:
        """What the graph loses when one layer takes this form."""
        loss = cache(self._loss)
        clips = [self._cache.key(video, self.name) for video in self._videos]
        about = f"{form} {self._method if form in ('w8a8', 'fp8') else ''} {clips}"

        def measured(name: str) -> dict[str, Array]:
            model = quantize(self._model, self._weights, replace(scheme, forms={name: form}), Embedded())
            return {"loss": np.array(loss()(model, self._bundle.path))}

        losses = {}
        with progress(f"{self.name} {form}", len(names)) as on_progress:
            for name in names:
                key = hashlib.sha256(f"loss {self.name} {name} {about}".encode()).hexdigest()[:24]
                losses[name] = float(self._cache.arrays(key, partial(measured, name))["loss"])
                on_progress(1)
        return losses

    def _loss(self) -> Callable[[ModelProto, Path], float]:
        """A function that gives the loss of a graph, its weights in a folder, against the original."""
        if self.name == "vision":
            clips = [observe.see(self._bundle, video)[0] for video in self._videos[:_WEIGHED]]
            middles = np.stack([frames[len(frames) // 2] for frames in clips])
            return self._against_original(partial(self._see, middles), noise)
        return self._against_original(self._speak, divergence)

    def _against_original(
        self, run: Callable[[ModelProto, Path], list[Array]], compare: Callable[[list[Array], list[Array]], float]
    ) -> Callable[[ModelProto, Path], float]:
        original = run(self._model, self._bundle.path)
        return lambda model, folder: compare(original, run(model, folder))

    def _see(self, frames: Array, model: ModelProto, folder: Path) -> list[Array]:
        """Features of all frames, and their salience."""
        outputs = observe.run_vision(observe.open_graph(model, folder), frames)
        return [np.concatenate(tensors) for tensors in zip(*outputs, strict=True)]

    def _speak(self, model: ModelProto, folder: Path) -> list[Array]:
        """Logits at the end of each prompt and after each token of its answer."""
        session, logits = observe.open_graph(model, folder), list[Array]()
        for watched in self._watched[:_WEIGHED]:
            every = [outputs[0] for outputs in self._decoded(session, watched)]
            logits += every[-1 - len(watched.prompted.answer) :]
        return logits

    def spare_until(
        self, scheme: Scheme, weighed: Sequence[Weighed], enough: Callable[[ModelProto, Path], bool]
    ) -> tuple[Weighed, ...]:
        """Spares further layers, those that lose most first, until a graph will do.

        Which are spared matters little beside how many: on an earlier models/tiny, layers chosen by how many kept
        tokens each changes alone did no better than layers chosen by their loss.

        Raises:
            TangoError: No graph will do.
        """
        worst = sorted((w for w in weighed if w.form), key=lambda w: -w.loss)
        for more in range(0, len(worst), -(-len(weighed) // _STEPS)):
            spared = {w.layer for w in worst[:more]}
            tried = tuple(replace(w, form=None) if w.layer in spared else w for w in weighed)
            model = quantize(self._model, self._weights, replace(scheme, forms=_forms(tried)), Embedded())
            if enough(model, self._bundle.path):
                return tried
        raise TangoError(
            f"{self.name} keeps other tokens even with most layers left as they were",
            f"ask for less (--min-overlap), or leave it: --{self.name} fp16",
        )

    # Writing

    def write(self, folder: Path, scheme: Scheme, weighed: Sequence[Weighed]) -> Quantized:
        """Writes the graph as it was decided, and looks what it loses.

        Raises:
            TangoError: No layer was left to be quantised.
        """
        forms = _forms(weighed)
        if not forms:
            raise TangoError(
                f"every layer of {self.name} loses too much in {self._precision}",
                f"observe more clips (--videos), or leave it: --{self.name} fp16",
            )
        file = folder / self._bundle.manifest.graphs[self.name].file
        with progress(f"{self.name} write", 1) as on_progress:
            written(file, self._weights, replace(scheme, forms=forms), self._model)
            on_progress(1)
        loss = self._loss()(read_graph(file), folder)
        before = [spec.size for name, spec in self._bundle.manifest.files.items() if name.startswith(file.name)]
        after = [path.stat().st_size for path in folder.glob(f"{file.name}*")]
        return Quantized(self._precision, tuple(weighed), loss, sum(before), sum(after))


def _forms(weighed: Sequence[Weighed]) -> dict[str, Form]:
    return {w.layer: w.form for w in weighed if w.form}


def _row_peaks(weight: Array) -> Array:
    """The largest magnitude of each row, without a copy of the matrix."""
    return np.asarray(np.maximum(weight.max(1), -weight.min(1)), np.float32)


def too_much(losses: Mapping[str, float], sizes: Mapping[str, int], budget: float) -> set[str]:
    """The layers to be spared.

    First those that stand out and cost little: vision's first and last layers make nine tenths of the noise that could
    change which tokens are kept, and hold a few hundredths of the weights. Then the worst, until the losses of the
    others, each alone, add up to no more than the budget; losses of single layers add up to about that of all.

    Args:
        losses: Of each layer alone.
        sizes: Weights of each layer.
        budget: What all together may lose.
    """
    spared: set[str] = set()
    worst = sorted(losses, key=lambda name: -losses[name])
    middle, room = float(np.median(list(losses.values()))), CHEAP * sum(sizes.values())
    for name in worst:
        if losses[name] > STANDS_OUT * middle and sizes[name] <= room:
            spared.add(name)
            room -= sizes[name]
    kept = [name for name in worst if name not in spared]
    while kept and math.fsum(losses[name] for name in kept) > budget:
        spared.add(kept.pop(0))
    return spared


def noise(original: Sequence[Array], quantized: Sequence[Array]) -> float:
    """Noise over signal, squared sums, of whichever output has more of it."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(original, quantized, strict=True)]
    return max(float(((a - b) ** 2).sum() / (a**2).sum()) for a, b in pairs)


def divergence(original: Sequence[Array], quantized: Sequence[Array]) -> float:
    """Kullback-Leibler divergence of the next token's distribution from the original's, mean in nats."""
    pairs = [(_log_softmax(a), _log_softmax(b)) for a, b in zip(original, quantized, strict=True)]
    return float(np.mean([(np.exp(p) * (p - q)).sum() for p, q in pairs]))


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
