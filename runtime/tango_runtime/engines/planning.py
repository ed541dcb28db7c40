"""The engines that a bundle gets: what each is built from, its shapes and roughly its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tango_plugins import PruneParams, TangoError, op
from tango_runtime.bundle import GRAPHS, Bundle, DecoderSpec, GraphForm, GraphName, Manifest, TensorSpec
from tango_runtime.engines.spec import FOLDER, HARDWARE_LEVELS, EngineSpec, Profile, Shape, Target, digests
from tango_runtime.sizing import memory
from tango_runtime.system.precisions import require_precisions
from tango_runtime.util.versions import release
from tango_runtime.video.shape import at_size

_ITEM_BYTES = {"float16": 2, "float32": 4}
_MIB = 1 << 20
#: A CUDA context with TensorRT's kernels, on the device.
_CONTEXT_BYTES = 3 << 29
#: Host memory of a build by TensorRT's first version that takes so much: its libraries, and copies of the weights that
#: the engine holds. Of 8, measured with 8.6.0 on x86-64; of 10 and 11, with TensorRT-RTX 1.6.1 in their place
#: (docs/design/engine-builds.md).
_HOST_BYTES = {(10,): (1 << 30, 5), (0,): (4_600_000_000, 9)}


@dataclass(frozen=True)
class BuildOptions:
    """A user's choices; None takes what fits the bundle.

    Attributes:
        min_frames: Fewest frames.
        opt_frames: Frames that kernels are optimized for; None takes the bundle's number.
        max_frames: Most frames; None takes ``opt_frames``.
        max_tokens: Most tokens of one prefill pass; None takes what pruning keeps of ``max_frames``, and space for
            text. A longer prompt takes several passes.
        context: Positions of the decoder's cache; None takes ``max_tokens`` and space for an answer.
        workspace: Most MiB that a kernel may take beside its tensors; None leaves it to TensorRT.
        optimization_level: TensorRT's builder optimization level, 0 to 5.
        version_compatible: Make engines that run in later versions of TensorRT too.
        hardware_compatibility: A key of ``HARDWARE_LEVELS``.
        strip_weights: Leave the weights out of the engine; loading it takes them from the bundle.
        retention_ratio: Fraction of tokens that the prune engine keeps; None takes the bundle's.
        frame: (height, width) of the frames, where the bundle takes any size: an engine is built for one. None takes
            the bundle's default.
        form: The form of the graphs; None takes the device form of each that has one, where the plugins are built.
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
    frame: tuple[int, int] | None = None
    form: GraphForm | None = None


@dataclass(frozen=True)
class EngineMemory:
    """Rough memory of an engine, in bytes.

    Attributes:
        weights: Its weights, in the engine or beside it.
        file: The engine's file.
        activations: Memory beside the weights while it runs at its largest shapes.
        cache: Keys and values that the runtime holds for it.
        build_device: Device memory of its build.
        build_host: Host memory of its build.
    """

    weights: int
    file: int
    activations: int
    cache: int
    build_device: int
    build_host: int

    @property
    def run(self) -> int:
        """Device memory for running it."""
        return self.weights + self.activations + self.cache


@dataclass(frozen=True)
class EnginePlan:
    """An engine that can be built.

    Attributes:
        spec: What it is built from.
        path: Where it will be.
        memory: Roughly how much memory it takes.
    """

    spec: EngineSpec
    path: Path
    memory: EngineMemory

    @property
    def graph(self) -> GraphName:
        """The graph."""
        return self.spec.graph

    @property
    def key(self) -> str:
        """The key in its name."""
        return self.spec.key

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """Its optimization profiles."""
        return self.spec.profiles

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of TensorRT's network and builder flags."""
        return self.spec.flags


def plan_engines(
    bundle: Bundle, target: Target, options: BuildOptions, graphs: Sequence[GraphName] | None = None
) -> tuple[EnginePlan, ...]:
    """Plans the engines of a bundle; builds nothing and reads no file.

    Args:
        bundle: The bundle.
        target: The machine that the engines are for.
        options: The user's choices.
        graphs: The graphs to plan for; None plans for all.

    Raises:
        TangoError: An option is out of range, or this TensorRT does not know it.
    """
    bundle = _at_frame(bundle, options)
    sizes = _sizes(bundle.manifest, options)
    _check_options(target, options)
    chosen = all_graphs(bundle) if graphs is None else graphs
    return tuple(_plan(bundle, target, options, sizes, graph) for graph in chosen)


def all_graphs(bundle: Bundle) -> tuple[GraphName, ...]:
    """The graphs of a bundle, in the order in which engines of them are built."""
    return tuple(graph for graph in GRAPHS if graph in bundle.manifest.graphs)


def _at_frame(bundle: Bundle, options: BuildOptions) -> Bundle:
    """The bundle with the frames that engines are built for as its default."""
    if options.frame is None:
        return bundle
    manifest = bundle.manifest
    video, vision, params = at_size(manifest.video, manifest.vision, manifest.params, options.frame)
    return replace(bundle, manifest=replace(manifest, video=video, vision=vision, prune=op.attributes(params)))


