"""Each graph of a bundle against the original model, teacher-forced.

Both are given the same inputs at every stage, so that one stage's rounding does not hide in the next. The bundle runs
on ONNX Runtime's CPU engine in its own dtype, the original on transformers in fp32; that of the operator is the
reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tango_export.export import find_preset, open_model
from tango_export.families.base import Model, Reference
from tango_plugins import TangoError, op
from tango_plugins.reference import prune
from tango_runtime.backends.ort_cpu import cache_inputs, empty_cache, open_session, ort_errors
from tango_runtime.backends.rotary import RotaryIds
from tango_runtime.bundle import Bundle, GraphName, GraphSpec
from tango_runtime.util.console import progress
from tango_runtime.util.errors import first_line
from tango_runtime.video.shape import ClipShape

#: A cosine alone is blind to scale, so the norm is compared too.
MIN_COSINE, MAX_NORM_ERROR = 0.999, 0.01

_FRAMES, _PROMPT, _STEPS = 3, 48, 4

#: Where frames have any size: rows and columns of the tokens of one step, and text before the video in the prompt.
_TOKENS, _BEFORE = (5, 9), 4

#: Positions of the cache after the last.
_SPARE = 5

Array = NDArray[Any]


@dataclass(frozen=True)
class Comparison:
    """How one output compares with the original's.

    Attributes:
        graph: The graph.
        output: Its output, or what was compared.
        cosine: Cosine similarity over all elements.
        norm_ratio: Its norm over the original's.
    """

    graph: str
    output: str
    cosine: float
    norm_ratio: float

    @property
    def passed(self) -> bool:
        """Within both gates; False for anything that is not finite."""
        return self.cosine >= MIN_COSINE and abs(self.norm_ratio - 1) <= MAX_NORM_ERROR


def missing_packages() -> list[str]:
    """What is not installed of the packages that a comparison needs."""
    return [name for name in ("torch", "transformers", "onnxruntime") if find_spec(name) is None]


def validate(path: Path, checkpoint: str | None = None, salience: str | None = None) -> list[Comparison]:
    """Compares every graph of a bundle with the original model.

    Args:
        path: The bundle.
        checkpoint: Folder or hub id of the original; by default the one that the bundle names.
        salience: Folder or hub id of the source of its salience; by default the one that the bundle names.

    Raises:
        TangoError: The bundle or the original cannot be read, or a package is not installed.
    """
    if missing := missing_packages():
        raise TangoError(
            f"the comparison needs {' and '.join(missing)}, not installed here", "pip install 'tango-edge[validate]'"
        )
    bundle = Bundle.load(path)
    source, family = bundle.manifest.source, find_preset(bundle.manifest.family)[0]
    origin, spec = (checkpoint or source.checkpoint, salience or source.salience), bundle.manifest.decoder
    model = open_model(family, *origin, spec.context, spec.inner)
    _check_origin(bundle, model, origin[0])
    graphs: tuple[GraphName, ...] = ("vision", "embed", bundle.manifest.decoders[-1])
    vision, embed, decoder = (len(list(_forms(bundle, graph))) for graph in graphs)
    with progress("validate", 3 + vision + embed + decoder * (1 + _STEPS)) as on_progress:
        with _transformers_errors():
            reference = model.reference()
        on_progress(1)
        results = []
        with ort_errors("run the graphs", f"check the bundle with: tango inspect {path} --verify"):
            for result in _compare(bundle, reference):
                results.append(result)
                on_progress(result.output != "salience")
    return results


def _check_origin(bundle: Bundle, model: Model, checkpoint: str) -> None:
    """Rejects an original whose dimensions are others: there is nothing to compare."""
    video, prompt = bundle.manifest.video, bundle.manifest.prompt
    found = (bundle.manifest.decoder, video.size, video.tokens_per_frame, prompt.vocabulary)
    wanted = (model.decoder, model.video.size, model.video.tokens_per_frame, model.prompt.vocabulary)
    if found != wanted:
        raise TangoError(
            f"{bundle.path} was not made from {checkpoint}: its dimensions are others",
            "name what it was made from with --checkpoint and --salience-checkpoint",
        )


def _compare(bundle: Bundle, reference: Reference) -> Iterator[Comparison]:
    frames = _frames(bundle)
    with _transformers_errors():
        expected = reference.vision(frames)
    for title, spec in _forms(bundle, "vision"):
        feeds = {"frames": frames, **_weights(bundle, "vision", spec)}
        features, salience = open_session(bundle.path / spec.file).run(None, feeds)
        yield _comparison(title, "features", features, expected[0])
        yield _comparison(title, "salience", salience, expected[1])
    ids = _ids(bundle)
    with _transformers_errors():
        wanted = reference.embed(ids)
    for title, spec in _forms(bundle, "embed"):
        feeds = {"ids": ids, **_weights(bundle, "embed", spec)}
        embeddings = open_session(bundle.path / spec.file).run(None, feeds)[0]
        yield _comparison(title, "embeddings", embeddings, wanted)
    rotary = _rotary(bundle, len(ids))
    with _transformers_errors():
        logits = reference.logits(embeddings, rotary)[:, : bundle.manifest.prompt.vocabulary]
    for title, steps in _decoders(bundle, embeddings, rotary):
        for end, found in steps:
            yield _comparison(title, f"logits at {end - 1}", found, logits[end - 1])
    yield _compare_prune_node(bundle)
    yield _compare_prune_function(bundle)


@contextmanager
def _transformers_errors() -> Iterator[None]:
    """Names the version where the original model fails: its interface changes from one to another.

    Raises:
        TangoError: It fails.
    """
    try:
        yield
    except TangoError:
        raise
    except Exception as error:  # as of a function that is gone, or packages that do not fit one another
        raise TangoError(
            f"transformers {version('transformers')} does not run the original model: {first_line(error)}",
            "install a version that was tried: pip install 'transformers>=5.6,<5.25'",
        ) from error


def _decoders(
    bundle: Bundle, embeddings: Array, rotary: Array | None
) -> Iterator[tuple[str, Iterator[tuple[int, Array]]]]:
    """Each form of the decoder: what to call it, and its passes.

    A decoder of two graphs runs without inner pruning: where no token is dropped, it is the original's.
    """
    graphs, names = bundle.manifest.graphs, bundle.manifest.decoders
    parts = [(open_session(bundle.graph(name)), graphs[name]) for name in names]
    yield names[-1], _portable_steps(parts, embeddings, rotary)
    if graphs[names[-1]].device:
        devices = [_DevicePart.of(bundle, name) for name in names]
        yield f"{names[-1]} (device)", _device_steps(devices, embeddings, rotary)


def _forms(bundle: Bundle, graph: GraphName) -> Iterator[tuple[str, GraphSpec]]:
    """A graph, and its device form where there is one, with what to call them."""
    spec = bundle.manifest.graphs[graph]
    yield graph, spec
    if spec.device:
        yield f"{graph} (device)", spec.device


def _weights(bundle: Bundle, graph: GraphName, form: GraphSpec) -> dict[str, Array]:
    """The weights that a form of a graph takes as inputs, mapped from the data file."""
    spec = bundle.manifest.graphs[graph]
    if form is spec:
        return {}
    data = bundle.path / spec.data
    return {name: np.memmap(data, w.dtype, "r", w.offset, w.shape) for name, w in spec.device_weights.items()}


def _passes(positions: int) -> list[tuple[int, int]]:
    """Prefill over a prompt, then single steps: where each begins and ends."""
    return [(0, _PROMPT), *((i, i + 1) for i in range(_PROMPT, positions))]


def _portable_steps(
    parts: list[tuple[Any, GraphSpec]], embeddings: Array, rotary: Array | None
) -> Iterator[tuple[int, Array]]:
    """The portable decoder over caches with spare rows, given the true tokens: each pass's end, and its logits."""
    capacity = len(embeddings) + _SPARE
    caches = [empty_cache(cache_inputs(spec), capacity) for _, spec in parts]
    for begin, end in _passes(len(embeddings)):
        x, positions = embeddings[begin:end], np.arange(begin, end, dtype=np.int64)
        for (session, spec), cache in zip(parts, caches, strict=True):
            held = {name: rows[:, : capacity if begin else 0] for name, rows in cache.items()}
            first, *others = (tensor.name for tensor in spec.inputs if tensor.name not in held)
            feeds = {first: x, **dict.fromkeys(others, positions), **held}
            if rotary is not None:
                feeds["rotary"] = rotary[:, begin:end]
            found = session.run(None, feeds)
            for name, new in zip(cache, found[-len(cache) :], strict=True):
                cache[name][:, begin:end] = new
            x = found[0]
        yield end, x


