"""Whether a model fits a device, and about how fast it would be there. Arithmetic only; nothing is measured or loaded.

Memory, in bytes, one video at a time:

- weights: parameters times bytes. fp16 has 2 and int8 and fp8 1, int4 0.5 and an fp16 scale for each 32. The
  embedding table and the head stay fp16 whatever the decoder is;
- cache: keys and values, fp16, of all positions of the context;
- activations: as `tango build` estimates them: attention's scores in fp32, twice, or the widest of the other tensors.
  Engines run one after the other in one scratch memory, so the neediest counts. Kernels that fuse attention take less;
- workspace: the operator's (plugins/README.md);
- tensors: frames and features of the video;
- build: as `tango build` estimates it, of the graph that takes the most: its weights and activations on the device, its
  weights twice on the host, which on a Jetson are one memory. What the libraries take is not part of what is usable.

Time, in seconds, of a stage (vision, prefill, one token)::

    max(operations / (peak · COMPUTE), weights / (bandwidth · MEMORY))
      + PASSES · tokens · widths · 2 / (bandwidth · MEMORY) + LAYER · layers

The first term is the roofline (Williams, Waterman and Patterson 2009) under what a GPU reaches. The second is what
kernels that are not fused write and read again, the third what their launches cost. COMPUTE and MEMORY are what a
matrix product and a copy reached of an H200's data sheet; PASSES and LAYER are fitted to times of PyTorch, ONNX Runtime
and TensorRT 8.6 there (SigLIP's tower, prefill and decoding of Qwen2 0.5B and 7B). tests/runtime/test_plan.py holds the
estimate against those times, and against published ones of an Orin Nano that nothing was fitted to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tango_plugins import PruneParams, TangoError, op
from tango_runtime.bundle import Bundle, GraphName, GraphSpec, Manifest
from tango_runtime.devices import DEVICES, PRECISIONS, Device, Precision
from tango_runtime.engines import release

#: Of the data sheet's 989 TFLOP/s a product of large fp16 matrices reached 687, of its 4.8 TB/s a copy 4.02.
COMPUTE, MEMORY = 687 / 989, 4.02 / 4.8
#: How often a layer's tensors cross the memory, as their widths are counted in :attr:`Layers.widths`.
PASSES = 9
#: Seconds for each layer: some fifteen kernels.
LAYER = 120e-6
#: Seconds that the operator takes for no tokens, and tokens above which it works in strips, with three passes over the
#: inner products instead of one (plugins/README.md).
_PRUNE, _STRIPS = 100e-6, 6324
#: Most bytes of its workspace that inner products take.
_PRODUCTS = 160 * 10**6

#: Tokens around the video, the newline among them: a chat template and a short question.
_TEXT = 31
_ANSWER = 512  # positions that `tango build` leaves for question and answer by default, and for a question before it
_QUESTION = 128
_TILE = 64
_MOST_FRAMES = 256
_HEADS = 16  # of the tower, as SigLIP has them

_BYTES: dict[Precision, float] = {"fp16": 2, "int8": 1, "fp8": 1, "int4": 0.5 + 2 / 32}
#: Which precisions a graph comes in; `tango calibrate` says the same.
VISION: tuple[Precision, ...] = ("fp16", "int8", "fp8")
DECODER: tuple[Precision, ...] = PRECISIONS
#: The kernels of the operator are for compute capability 7.5 and later (plugins/README.md).
_OPERATOR = "7.5"


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


@dataclass(frozen=True)
class Options:
    """What a user chooses; None takes the model's.

    Attributes:
        frames: Of the video.
        retention_ratio: Fraction of the video tokens kept.
        prune: Whether to prune at all.
        vision: Precision of the vision graph.
        decoder: Precision of the decoder.
        context: Positions of the cache; None takes the prompt's most and 512.
    """

    frames: int | None = None
    retention_ratio: float | None = None
    prune: bool = True
    vision: Precision | None = None
    decoder: Precision | None = None
    context: int | None = None


@dataclass(frozen=True)
class Sizes:
    """The options with nothing left open.

    Attributes:
        frames: Of the video.
        tokens: Of the video, before pruning.
        kept: After it.
        prompt: Tokens that are prefilled.
        pass_tokens: The most tokens that the engine takes in one pass.
        context: Positions of the cache.
        vision: Precision of the vision graph.
        decoder: Precision of the decoder.
    """

    frames: int
    tokens: int
    kept: int
    prompt: int
    pass_tokens: int
    context: int
    vision: Precision
    decoder: Precision


@dataclass(frozen=True)
class Memory:
    """Bytes; the rules are at the top of this file."""

    vision: int
    embed: int
    decoder: int
    cache: int
    activations: int
    workspace: int
    tensors: int

    @property
    def total(self) -> int:
        """What running takes."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Times:
    """Estimated seconds; the rules are at the top of this file.

    Attributes:
        vision: Tower and projector, of all frames.
        prune: The operator, on the video that is the most work: one segment in which nothing stands still.
        prefill: The prompt, up to the first token's logits.
        token: Each token after it.
    """

    vision: float
    prune: float
    prefill: float
    token: float

    @property
    def first_token(self) -> float:
        """From frames of the model's size, on the device, to the first token."""
        return self.vision + self.prune + self.prefill