@dataclass(frozen=True)
class _Sizes:
    """The options with every choice made: frames and tokens as (minimum, typical, maximum), positions of the cache."""

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
    limit, video, row_ends = manifest.decoder.context, manifest.video, manifest.prompt.row_end is not None
    highest = memory.MAX_FRAMES * video.frames_per_step
    _require(frames[2] <= highest, "--max-frames", frames[2], f"at most {highest}")
    kept = memory.max_video_tokens(video, params, frames[2], row_ends=row_ends)
    text = memory.video_text_tokens(frames[2], manifest.prompt.video_text is not None)
    most = _or(options.max_tokens, memory.default_pass_tokens(kept + text, limit))
    _require(1 <= most <= limit, "--max-tokens", most, f"from 1 to the bundle's context, {limit}")
    context = _or(options.context, memory.default_context(most, limit))
    _require(1 <= context <= limit, "--context", context, f"from 1 to the bundle's context, {limit}")
    # With the bundle's own ratio, whatever is asked for: another ratio alone must not rebuild the decoder.
    kept = memory.typical_video_tokens(video, manifest.params, video.frames, row_ends=row_ends)
    text = memory.video_text_tokens(video.frames, manifest.prompt.video_text is not None)
    prompt = kept + text + memory.TYPICAL_TEXT_TOKENS
    return _Sizes(frames, (1, min(prompt, most), most), context, params)


def _plan(bundle: Bundle, target: Target, options: BuildOptions, sizes: _Sizes, graph: GraphName) -> EnginePlan:
    manifest = bundle.manifest
    if graph not in manifest.graphs:
        raise TangoError(f"{bundle.path} has no graph {graph}", f"its graphs are {', '.join(all_graphs(bundle))}")
    prune, form = graph == "prune", _form(bundle, target, options, graph)
    _check_graph(bundle, target, graph, form)
    spec = EngineSpec(
        graph=graph,
        form=form,
        files={} if prune else digests(manifest, graph, form),
        attributes=op.node_attributes(sizes.params) if prune else {},
        plugin=target.plugin if prune or form == "device" else None,
        tensorrt=target.tensorrt,
        compute_capability=_hardware(target, options),
        flags=_flags(manifest, target, options, graph, form),
        hardware_compatibility=options.hardware_compatibility,
        optimization_level=options.optimization_level,
        workspace=options.workspace,
        profiles=_profiles(manifest, sizes, graph, form),
    )
    return EnginePlan(spec, bundle.path / FOLDER / spec.name, _memory(manifest, spec, sizes))


def _form(bundle: Bundle, target: Target, options: BuildOptions, graph: GraphName) -> GraphForm:
    """The form of a graph that its engine is built from."""
    spec = bundle.manifest.graphs[graph]
    # No plugin of the operators of quantized weights has been tried in TensorRT.
    usable = spec.device is not None and "tensorrt" in spec.device.runtimes and spec.quantization is None
    if options.form == "device" and not usable and graph != "prune":  # which is one node, and has no forms
        raise TangoError(
            f"the {graph} graph of {bundle.path} has no device form for TensorRT",
            "leave --form out, or export the bundle again",
        )
    wanted = options.form or ("portable" if target.plugin is None else "device")
    return "device" if usable and wanted == "device" else "portable"


def _check_graph(bundle: Bundle, target: Target, graph: GraphName, form: GraphForm) -> None:
    """Rejects a graph that this TensorRT cannot run."""
    spec = bundle.manifest.graphs[graph]
    if target.plugin is None and (graph == "prune" or form == "device"):
        raise TangoError(
            f"the plugins that the {graph} engine needs are not built for TensorRT {target.tensorrt}",
            "build them: tango plugin build (--tensorrt-include names the headers); or do without: "
            + ("--graphs vision embed decoder" if graph == "prune" else "--form portable"),
        )
    if "tensorrt" not in spec.runtimes:
        raise TangoError(
            f"TensorRT cannot run the {graph} graph of {bundle.path}: it is for {', '.join(spec.runtimes)}",
            f"leave it out with --graphs, or quantize it for TensorRT: {_quantize(graph)}",
        )
    require_precisions(bundle, [graph], target.compute_capability)
    if spec.quantization and spec.quantization.precision == "fp8" and release(target.tensorrt) < (10,):
        raise TangoError(
            f"the {graph} graph of {bundle.path} is in fp8, which needs TensorRT 10; this is {target.tensorrt}",
            f"quantize to int8: {_quantize(graph)}",
        )


def _quantize(graph: GraphName) -> str:
    return f"tango calibrate --{graph} int8 --target tensorrt"


def _hardware(target: Target, options: BuildOptions) -> str:
    return "8.0+" if options.hardware_compatibility == "ampere+" else target.compute_capability


