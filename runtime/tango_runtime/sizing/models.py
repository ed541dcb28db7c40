"""Models that can be planned for: the released ones, from released_models.json, and the model of a bundle.

released_models.json holds the dimensions of every preset of the export families. tests/export/test_released_models.py
derives them from the families and compares. A new preset adds an entry here and changes no code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from tango_plugins import PruneParams, TangoError, op
from tango_runtime.bundle import Bundle, DecoderSpec, GraphName, GraphSpec, Manifest, VideoSpec, VisionSpec
from tango_runtime.sizing.devices import Precision
from tango_runtime.util.jsonschema import from_json
from tango_runtime.video.shape import at_size

RELEASED_MODELS = "released_models.json"

#: Bytes of a weight; int4 has an fp16 scale for every 32 weights, as `tango calibrate` makes it by default.
BYTES: dict[Precision, float] = {"fp16": 2, "int8": 1, "fp8": 1, "int4": 0.5 + 2 / 32}


@dataclass(frozen=True)
class LayerStack:
    """A stack of transformer layers.

    Attributes:
        count: Number of layers.
        hidden_size: Width of the residual stream.
        mlp_width: Elements of one token that the first linear layers of the MLP give, the gate's included.
        weights: Weights of all linear layers.
    """

    count: int
    hidden_size: int
    mlp_width: int
    weights: int

    @property
    def widths(self) -> int:
        """Elements of one token's tensors in one layer: queries, keys, values, attention output and the MLP."""
        return 4 * self.hidden_size + self.mlp_width


@dataclass(frozen=True)
class ReleasedModel:
    """An entry of released_models.json, in the words of bundle.json.

    Attributes:
        family: The export family.
        video: How a video becomes frames.
        vision: The vision tower's dimensions.
        decoder: The decoder's dimensions; ``context`` is the checkpoint's own limit.
        vocabulary: Ids that the head gives logits for.
        embedding_rows: Rows of the embedding table, special rows included.
        prune: The operator's attributes.
        row_ends: Whether a newline token follows each grid row with a kept token.
        video_text: Whether the prompt says when the frames are.
    """

    family: str
    video: VideoSpec
    vision: VisionSpec
    decoder: DecoderSpec
    vocabulary: int
    embedding_rows: int
    prune: dict[str, int | str | list[int]]
    row_ends: bool = False
    video_text: bool = False


@dataclass(frozen=True)
class ModelDimensions:
    """A model as far as its memory and time depend on it.

    Attributes:
        name: The name that the user gave.
        video: How a video becomes frames.
        vision: The vision tower's dimensions.
        decoder: The decoder's dimensions.
        vocabulary: Ids that the head gives logits for.
        embedding_rows: Rows of the embedding table.
        params: The operator's parameters.
        row_ends: Whether a newline token follows each grid row with a kept token.
        video_text: Whether the prompt says when the frames are.
        vision_precision: Current precision of the vision graph.
        decoder_precision: Current precision of the decoder.
        stored: Current bytes of each graph; empty for a model that is not on disk.
    """

    name: str
    video: VideoSpec
    vision: VisionSpec
    decoder: DecoderSpec
    vocabulary: int
    embedding_rows: int
    params: PruneParams
    row_ends: bool = False
    video_text: bool = False
    vision_precision: Precision = "fp16"
    decoder_precision: Precision = "fp16"
    stored: tuple[tuple[GraphName, int], ...] = ()

    def at_size(self, size: tuple[int, int]) -> ModelDimensions:
        """The model with frames of another size (height, width).

        Raises:
            TangoError: It does not take them.
        """
        video, vision, params = at_size(self.video, self.vision, self.params, size)
        return replace(self, video=video, vision=vision, params=params)

    @property
    def tower(self) -> LayerStack:
        """The vision tower's layers."""
        spec = self.vision
        matrices = 3 if spec.mlp == "gated" else 2
        attention, mlp = 4 * spec.hidden_size**2, matrices * spec.hidden_size * spec.intermediate_size
        width = (matrices - 1) * spec.intermediate_size
        return LayerStack(spec.layers, spec.hidden_size, width, spec.layers * (attention + mlp))

    @property
    def vision_attention(self) -> int:
        """Operations of the tower's attention, scores and weighted sums, in one step of frames."""
        spec = self.vision
        global_layers = spec.layers if spec.global_layers is None else spec.global_layers
        keys = global_layers * spec.patches + (spec.layers - global_layers) * (spec.window or 0)
        return 4 * spec.patches * keys * spec.hidden_size

    @property
    def decoder_layers(self) -> LayerStack:
        """The decoder's layers, with a gated MLP."""
        spec = self.decoder
        attention = 2 * spec.hidden_size * (spec.heads + spec.kv_heads) * spec.head_dim
        mlp = 3 * spec.hidden_size * spec.intermediate_size
        return LayerStack(spec.layers, spec.hidden_size, 2 * spec.intermediate_size, spec.layers * (attention + mlp))

    @property
    def head_weights(self) -> int:
        """Weights of the head."""
        return self.vocabulary * self.decoder.hidden_size