@dataclass(frozen=True)
class Plan:
    """A model on a device.

    Attributes:
        model: The model.
        device: The device.
        sizes: What is run.
        memory: What running takes.
        build: The most that building an engine takes of a Jetson's memory, which CPU and GPU share, or of a GPU's.
        times: How long it takes.
    """

    model: Model
    device: Device
    sizes: Sizes
    memory: Memory
    build: int
    times: Times

    @property
    def fits(self) -> bool:
        """Whether it can run there."""
        return self.memory.total <= self.device.usable

    @property
    def builds(self) -> bool:
        """Whether its engines can be built there."""
        return self.build <= self.device.usable


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


def plan(model: Model, device: Device, options: Options) -> Plan:
    """Memory and times of a model on a device.

    Raises:
        TangoError: An option is out of range, or the device cannot run a precision or the operator.
    """
    sizes = _sizes(model, options)
    for graph, precision in (("vision", sizes.vision), ("decoder", sizes.decoder)):
        if precision not in device.precisions:
            raise TangoError(
                f"{device.title} cannot run {precision} ({graph})", f"it can run {', '.join(device.precisions)}"
            )
    if options.prune and not _takes_operator(device):
        raise TangoError(
            f"the Tango operator needs compute capability {_OPERATOR}, {device.title} has {device.compute_capability}",
            "plan without it: --no-prune",
        )
    weights = _weights(model, sizes)
    activations = _activations(model, sizes)
    memory = Memory(
        **{str(graph): size for graph, size in weights.items()},
        cache=model.cache_row * sizes.context,
        activations=max(activations.values()),
        workspace=_workspace(model, sizes) if options.prune else 0,
        tensors=sizes.frames * 3 * model.size**2 + 2 * sizes.tokens * model.decoder.width,
    )
    copies = 3 if device.jetson else 1
    build = max(copies * weights[graph] + activations[graph] for graph in weights)
    return Plan(model, device, sizes, memory, build, _times(model, device, sizes, memory, options.prune))


def remedy(found: Plan, options: Options) -> Options | None:
    """The options nearest to the ones given with which the model fits; None where there are none.

    Tried in this order: a vision graph of less precision, a decoder of less, pruning, fewer frames.
    """
    changed = (each for each in _alternatives(found, options) if plan(found.model, found.device, each).fits)
    return next(changed, None)


def smallest(found: Plan, options: Options) -> str | None:
    """The device with the least memory that holds a model as asked for, a Jetson where one does."""
    names = sorted(DEVICES, key=lambda name: (not DEVICES[name].jetson, DEVICES[name].memory))
    for name in names:
        try:
            if plan(found.model, DEVICES[name], options).fits:
                return name
        except TangoError:  # it cannot run this at all
            continue
    return None


def _alternatives(found: Plan, options: Options) -> Iterator[Options]:
    model, device, sizes = found.model, found.device, found.sizes
    visions = _lighter(sizes.vision, VISION, device, model.vision_precision)
    decoders = _lighter(sizes.decoder, DECODER, device, model.decoder_precision)
    frames = [sizes.frames, *(n for n in (24, 16, 12, 8, 4, 2, 1) if n < sizes.frames)]
    prunes = [True] if options.prune else [False, *([True] if _takes_operator(device) else [])]
    for count, prune, decoder, vision in itertools.product(frames, prunes, decoders, visions):
        yield replace(options, frames=count, prune=prune, decoder=decoder, vision=vision)