@dataclass(frozen=True)
class _DevicePart:
    """A decoder graph in its device form, and the weights that it takes."""

    session: Any
    spec: GraphSpec
    weights: dict[str, Array]

    @classmethod
    def of(cls, bundle: Bundle, graph: GraphName) -> _DevicePart:
        spec = bundle.manifest.graphs[graph].device
        assert spec is not None
        return cls(open_session(bundle.path / spec.file), spec, _weights(bundle, graph, spec))


def _device_steps(parts: list[_DevicePart], embeddings: Array, rotary: Array | None) -> Iterator[tuple[int, Array]]:
    """The same for the device decoder, which returns the whole cache."""
    caches = [empty_cache(cache_inputs(part.spec), len(embeddings) + _SPARE) for part in parts]
    for begin, end in _passes(len(embeddings)):
        x, positions = embeddings[begin:end], np.arange(begin, end) if rotary is None else rotary[:, begin:end]
        given = {"last_position": np.array([end - 1], np.int32), "rotary": positions.astype(np.int32)}
        for i, part in enumerate(parts):
            taken = {tensor.name for tensor in part.spec.inputs}
            feeds = {name: value for name, value in given.items() if name in taken}
            found = part.session.run(None, {part.spec.inputs[0].name: x, **feeds, **caches[i], **part.weights})
            caches[i] = dict(zip(caches[i], found[-len(caches[i]) :], strict=True))
            x = found[0]
        yield end, x


