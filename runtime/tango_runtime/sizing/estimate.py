"""Whether a model fits a device, and about how fast it runs there. Arithmetic only; nothing is measured or loaded.

Memory, in bytes, for one video at a time:

- what runs: ONNX Runtime with device graphs on a GPU. On a Jetson, engines of TensorRT: of device graphs where these
  are fp16 and frames have one size, else of portable ones;
- weights: number of weights times bytes of one. fp16 has 2, int8 and fp8 have 1, int4 has 0.5 and an fp16 scale for
  every 32 weights, the head's too. A bundle counts as it is, with what calibration left in fp16;
- embed: the table is fp16 and stays in the host's memory, which counts on a Jetson only;
- cache, activations and workspace: see memory.py. ONNX Runtime keeps the activations of each graph, TensorRT runs
  engines one after another in one scratch memory, so only the largest count there;
- tensors: frames and features of the video;
- libraries: kernels and workspaces of ONNX Runtime's CUDA provider, as measured. A Jetson's are not part of the usable
  memory;
- build: the most that building one graph in its portable form takes: weights and activations on the device, and the
  weights twice on the host, which on a Jetson is the same memory. Libraries are not part of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tango_plugins import TangoError
from tango_runtime.bundle import GraphName
from tango_runtime.sizing import memory as rules
from tango_runtime.sizing.devices import DEVICES, PRECISIONS, Device, Precision
from tango_runtime.sizing.memory import MAX_FRAMES, TYPICAL_TEXT_TOKENS, MaxShapes
from tango_runtime.sizing.models import BYTES, ModelDimensions
from tango_runtime.sizing.times import StageTimes, prefill_time, prune_time, token_time, vision_time
from tango_runtime.util.versions import release

#: Precisions of each graph, as in `tango calibrate`.
VISION: tuple[Precision, ...] = ("fp16", "int8", "fp8")
DECODER: tuple[Precision, ...] = PRECISIONS
#: The operator's kernels need at least this compute capability (docs/reference/limits.md).
OPERATOR_CAPABILITY = "7.5"
#: Bytes of an element of the graphs' tensors.
_ITEM = 2
#: Left of an H200's measured memory after all other parts, of fp16 and quantized models alike.
_ORT_LIBRARIES = 270_000_000
#: Numbers of frames that :func:`nearest_fit` tries.
_FEWER_FRAMES = (24, 16, 12, 8, 4, 2, 1)


@dataclass(frozen=True)
class SizingOptions:
    """A user's choices; None takes the model's.

    Attributes:
        frames: Frames of the video.
        retention_ratio: Fraction of the video tokens kept.
        prune: Whether to prune at all.
        vision: Precision of the vision graph.
        decoder: Precision of the decoder.
        context: Positions of the cache; None takes the longest prompt and room for an answer.
        frame: (height, width) of the frames, where the model takes any size.
    """

    frames: int | None = None
    retention_ratio: float | None = None
    prune: bool = True
    vision: Precision | None = None
    decoder: Precision | None = None
    context: int | None = None
    frame: tuple[int, int] | None = None


@dataclass(frozen=True)
class Workload:
    """The options with every choice made.

    Attributes:
        frames: Frames of the video.
        size: (height, width) of each in pixels.
        tokens: Video tokens before pruning.
        kept: Video tokens in the prompt, row ends included.
        thinned: Those of them that the decoder's upper layers see; None where every layer sees all.
        prompt: Tokens that are prefilled.
        pass_tokens: Most tokens of one prefill pass.
        context: Positions of the cache.
        vision: Precision of the vision graph.
        decoder: Precision of the decoder.
    """

    frames: int
    size: tuple[int, int]
    tokens: int
    kept: int
    thinned: int | None
    prompt: int
    pass_tokens: int
    context: int
    vision: Precision
    decoder: Precision


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that running takes; the rules are at the top of this file."""

    vision: int
    embed: int
    decoder: int
    cache: int
    activations: int
    workspace: int
    tensors: int
    libraries: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """A model on a device.

    Attributes:
        model: The model.
        device: The device.
        workload: What is run.
        memory: Memory for running it.
        build: Most memory for building an engine: the shared memory of a Jetson, or a GPU's own.
        times: Durations.
    """

    model: ModelDimensions
    device: Device
    workload: Workload
    memory: MemoryUse
    build: int
    times: StageTimes

    @property
    def fits(self) -> bool:
        """Whether it can run there."""
        return self.memory.total <= self.device.usable

    @property
    def builds(self) -> bool:
        """Whether its engines can be built there."""
        return self.build <= self.device.usable