def _lighter(asked: Precision, known: Sequence[Precision], device: Device, now: Precision) -> list[Precision]:
    """A precision and those that take less memory; a graph that is quantised already stays as it is."""
    lighter = [each for each in known if each in device.precisions and _BYTES[each] < _BYTES[asked]]
    return [asked, *(lighter if now == "fp16" else [])]


def _takes_operator(device: Device) -> bool:
    return release(device.compute_capability) >= release(_OPERATOR)


# What a bundle says.


def _of_bundle(name: str, manifest: Manifest) -> Model:
    """The decoder's inner width follows from its size on disk. The tower is taken for SigLIP-so400m where it has its
    size; of any other only the size is known, and attention and activations are left out of its time."""
    if manifest.dtype != "float16":
        raise TangoError(f"{name} is in {manifest.dtype}", "plan with a bundle that was exported with --dtype fp16")
    spec, prompt = manifest.decoder, manifest.prompt
    vision, decoder = _precision(manifest.graphs["vision"]), _precision(manifest.graphs["decoder"])
    tower, projector = _so400m(), (1152 * spec.width, spec.width**2)
    parameters = round(_data(manifest, "vision") / _BYTES[vision])
    if not 0.9 < parameters / (tower.parameters + sum(projector)) < 1.1:
        tower, projector = Layers(0, 0, 0, parameters), (0, 0)
    body = max(0, round((_data(manifest, "decoder") - 2 * prompt.vocabulary * spec.width) / _BYTES[decoder]))
    kv = spec.kv_heads * spec.head_dim
    inner = max(0, round(2 * (body / spec.layers - 2 * spec.width * (spec.width + kv)) / (3 * spec.width)))
    graphs: tuple[GraphName, ...] = ("vision", "embed", "decoder")
    return Model(
        name=name,
        frames=manifest.video.frames,
        size=manifest.video.size,
        patches=729 if tower.count else 4 * manifest.video.tokens_per_frame,
        tokens=manifest.video.tokens_per_frame,
        tower=tower,
        projector=projector,
        decoder=Layers(spec.layers, spec.width, inner, body),
        heads=(spec.kv_heads, spec.head_dim),
        vocabulary=prompt.vocabulary,
        table=_data(manifest, "embed") // (2 * spec.width),
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


# What is run.


def _sizes(model: Model, options: Options) -> Sizes:
    frames = model.frames if options.frames is None else options.frames
    if not 1 <= frames <= _MOST_FRAMES:
        raise TangoError(f"--frames is {frames}", f"it must be from 1 to {_MOST_FRAMES}")
    if not options.prune and options.retention_ratio is not None:
        raise TangoError("--no-prune and --retention-ratio exclude each other", "leave one of them away")
    ratio = model.params.retention_ratio if options.retention_ratio is None else options.retention_ratio
    params, tokens = model.params.at(ratio), frames * model.tokens
    kept = op.exact_count(frames, model.tokens, params) if options.prune else tokens
    most = op.capacity(frames, model.tokens, params) if options.prune else tokens
    if kept + _TEXT > model.context:
        raise TangoError(
            f"a prompt of {kept + _TEXT} tokens is longer than {model.name}'s {model.context} positions",
            "fewer --frames, or a lower --retention-ratio",
        )
    pass_tokens = min(model.context, _tiles(most + _QUESTION))
    context = min(model.context, _tiles(pass_tokens + _ANSWER)) if options.context is None else options.context
    if not kept + _TEXT <= context <= model.context:
        raise TangoError(
            f"a prompt of {kept + _TEXT} tokens needs as many positions, --context is {context}",
            f"give one from {kept + _TEXT} to {model.context}, or fewer --frames",
        )
    vision = _asked("--vision", options.vision, VISION, model.vision_precision)
    decoder = _asked("--decoder", options.decoder, DECODER, model.decoder_precision)
    return Sizes(frames, tokens, kept, kept + _TEXT, min(pass_tokens, context), context, vision, decoder)


def _asked(flag: str, asked: Precision | None, known: Sequence[Precision], now: Precision) -> Precision:
    if asked is not None and asked not in known:
        raise TangoError(f"{flag} is {asked!r}", f"known are {', '.join(known)}")
    if now != "fp16" and asked not in (None, now):
        raise TangoError(f"{flag} is {asked}, and the bundle is {now} already", "name the bundle it was made of")
    return asked or now


def _tiles(tokens: int) -> int:
    return -(-tokens // _TILE) * _TILE


# What it takes.


def _weights(model: Model, sizes: Sizes) -> dict[GraphName, int]:
    counted: dict[GraphName, float] = {
        "vision": (model.tower.parameters + sum(model.projector)) * _BYTES[sizes.vision],
        "embed": model.table * model.decoder.width * 2,
        "decoder": model.decoder.parameters * _BYTES[sizes.decoder] + model.head * 2,
    }
    stored, now = dict(model.stored), {"vision": model.vision_precision, "decoder": model.decoder_precision}
    then = {"vision": sizes.vision, "decoder": sizes.decoder}
    return {
        graph: stored[graph] if graph in stored and now.get(graph) == then.get(graph) else round(size)
        for graph, size in counted.items()
    }


def _activations(model: Model, sizes: Sizes) -> dict[GraphName, int]:
    """As :func:`tango_runtime.engines.plan` estimates them."""
    width, patches, tokens = model.decoder.width, 4 * model.tokens, sizes.pass_tokens
    heads = width // model.heads[1]
    return {
        "vision": sizes.frames * patches * (2 * 4 * _HEADS * patches + 8 * 2 * width),
        "embed": tokens * width * 2,
        "decoder": tokens * (2 * 4 * heads * (sizes.context + tokens) + 16 * 2 * width),
    }


def _workspace(model: Model, sizes: Sizes) -> int:
    """The operator's, in its ``fast`` precision."""
    products = min(4 * sizes.tokens**2, _PRODUCTS)
    return math.ceil(sizes.tokens * (2.125 * model.decoder.width + 120)) + products


# How long it takes.


def _times(model: Model, device: Device, sizes: Sizes, memory: Memory, prune: bool) -> Times:
    return Times(
        vision=vision_time(model, device, sizes.frames, sizes.vision),
        prune=prune_time(model, device, sizes.frames) if prune else 0.0,
        prefill=prefill_time(model, device, sizes.prompt, sizes.decoder, memory.decoder),
        token=token_time(model, device, sizes.context, memory.decoder),
    )


def vision_time(model: Model, device: Device, frames: int, precision: Precision = "fp16") -> float:
    """Seconds for tower and projector."""
    patches, (before, after) = frames * model.patches, model.projector
    linear = 2 * (patches * (model.tower.parameters + before) + frames * model.tokens * after)
    work = _Work(linear, precision, model.tower.attention(patches * model.patches))
    return _stage(device, model.tower, patches, work, (model.tower.parameters + before + after) * _BYTES[precision])


def prune_time(model: Model, device: Device, frames: int) -> float:
    """Seconds for the operator: inner products of all tokens, once or in three passes, written and read in fp32."""
    tokens, width = frames * model.tokens, model.decoder.width
    passes = 1 if tokens <= _STRIPS else 3
    operations = passes * 2 * tokens**2 * width
    moved = 3 * 2 * tokens * width + 2 * passes * min(4 * tokens**2, _PRODUCTS)
    return operations / (device.peak("fp16") * COMPUTE) + moved / _rate(device) + _PRUNE


def prefill_time(model: Model, device: Device, tokens: int, precision: Precision, weights: float) -> float:
    """Seconds from the prompt's embeddings to the logits after it; ``weights`` in bytes."""
    attention = model.decoder.attention(tokens**2 / 2)  # causal: half of the pairs
    work = _Work(2 * tokens * model.decoder.parameters, precision, attention + 2 * model.head)
    return _stage(device, model.decoder, tokens, work, weights)


def token_time(model: Model, device: Device, context: int, weights: float) -> float:
    """Seconds for one token: all weights and, as its capacity is fixed, all of the cache cross the memory."""
    return (weights + model.cache_row * context) / _rate(device) + LAYER * model.decoder.count


@dataclass(frozen=True)
class _Work:
    """Operations of linear layers, in a precision, and others, in fp16."""

    linear: float
    precision: Precision
    other: float

    def on(self, device: Device) -> float:
        """Seconds at the rate that products reach."""
        return (self.linear / device.peak(self.precision) + self.other / device.peak("fp16")) / COMPUTE


def _stage(device: Device, layers: Layers, tokens: int, work: _Work, weights: float) -> float:
    moved = PASSES * tokens * layers.count * layers.widths * 2
    return max(work.on(device), weights / _rate(device)) + moved / _rate(device) + LAYER * layers.count


def _rate(device: Device) -> float:
    return device.bandwidth * 1e9 * MEMORY
