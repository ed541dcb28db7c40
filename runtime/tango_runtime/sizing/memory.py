"""Whether a model fits a device. Arithmetic only; nothing is measured or loaded.

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
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tango_plugins import TangoError, op
from tango_runtime.bundle import GraphName
from tango_runtime.sizing.devices import DEVICES, PRECISIONS, Device, Precision
from tango_runtime.sizing.models import BYTES, Model
from tango_runtime.sizing.times import PRODUCTS, Times, prefill_time, prune_time, token_time, vision_time
from tango_runtime.util.versions import release

#: Tokens around the video, the newline among them: a chat template and a short question.
_TEXT = 31
_ANSWER = 512  # positions that `tango build` leaves for question and answer by default, and for a question before it
_QUESTION = 128
_TILE = 64
_MOST_FRAMES = 256
_HEADS = 16  # of the tower, as SigLIP has them

#: Which precisions a graph comes in; `tango calibrate` says the same.
VISION: tuple[Precision, ...] = ("fp16", "int8", "fp8")
DECODER: tuple[Precision, ...] = PRECISIONS
#: The kernels of the operator are for compute capability 7.5 and later (plugins/README.md).
_OPERATOR = "7.5"


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
    lighter = [each for each in known if each in device.precisions and BYTES[each] < BYTES[asked]]
    return [asked, *(lighter if now == "fp16" else [])]


def _takes_operator(device: Device) -> bool:
    return release(device.compute_capability) >= release(_OPERATOR)


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


def _weights(model: Model, sizes: Sizes) -> dict[GraphName, int]:
    counted: dict[GraphName, float] = {
        "vision": (model.tower.parameters + sum(model.projector)) * BYTES[sizes.vision],
        "embed": model.table * model.decoder.width * 2,
        "decoder": model.decoder.parameters * BYTES[sizes.decoder] + model.head * 2,
    }
    stored, now = dict(model.stored), {"vision": model.vision_precision, "decoder": model.decoder_precision}
    then = {"vision": sizes.vision, "decoder": sizes.decoder}
    return {
        graph: stored[graph] if graph in stored and now.get(graph) == then.get(graph) else round(size)
        for graph, size in counted.items()
    }


def _activations(model: Model, sizes: Sizes) -> dict[GraphName, int]:
    """As :func:`tango_runtime.engines.plan_engines` estimates them."""
    width, patches, tokens = model.decoder.width, 4 * model.tokens, sizes.pass_tokens
    heads = width // model.heads[1]
    return {
        "vision": sizes.frames * patches * (2 * 4 * _HEADS * patches + 8 * 2 * width),
        "embed": tokens * width * 2,
        "decoder": tokens * (2 * 4 * heads * (sizes.context + tokens) + 16 * 2 * width),
    }


def _workspace(model: Model, sizes: Sizes) -> int:
    """The operator's, in its ``fast`` precision."""
    products = min(4 * sizes.tokens**2, PRODUCTS)
    return math.ceil(sizes.tokens * (2.125 * model.decoder.width + 120)) + products


def _times(model: Model, device: Device, sizes: Sizes, memory: Memory, prune: bool) -> Times:
    return Times(
        vision=vision_time(model, device, sizes.frames, sizes.vision),
        prune=prune_time(model, device, sizes.frames) if prune else 0.0,
        prefill=prefill_time(model, device, sizes.prompt, sizes.decoder, memory.decoder),
        token=token_time(model, device, sizes.context, memory.decoder, sizes.decoder),
    )