def _flags(
    manifest: Manifest, target: Target, options: BuildOptions, graph: GraphName, form: GraphForm
) -> tuple[str, ...]:
    """The flags that give every layer the precision that it has in the graph.

    From TensorRT 10 on the network is strongly typed; before, each layer is constrained. TF32 rounds the operands of an
    fp32 product to eleven bits, as fp16 does. That suits the tower's scores, whose operands come from fp16. The
    decoder's operands reach 1e4 and more, where TF32 errs by whole units.
    """
    if release(target.tensorrt) >= (10,):
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
    if options.strip_weights and graph != "prune" and form == "portable":  # the others contain none
        flags += ["STRIP_PLAN", "REFIT_IDENTICAL"]
    return tuple(flags)


def _profiles(manifest: Manifest, sizes: _Sizes, graph: GraphName, form: GraphForm) -> tuple[Profile, ...]:
    """The ranges of a graph's inputs but for weights.

    A device decoder extends a cache of fixed capacity in place. A portable one has two profiles. Prefill takes any
    number of tokens after any number of cached ones. It is optimized for an empty cache: the whole prompt in one pass.
    TensorRT allows a size of 0 (0 <= min <= opt <= max in NvInferRuntime.h of 8.6 to 11.1), and NVIDIA's GPT2 for 8.6
    (TensorRT, demo/HuggingFace) has such a cache. A decode step takes one token after a cache of fixed capacity;
    ``positions`` says how much of the cache is valid.
    """
    spec, full = manifest.graphs[graph], (sizes.context,) * 3
    inputs = spec.device_inputs if form == "device" else spec.inputs
    if form == "device" and graph in manifest.decoders:
        return (_profile(inputs, {"N": sizes.tokens, "P": full}),)
    if graph in manifest.decoders:
        prefill = {"N": sizes.tokens, "P": (0, 0, sizes.context)}
        return _profile(inputs, prefill), _profile(inputs, {"N": (1, 1, 1), "P": full})
    low, typical, high = (manifest.video.steps(frames) for frames in sizes.frames)
    if graph == "vision" and manifest.video.budget is not None:  # the runtime gives it so many steps at once
        tokens, item = manifest.video.tokens_per_frame, _ITEM_BYTES[manifest.dtype]
        most = memory.vision_steps_at_once(manifest, tokens, item)
        low, typical, high = (min(n, most) for n in (low, typical, high))
    fixed = dict(zip("HWL", (*manifest.video.size, manifest.video.tokens_per_frame), strict=True))
    axes = {axis: (size, size, size) for axis, size in fixed.items()}
    return (_profile(inputs, {"F": (low, typical, high), "N": sizes.tokens, **axes}),)


def _profile(inputs: Sequence[TensorSpec], axes: Mapping[str, tuple[int, int, int]]) -> Profile:
    def shape(tensor: TensorSpec, which: int) -> Shape:
        return tuple(n if isinstance(n, int) else axes[n][which] for n in tensor.shape)

    return {tensor.name: (shape(tensor, 0), shape(tensor, 1), shape(tensor, 2)) for tensor in inputs}


def _memory(manifest: Manifest, spec: EngineSpec, sizes: _Sizes) -> EngineMemory:
    item = _ITEM_BYTES[manifest.dtype]
    shapes = memory.MaxShapes(sizes.frames[2], sizes.tokens[2], sizes.context)
    file = sum(manifest.files[name].size for name in spec.files)
    beside = manifest.files[manifest.graphs[spec.graph].data].size if spec.form == "device" else 0
    activations = memory.activation_bytes(spec.graph, manifest, shapes, item, fused=spec.form == "device")
    cache = memory.cache_bytes(_layers_of(manifest, spec.graph), sizes.context, item)
    libraries, copies = next(each for since, each in _HOST_BYTES.items() if release(spec.tensorrt) >= since)
    # The device holds the weights of the kernels that are timed.
    return EngineMemory(
        weights=file + beside,
        file=file,
        activations=activations,
        cache=cache,
        build_device=file + activations + (spec.workspace or 0) * _MIB + _CONTEXT_BYTES,
        build_host=libraries + copies * file,
    )


def _layers_of(manifest: Manifest, graph: GraphName) -> DecoderSpec:
    """The decoder with the layers that are in a graph, none in one that is not the decoder's."""
    decoder, low = manifest.decoder, manifest.decoder.inner.layer if manifest.decoder.inner else 0
    layers = {"decoder": decoder.layers, "decoder_low": low, "decoder_high": decoder.layers - low}
    return replace(decoder, layers=layers.get(graph, 0), inner=None)


def _check_options(target: Target, options: BuildOptions) -> None:
    version, level = release(target.tensorrt), options.optimization_level
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
            raise TangoError(f"{flag} needs TensorRT {wanted}, this is {target.tensorrt}", f"leave {flag} out")
    capability = target.compute_capability
    if hardware == "ampere+" and release(capability) < (8,):
        raise TangoError(f"--hardware-compatibility ampere+ on compute capability {capability}", "leave it out")


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise TangoError(f"{name} is {value!r}", f"it must be {wanted}")


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