def estimate(model: ModelDimensions, device: Device, options: SizingOptions) -> Estimate:
    """Memory and times of a model on a device.

    Raises:
        TangoError: An option is out of range, or the device cannot run a precision or the operator.
    """
    if options.frame is not None:
        model = model.at_size(options.frame)
    workload = _workload(model, device, options)
    for graph, precision in (("vision", workload.vision), ("decoder", workload.decoder)):
        if precision not in device.precisions:
            raise TangoError(
                f"{device.title} cannot run {precision} ({graph})", f"it can run {', '.join(device.precisions)}"
            )
    if options.prune and not _runs_operator(device):
        raise TangoError(
            f"the Tango operator needs compute capability {OPERATOR_CAPABILITY}, "
            f"{device.title} has {device.compute_capability}",
            "plan without it: --no-prune",
        )
    weights = _weights(model, workload)
    memory = MemoryUse(
        vision=weights["vision"],
        embed=weights["embed"] if device.jetson else 0,
        decoder=weights["decoder"],
        cache=rules.cache_bytes(model.decoder, _mean(workload.context, model, workload), _ITEM),
        activations=_activations(model, device, workload),
        workspace=rules.workspace_bytes(workload.tokens, model.decoder.hidden_size) if options.prune else 0,
        tensors=_frame_bytes(model, workload.frames) + _ITEM * workload.tokens * model.decoder.hidden_size,
        libraries=0 if device.jetson else _ORT_LIBRARIES,
    )
    copies, shapes = 3 if device.jetson else 1, MaxShapes(workload.frames, workload.pass_tokens, workload.context)
    build = max(copies * weights[graph] + rules.activation_bytes(graph, model, shapes, _ITEM) for graph in weights)
    return Estimate(model, device, workload, memory, build, _times(model, device, workload, memory, options.prune))


def nearest_fit(found: Estimate, options: SizingOptions) -> SizingOptions | None:
    """The options closest to the given ones with which the model fits; None if there are none.

    Tried in this order: lower precision of the vision graph, of the decoder, pruning, fewer frames.
    """
    alternatives = _alternatives(found, options)
    return next((each for each in alternatives if estimate(found.model, found.device, each).fits), None)


def smallest_device(found: Estimate, options: SizingOptions) -> str | None:
    """The device with the least memory that holds the model with these options; Jetsons come first."""
    names = sorted(DEVICES, key=lambda name: (not DEVICES[name].jetson, DEVICES[name].memory))
    for name in names:
        try:
            if estimate(found.model, DEVICES[name], options).fits:
                return name
        except TangoError:  # the device cannot run this at all
            continue
    return None


def _alternatives(found: Estimate, options: SizingOptions) -> Iterator[SizingOptions]:
    model, device, workload = found.model, found.device, found.workload
    visions = _lighter(workload.vision, VISION, device, model.vision_precision)
    decoders = _lighter(workload.decoder, DECODER, device, model.decoder_precision)
    frames = [workload.frames, *(n for n in _FEWER_FRAMES if n < workload.frames)]
    prunes = [True] if options.prune else [False, *([True] if _runs_operator(device) else [])]
    for count, prune, decoder, vision in itertools.product(frames, prunes, decoders, visions):
        yield replace(options, frames=count, prune=prune, decoder=decoder, vision=vision)


def _lighter(chosen: Precision, known: Sequence[Precision], device: Device, current: Precision) -> list[Precision]:
    """A precision and those that take less memory; a graph that is already quantized stays as it is."""
    lighter = [each for each in known if each in device.precisions and BYTES[each] < BYTES[chosen]]
    return [chosen, *(lighter if current == "fp16" else [])]


def _runs_operator(device: Device) -> bool:
    return release(device.compute_capability) >= release(OPERATOR_CAPABILITY)


def _workload(model: ModelDimensions, device: Device, options: SizingOptions) -> Workload:
    frames = model.video.frames if options.frames is None else options.frames
    highest = MAX_FRAMES * model.video.frames_per_step
    if not 1 <= frames <= highest:
        raise TangoError(f"--frames is {frames}", f"it must be from 1 to {highest}")
    kept, most = _video_tokens(model, options, frames)
    text = rules.video_text_tokens(frames, model.video_text)
    limit, prompt = model.decoder.context, kept + text + TYPICAL_TEXT_TOKENS
    if prompt > limit:
        raise TangoError(
            f"a prompt of {prompt} tokens is longer than {model.name}'s {limit} positions",
            "use fewer --frames, or a lower --retention-ratio",
        )
    pass_tokens = rules.default_pass_tokens(most + text, limit)
    context = options.context
    if context is None:  # on a GPU, every sequence has a cache of the bundle's context
        context = limit if model.stored and not device.jetson else rules.default_context(pass_tokens, limit)
    if not prompt <= context <= limit:
        wrong = f"{model.name} has only {limit}" if context > limit else f"the prompt takes {prompt}"
        raise TangoError(
            f"--context is {context} positions, {wrong}", f"give one from {prompt} to {limit}, or fewer --frames"
        )
    return Workload(
        frames=frames,
        size=model.video.size,
        tokens=model.video.total_tokens(frames),
        kept=kept,
        thinned=inner.kept(kept) if (inner := model.decoder.inner) and options.prune else None,
        prompt=prompt,
        pass_tokens=min(pass_tokens, context),
        context=context,
        vision=_precision("--vision", options.vision, VISION, model.vision_precision),
        decoder=_precision("--decoder", options.decoder, DECODER, model.decoder_precision),
    )