@cache
def released_models() -> dict[str, ModelDimensions]:
    """The released models, by the name that ``tango-export --model`` has for them."""
    text = files(__package__).joinpath(RELEASED_MODELS).read_text(encoding="utf-8")
    entries = from_json(dict[str, ReleasedModel], json.loads(text), RELEASED_MODELS)
    return {name: _of_entry(name, entry) for name, entry in entries.items()}


def find_model(name: str) -> ModelDimensions:
    """A released model by name, or the model of a bundle.

    Args:
        name: A key of :func:`released_models`, or a bundle's folder.

    Raises:
        TangoError: It is neither, or the bundle cannot be read or is in float32.
    """
    released = released_models()
    if name in released:
        return released[name]
    if not Path(name).is_dir():
        hint = f"models are {', '.join(released)}, or name a bundle's folder"
        raise TangoError(f"there is no model {name!r}, and no bundle", hint)
    return _of_bundle(name, Bundle.load(name))


def _of_entry(name: str, entry: ReleasedModel) -> ModelDimensions:
    return ModelDimensions(
        name=name,
        video=entry.video,
        vision=entry.vision,
        decoder=entry.decoder,
        vocabulary=entry.vocabulary,
        embedding_rows=entry.embedding_rows,
        params=op.params_from(entry.prune),
        row_ends=entry.row_ends,
        video_text=entry.video_text,
    )


def _of_bundle(name: str, bundle: Bundle) -> ModelDimensions:
    manifest = bundle.manifest
    if manifest.dtype != "float16":
        raise TangoError(f"{name} is in {manifest.dtype}", "plan with a bundle that was exported with --dtype fp16")
    table = manifest.files.get(manifest.graphs["embed"].data) or manifest.files[manifest.graphs["embed"].file]
    return ModelDimensions(
        name=name,
        video=manifest.video,
        vision=manifest.vision,
        decoder=manifest.decoder,
        vocabulary=manifest.prompt.vocabulary,
        embedding_rows=table.size // (2 * manifest.decoder.hidden_size),
        params=manifest.params,
        row_ends=manifest.prompt.row_end is not None,
        video_text=manifest.prompt.video_text is not None,
        vision_precision=_precision(manifest.graphs["vision"]),
        decoder_precision=_precision(*(manifest.graphs[name] for name in manifest.decoders)),
        stored=(
            ("vision", _portable_bytes(manifest, "vision")),
            ("embed", _portable_bytes(manifest, "embed")),
            ("decoder", sum(_portable_bytes(manifest, graph) for graph in manifest.decoders)),
        ),
    )


def _precision(*graphs: GraphSpec) -> Precision:
    """What some of the graphs are quantized to."""
    return next((graph.quantization.precision for graph in graphs if graph.quantization), "fp16")


def _portable_bytes(manifest: Manifest, graph: GraphName) -> int:
    """Size of a graph and its weights. Its device graph has the same weights, and TensorRT never reads it."""
    return sum(manifest.files[file].size for file in manifest.engine_files(graph))
