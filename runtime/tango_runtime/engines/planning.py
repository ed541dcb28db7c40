"""The engines that a bundle gets: recipes, shapes and rough memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tango_plugins import PruneParams, TangoError, op
from tango_runtime.bundle import GRAPHS, Bundle, GraphName, Manifest, TensorSpec
from tango_runtime.engines.spec import FOLDER, HARDWARE_LEVELS, Machine, Profile, Recipe, Shape, digests, release

#: Text around a pruned video, in tokens: chat template and question. What is longer is prefilled in several passes.
_TEXT = 128
#: Room for an answer that the default context leaves.
_ANSWER = 512
#: Defaults are rounded up to multiples of this many tokens: whole tiles for the kernels, and fewer different engines.
_TILE = 64
_MOST_FRAMES = 256  # TANGO_MAX_FRAMES of tango/prune.h
_BYTES = {"float16": 2, "float32": 4}
_MIB = 1 << 20
#: A CUDA context with TensorRT's kernels, and the builder's libraries in memory: about a gigabyte each.
_CONTEXT = _LIBRARIES = 1 << 30


@dataclass(frozen=True)
class BuildOptions:
    """What a user chooses; None takes what fits the bundle.

    Attributes:
        min_frames: Fewest frames.
        opt_frames: Frames that kernels are chosen for; None takes the bundle's number.
        max_frames: Most frames; None takes ``opt_frames``.
        max_tokens: Most tokens of one pass of the prefill; None takes what ``max_frames`` leave after pruning and 128
            more. A longer prompt is prefilled in several passes.
        context: Positions of the decoder's cache; None takes ``max_tokens`` and 512 more.
        workspace: Most MiB that a kernel may take beside its tensors; None leaves it to TensorRT.
        optimization_level: TensorRT's builder optimisation level, 0 to 5.
        version_compatible: Run in later versions of TensorRT too.
        hardware_compatibility: A key of ``HARDWARE_LEVELS``.
        strip_weights: Leave the weights out; they are taken from the bundle when the engine is loaded.
        retention_ratio: Fraction of tokens that the prune engine keeps; None takes the bundle's.
    """

    min_frames: int = 1
    opt_frames: int | None = None
    max_frames: int | None = None
    max_tokens: int | None = None
    context: int | None = None
    workspace: int | None = None
    optimization_level: int = 3
    version_compatible: bool = False
    hardware_compatibility: str = "none"
    strip_weights: bool = False
    retention_ratio: float | None = None


@dataclass(frozen=True)
class Estimate:
    """Rough memory of an engine, in bytes.

    Attributes:
        weights: Its weights.
        activations: What it needs beside them while it runs at its largest shape.
        cache: Keys and values that the runtime holds for it.
        build_device: What building it takes on the device.
        build_host: What building it takes on the host.
    """

    weights: int
    activations: int
    cache: int
    build_device: int
    build_host: int

    @property
    def run(self) -> int:
        """What running it takes on the device."""
        return self.weights + self.activations + self.cache


@dataclass(frozen=True)
class Planned:
    """An engine that can be built.

    Attributes:
        recipe: What it is made of.
        path: Where it will stand.
        estimate: Rough memory.
    """

    recipe: Recipe
    path: Path
    estimate: Estimate

    @property
    def graph(self) -> GraphName:
        """Which graph."""
        return self.recipe.graph

    @property
    def key(self) -> str:
        """The key in its name."""
        return self.recipe.key

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """Its optimisation profiles."""
        return self.recipe.profiles

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of TensorRT's network and builder flags."""
        return self.recipe.flags


def plan(
    bundle: Bundle, machine: Machine, options: BuildOptions, graphs: Sequence[GraphName] = GRAPHS
) -> list[Planned]:
    """The engines that a bundle gets; builds nothing and reads no file.

    Args:
        bundle: The bundle.
        machine: What they will run on.
        options: The user's choices.
        graphs: Which graphs.

    Raises:
        TangoError: An option is out of range, or this TensorRT does not know it.
    """
    sizes = _sizes(bundle.manifest, options)
    _check_options(machine, options)
    return [_planned(bundle, machine, options, sizes, graph) for graph in graphs]


@dataclass(frozen=True)
class _Sizes:
    """The options with nothing left open: frames and tokens as (least, typical, most), positions of the cache."""

    frames: tuple[int, int, int]
    tokens: tuple[int, int, int]
    context: int
    params: PruneParams


