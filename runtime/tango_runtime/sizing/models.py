"""What of a model decides whether it fits: the released ones, and the model of a bundle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tango_plugins import PruneParams, TangoError
from tango_runtime.bundle import Bundle, GraphName, GraphSpec, Manifest
from tango_runtime.sizing.devices import Precision

#: Bytes of a weight. int4 has an fp16 scale for each 32.
BYTES: dict[Precision, float] = {"fp16": 2, "int8": 1, "fp8": 1, "int4": 0.5 + 2 / 32}


@dataclass(frozen=True)
class Layers:
    """A stack of transformer layers.

    Attributes:
        count: Layers; 0 where they are not known.
        width: Of the residual stream.
        inner: Of the feed-forward part: what its first products give, gate and up together.
        parameters: Of the linear layers.
    """

    count: int
    width: int
    inner: int
    parameters: int

    @property
    def widths(self) -> int:
        """Elements of one token's tensors in one layer: queries, keys, values and output, and the feed-forward part."""
        return 4 * self.width + self.inner

    def attention(self, pairs: float) -> float:
        """Operations of attention, scores and mixing, over this many pairs of tokens."""
        return 4 * pairs * self.width * self.count


@dataclass(frozen=True)
class Model:
    """What of a model matters here.

    Attributes:
        name: As it was asked for.
        frames: Frames by default.
        size: Edge of a frame in pixels.
        patches: Of one frame, that the tower sees.
        tokens: Of one frame, that pruning sees, L.
        tower: The vision tower.
        projector: Parameters of its two layers: before the pooling, and after it.
        decoder: The decoder's layers; its width is the features', D.
        heads: Of the keys and values, and the width of one.
        vocabulary: Ids that the head gives logits for.
        table: Rows of the embedding table.
        context: Most positions.
        params: The operator's parameters.
        vision_precision: What the vision graph is now, or fp16.
        decoder_precision: What the decoder is now, or fp16.
        stored: Bytes of each graph as it is now; empty for a model that is not on disk.
    """

    name: str
    frames: int
    size: int
    patches: int
    tokens: int
    tower: Layers
    projector: tuple[int, int]
    decoder: Layers
    heads: tuple[int, int]
    vocabulary: int
    table: int
    context: int
    params: PruneParams
    vision_precision: Precision = "fp16"
    decoder_precision: Precision = "fp16"
    stored: tuple[tuple[GraphName, int], ...] = ()

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return self.vocabulary * self.decoder.width

    @property
    def cache_row(self) -> int:
        """Bytes of keys and values of one position."""
        return 2 * 2 * self.decoder.count * math.prod(self.heads)


def _so400m() -> Layers:
    """SigLIP-so400m/14 at 384 pixels: the 26 layers that LLaVA-OneVision keeps of 27."""
    width, inner, layers = 1152, 4304, 26
    return Layers(layers, width, inner, layers * (4 * width**2 + 2 * width * inner))


def _qwen2(layers: int, width: int, inner: int, heads: tuple[int, int]) -> Layers:
    kv = math.prod(heads)
    return Layers(layers, width, 2 * inner, layers * (2 * width * (width + kv) + 3 * width * inner))


def _llava_ov(name: str, decoder: Layers, heads: tuple[int, int], table: int) -> Model:
    width = decoder.width
    return Model(
        name=name,
        frames=32,
        size=384,
        patches=729,
        tokens=196,
        tower=_so400m(),
        projector=(1152 * width, width**2),
        decoder=decoder,
        heads=heads,
        vocabulary=151648,
        table=table,
        context=32768,
        params=PruneParams(),
    )


#: The released models, by what ``tango-export --model`` calls them; dimensions of their config.json on the hub.
RELEASED = {
    model.name: model
    for model in (
        _llava_ov("llava-ov-0.5b", _qwen2(24, 896, 4864, (2, 64)), (2, 64), 152001),
        _llava_ov("llava-ov-7b", _qwen2(28, 3584, 18944, (4, 128)), (4, 128), 152129),
    )
}


def find_model(name: str) -> Model:
    """A released model by name, or the model of a bundle.

    Args:
        name: A key of ``RELEASED``, or the bundle's folder.

    Raises:
        TangoError: There is neither, or the bundle cannot be read or is in float32.
    """
    if name in RELEASED:
        return RELEASED[name]
    if not Path(name).is_dir():
        known = ", ".join(RELEASED)
        raise TangoError(f"there is no model {name!r}, and no bundle", f"models are {known}, or name a bundle's folder")
    return _of_bundle(name, Bundle.load(name).manifest)


def _of_bundle(name: str, manifest: Manifest) -> Model:
    """The decoder's inner width follows from its size on disk. The tower is taken for SigLIP-so400m where it has its
    size; of any other only the size is known, and attention and activations are left out of its time."""
    if manifest.dtype != "float16":
        raise TangoError(f"{name} is in {manifest.dtype}", "plan with a bundle that was exported with --dtype fp16")
    spec, prompt = manifest.decoder, manifest.prompt
    D = spec.hidden_size
    vision, decoder = _precision(manifest.graphs["vision"]), _precision(manifest.graphs["decoder"])
    tower, projector = _so400m(), (1152 * spec.hidden_size, spec.hidden_size**2)
    parameters = round(_data(manifest, "vision") / BYTES[vision])
    if not 0.9 < parameters / (tower.parameters + sum(projector)) < 1.1:
        tower, projector = Layers(0, 0, 0, parameters), (0, 0)
    body = max(0, round((_data(manifest, "decoder") - 2 * prompt.vocabulary * spec.hidden_size) / BYTES[decoder]))
    kv = spec.kv_heads * spec.head_dim
    inner = max(0, round(2 * (body / spec.layers - 2 * D * (D + kv)) / (3 * D)))
    graphs: tuple[GraphName, ...] = ("vision", "embed", "decoder")
    return Model(
        name=name,
        frames=manifest.video.frames,
        size=manifest.video.size[0],
        patches=729 if tower.count else 4 * manifest.video.tokens_per_frame,
        tokens=manifest.video.tokens_per_frame,
        tower=tower,
        projector=projector,
        decoder=Layers(spec.layers, spec.hidden_size, inner, body),
        heads=(spec.kv_heads, spec.head_dim),
        vocabulary=prompt.vocabulary,
        table=_data(manifest, "embed") // (2 * spec.hidden_size),
        context=spec.context,
        params=manifest.params,
        vision_precision=vision,
        decoder_precision=decoder,
        stored=tuple((graph, _on_disk(manifest, graph)) for graph in graphs),
    )


def _data(manifest: Manifest, graph: GraphName) -> int:
    """Bytes of a graph's weights: of its external data, or of the file that holds them itself."""
    file = manifest.graphs[graph].file
    return manifest.files.get(f"{file}.data", manifest.files[file]).size


def _on_disk(manifest: Manifest, graph: GraphName) -> int:
    """Bytes of a graph with its weights."""
    file = manifest.graphs[graph].file
    return sum(spec.size for name, spec in manifest.files.items() if name in (file, f"{file}.data"))


def _precision(graph: GraphSpec) -> Precision:
    return graph.quantization.precision if graph.quantization else "fp16"