def _video_tokens(model: ModelDimensions, options: SizingOptions, frames: int) -> tuple[int, int]:
    """Video tokens in the prompt: typical number and maximum."""
    if options.prune:
        ratio = model.params.retention_ratio if options.retention_ratio is None else options.retention_ratio
        params = model.params.at(ratio)
        typical = rules.typical_video_tokens(model.video, params, frames, row_ends=model.row_ends)
        return typical, rules.max_video_tokens(model.video, params, frames, row_ends=model.row_ends)
    if options.retention_ratio is not None:
        raise TangoError("--no-prune and --retention-ratio are mutually exclusive", "drop one of them")
    whole = rules.all_video_tokens(model.video, model.params, frames, row_ends=model.row_ends)
    return whole, whole


def _precision(flag: str, chosen: Precision | None, known: Sequence[Precision], current: Precision) -> Precision:
    if chosen is not None and chosen not in known:
        raise TangoError(f"{flag} is {chosen!r}", f"known are {', '.join(known)}")
    if current != "fp16" and chosen not in (None, current):
        raise TangoError(f"{flag} is {chosen}, and the bundle is already {current}", "name the fp16 bundle")
    return chosen or current


def _frame_bytes(model: ModelDimensions, frames: int) -> int:
    height, width = model.video.size
    return frames * height * width * 3


def _weights(model: ModelDimensions, workload: Workload) -> dict[GraphName, int]:
    vision, decoder = BYTES[workload.vision], BYTES[workload.decoder]
    computed: dict[GraphName, float] = {
        "vision": (model.tower.weights + sum(model.vision.projector)) * vision,
        "embed": model.embedding_rows * model.decoder.hidden_size * _ITEM,
        "decoder": (model.decoder_layers.weights + model.head_weights) * decoder,
    }
    unchanged: dict[GraphName, bool] = {
        "vision": model.vision_precision == workload.vision,
        "embed": True,
        "decoder": model.decoder_precision == workload.decoder,
    }
    stored = dict(model.stored)
    return {
        graph: stored[graph] if graph in stored and unchanged[graph] else round(size)
        for graph, size in computed.items()
    }


def _activations(model: ModelDimensions, device: Device, workload: Workload) -> int:
    """Bytes of all graphs' activations, in the forms that run on the device, with the slabs of quantized weights."""
    frames, tokens, one_size = workload.frames, workload.pass_tokens, model.video.budget is None
    if not device.jetson:
        tokens = min(tokens, rules.TOKENS_AT_ONCE)
        frames = min(frames, rules.STEPS_AT_ONCE * model.video.frames_per_step)
    shapes, found = MaxShapes(frames, tokens, workload.context), list[int]()
    precisions: dict[GraphName, Precision] = {"vision": workload.vision, "embed": "fp16", "decoder": workload.decoder}
    for graph, precision in precisions.items():
        fused = not device.jetson or (one_size and precision == "fp16")
        found.append(rules.activation_bytes(graph, model, shapes, _ITEM, fused=fused))
    if workload.decoder == "int4" and device.multiplies_slabs:
        found.append(rules.slab_bytes(model.decoder, model.vocabulary))
    return max(found) if device.jetson else sum(found)


def _times(model: ModelDimensions, device: Device, workload: Workload, memory: MemoryUse, prune: bool) -> StageTimes:
    return StageTimes(
        vision=vision_time(model, device, workload.frames, workload.vision),
        prune=prune_time(model, device, workload.frames) if prune else 0.0,
        prefill=prefill_time(model, device, _mean(workload.prompt, model, workload), workload.decoder, memory.decoder),
        token=token_time(model, device, _mean(workload.context, model, workload), memory.decoder, workload.decoder),
    )


def _mean(positions: int, model: ModelDimensions, workload: Workload) -> int:
    """How many of a sequence's positions a layer of the decoder sees, in the mean over its layers."""
    inner, layers = model.decoder.inner, model.decoder.layers
    if inner is None or workload.thinned is None:
        return positions
    return positions - (workload.kept - workload.thinned) * (layers - inner.layer) // layers