def _sizes(manifest: Manifest, options: BuildOptions) -> _Sizes:
    params = manifest.params
    if options.retention_ratio is not None:
        params = params.at(options.retention_ratio)
    typical = _or(options.opt_frames, min(manifest.video.frames, _or(options.max_frames, manifest.video.frames)))
    frames = (options.min_frames, typical, _or(options.max_frames, typical))
    _require(
        1 <= frames[0] <= frames[1] <= frames[2], "frames", frames, "1 <= --min-frames <= --opt-frames <= --max-frames"
    )
    _require(frames[2] <= _MOST_FRAMES, "--max-frames", frames[2], f"at most {_MOST_FRAMES}")
    limit, per_frame = manifest.decoder.context, manifest.video.tokens_per_frame
    most = _or(options.max_tokens, min(limit, _tiles(op.capacity(frames[2], per_frame, params) + _TEXT)))
    _require(1 <= most <= limit, "--max-tokens", most, f"from 1 to the bundle's context, {limit}")
    context = _or(options.context, min(limit, _tiles(most + _ANSWER)))
    _require(1 <= context <= limit, "--context", context, f"from 1 to the bundle's context, {limit}")
    # The bundle's own prompt, whatever ratio is asked for: another ratio alone must not rebuild the decoder.
    prompt = op.exact_count(manifest.video.frames, per_frame, manifest.params) + _TEXT // 2
    return _Sizes(frames, (1, min(prompt, most), most), context, params)


def _planned(bundle: Bundle, machine: Machine, options: BuildOptions, sizes: _Sizes, graph: GraphName) -> Planned:
    manifest = bundle.manifest
    prune = graph == "prune"
    runs_it = manifest.graphs[graph].runtimes
    if "tensorrt" not in runs_it:
        raise TangoError(
            f"TensorRT cannot run the {graph} graph of {bundle.path}: it is for {', '.join(runs_it)}",
            "leave it out with --graphs, or quantise it with: tango calibrate --vision int8 --engine tensorrt",
        )
    quantization = manifest.graphs[graph].quantization
    if quantization and quantization.precision == "fp8" and release(machine.tensorrt) < (10,):
        raise TangoError(
            f"the {graph} graph of {bundle.path} is in fp8, which needs TensorRT 10, here is {machine.tensorrt}",
            "quantise to int8: tango calibrate --vision int8 --engine tensorrt",
        )
    if prune and machine.plugin is None:
        raise TangoError(
            "the TensorRT plugin, which the prune engine needs, is not built",
            "build it: tango plugin build (--tensorrt-include names the headers); or without: "
            "--graphs vision embed decoder",
        )
    recipe = Recipe(
        graph=graph,
        files={} if prune else digests(manifest, graph),
        attributes=op.node_attributes(sizes.params) if prune else {},
        plugin=machine.plugin if prune else None,
        tensorrt=machine.tensorrt,
        compute_capability=_hardware(machine, options),
        flags=_flags(manifest, machine, options, graph),
        hardware_compatibility=options.hardware_compatibility,
        optimization_level=options.optimization_level,
        workspace=options.workspace,
        profiles=_profiles(manifest, sizes, graph),
    )
    return Planned(recipe, bundle.path / FOLDER / recipe.name, _estimate(manifest, recipe, sizes))


def _hardware(machine: Machine, options: BuildOptions) -> str:
    return "8.0+" if options.hardware_compatibility == "ampere+" else machine.compute_capability


def _flags(manifest: Manifest, machine: Machine, options: BuildOptions, graph: GraphName) -> tuple[str, ...]:
    """Precision is the graph's own: strongly typed from TensorRT 10 on, layer by layer before.

    TF32 rounds the operands of an fp32 product to eleven bits, as fp16 does. That is good enough for the tower's
    scores, whose operands come from fp16; the decoder's reach 1e4 and more, where it would be wrong by whole units.
    """
    if release(machine.tensorrt) >= (10,):
        flags = ["STRONGLY_TYPED"]
    elif manifest.dtype == "float16":
        flags = ["EXPLICIT_BATCH", "FP16", "OBEY_PRECISION_CONSTRAINTS"]
    else:
        flags = ["EXPLICIT_BATCH"]
    quantization = manifest.graphs[graph].quantization
    if quantization and quantization.precision == "int8" and "STRONGLY_TYPED" not in flags:
        flags.append("INT8")
    if graph == "vision" and manifest.dtype == "float16":
        flags.append("TF32")
    if options.version_compatible:
        flags.append("VERSION_COMPATIBLE")
    if options.strip_weights and graph != "prune":  # which has none
        flags += ["STRIP_PLAN", "REFIT_IDENTICAL"]
    return tuple(flags)