def _compare_prune_node(bundle: Bundle) -> Comparison:
    """The operator's node against bundle.json."""
    try:
        (node,) = onnx.load(bundle.graph("prune"), load_external_data=False).graph.node
    except Exception as error:  # protobuf's own, or a graph of no node or of many
        raise TangoError(
            f"{bundle.graph('prune')} is no graph of one node",
            "check the bundle with: tango inspect BUNDLE --verify",
        ) from error
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    found = {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
    same = float(node.op_type == op.NAME and found == op.node_attributes(bundle.manifest.params))
    return Comparison("prune", "attributes", same, same)


def _compare_prune_function(bundle: Bundle) -> Comparison:
    """What the node's function keeps of a small video against the reference, whose indices it must give exactly."""
    manifest = bundle.manifest
    inputs = _features(manifest.video.tokens_per_frame, manifest.decoder.hidden_size, manifest.dtype)
    feeds = dict(zip(op.INPUTS, inputs, strict=True))
    tokens, indices, _ = open_session(bundle.graph("prune")).run(None, feeds)
    expected = prune(*inputs, manifest.params)
    if not np.array_equal(indices, expected.indices):
        return Comparison("prune", "tokens", 0.0, 0.0)
    return _comparison("prune", "tokens", tokens, expected.tokens)


def _comparison(graph: str, output: str, found: Array, expected: Array) -> Comparison:
    a, b = (values.astype(np.float64).ravel() for values in (found, expected))
    with np.errstate(invalid="ignore", divide="ignore"):  # what is not finite fails the gates
        ratio = np.linalg.norm(a) / np.linalg.norm(b)
        return Comparison(graph, output, float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))), float(ratio))


def _frames(bundle: Bundle) -> Array:
    """Frames with edges, gradients and noise, as the vision graph takes them, uint8."""
    video = bundle.manifest.video
    height, width = video.size
    if video.budget is not None:  # a size is as good as another: here one whose windows are not whole, either way
        height, width = (n * video.budget.factor for n in _TOKENS)
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    frames = []
    for i in range(_FRAMES):
        waves = np.stack([np.sin(x * (3 + i) + c) * np.cos(y * (5 - i) - c) for c in range(3)], -1)
        frames.append(127 + 90 * waves + generator.normal(0, 20, waves.shape))
    shape = ClipShape.of(bundle.manifest, _FRAMES, (height, width))
    return shape.as_steps(np.clip(np.stack(frames), 0, 255).astype(np.uint8))


def _rotary(bundle: Bundle, tokens: int) -> Array | None:
    """Rotary positions of a prompt with a pruned video in it, [3, N]; None where the decoder has none."""
    rotary = bundle.manifest.decoder.rotary
    if rotary is None:
        return None
    kept = np.arange(1, _TOKENS[0] * _TOKENS[1], 2)
    return RotaryIds.of(rotary, _BEFORE, (2, *_TOKENS), 1.5, kept).at(0, tokens)


def _features(tokens: int, width: int, dtype: str) -> tuple[Array, Array, Array]:
    """Features [F, L, D], half of which hardly change, salience [F, L] and timestamps [F]."""
    generator = np.random.default_rng(2)
    scene, noise = generator.normal(size=(tokens, width)), generator.normal(size=(_FRAMES, tokens, width))
    features = scene + np.where(generator.random(tokens) < 0.5, 0.1, 2.0)[:, None] * noise
    salience = generator.random((_FRAMES, tokens), np.float32)
    return features.astype(dtype), salience, np.arange(_FRAMES, dtype=np.float32)


def _ids(bundle: Bundle) -> Array:
    prompt = bundle.manifest.prompt
    ids = np.random.default_rng(1).integers(0, prompt.vocabulary, _PROMPT + _STEPS, dtype=np.int64)
    special = [*prompt.after_video, *([] if prompt.row_end is None else [prompt.row_end])]
    ids[: len(special)] = special
    return ids