def _profiles(manifest: Manifest, sizes: _Sizes, graph: GraphName) -> tuple[Profile, ...]:
    """The ranges of a graph's inputs.

    The decoder has two. Prefill takes any number of tokens after any number of cached ones, and is chosen for an empty
    cache: the whole prompt in one pass. A size of 0 is within the rules (0 <= min <= opt <= max in NvInferRuntime.h of
    8.6 to 11.1); NVIDIA's GPT2 for 8.6 (TensorRT, demo/HuggingFace) has such a cache. Decoding takes one token after a
    cache of fixed capacity, of which ``positions`` tells how much counts.
    """
    inputs, full = manifest.graphs[graph].inputs, (sizes.context,) * 3
    if graph == "decoder":
        prefill = {"N": sizes.tokens, "P": (0, 0, sizes.context)}
        return _profile(inputs, prefill), _profile(inputs, {"N": (1, 1, 1), "P": full})
    return (_profile(inputs, {"F": sizes.frames, "N": sizes.tokens}),)


def _profile(inputs: Sequence[TensorSpec], axes: Mapping[str, tuple[int, int, int]]) -> Profile:
    def shape(tensor: TensorSpec, which: int) -> Shape:
        return tuple(n if isinstance(n, int) else axes[n][which] for n in tensor.shape)

    return {tensor.name: (shape(tensor, 0), shape(tensor, 1), shape(tensor, 2)) for tensor in inputs}


def _estimate(manifest: Manifest, recipe: Recipe, sizes: _Sizes) -> Estimate:
    weights = sum(manifest.files[name].size for name in recipe.files)
    activations = _activations(manifest, sizes, recipe.graph)
    decoder, item = manifest.decoder, _BYTES[manifest.dtype]
    cache = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * sizes.context * item
    # The host holds the weights as they were read and the engine as it is written, the device those that it times.
    return Estimate(
        weights=weights,
        activations=activations,
        cache=cache if recipe.graph == "decoder" else 0,
        build_device=weights + activations + (recipe.workspace or 0) * _MIB + _CONTEXT,
        build_host=2 * weights + _LIBRARIES,
    )


def _activations(manifest: Manifest, sizes: _Sizes, graph: GraphName) -> int:
    """An upper estimate of what an engine needs beside its weights: attention's scores in fp32, twice, where nothing
    fuses them, or the widest of its other tensors. It is a rule of thumb and says so where it is printed."""
    frames, tokens, width = sizes.frames[2], sizes.tokens[2], manifest.decoder.hidden_size
    per_frame, item = manifest.video.tokens_per_frame, _BYTES[manifest.dtype]
    if graph == "vision":  # four patches to a token; sixteen heads, as SigLIP has them
        patches = 4 * per_frame
        return frames * patches * (2 * 4 * 16 * patches + 8 * item * width)
    if graph == "prune":  # plugins/README.md
        return math.ceil(frames * per_frame * (2.125 * width + 120)) + 160 * 10**6
    if graph == "embed":
        return tokens * width * item
    heads = width // manifest.decoder.head_dim
    return tokens * (2 * 4 * heads * (sizes.context + tokens) + 16 * item * width)


def _check_options(machine: Machine, options: BuildOptions) -> None:
    version, level = release(machine.tensorrt), options.optimization_level
    _require(0 <= level <= 5, "--builder-optimization-level", level, "from 0 to 5")
    hardware = options.hardware_compatibility
    _require(hardware in HARDWARE_LEVELS, "--hardware-compatibility", hardware, f"one of {', '.join(HARDWARE_LEVELS)}")
    _require(options.workspace is None or options.workspace > 0, "--workspace", options.workspace, "above 0 MiB")
    asked = (
        (level != 3, "--builder-optimization-level", (8, 6)),
        (options.version_compatible, "--version-compatible", (8, 6)),
        (hardware != "none", "--hardware-compatibility", (8, 6)),
        (hardware == "sameComputeCapability", "--hardware-compatibility sameComputeCapability", (10, 9)),
        (options.strip_weights, "--strip-weights", (10,)),
    )
    for chosen, flag, since in asked:
        if chosen and version < since:
            wanted = ".".join(map(str, since))
            raise TangoError(f"{flag} needs TensorRT {wanted}, here is {machine.tensorrt}", f"leave {flag} out")
    capability = machine.compute_capability
    if hardware == "ampere+" and release(capability) < (8,):
        raise TangoError(f"--hardware-compatibility ampere+ on compute capability {capability}", "leave it out")


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise TangoError(f"{name} is {value!r}", f"it must be {wanted}")


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _tiles(tokens: int) -> int:
    return -(-tokens // _TILE) * _TILE
