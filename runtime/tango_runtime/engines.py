"""TensorRT engines of a bundle on disk: which are built, with what, and which of them fits this machine.

An engine stands in ``BUNDLE/engines`` as ``<graph>-<key>.engine``, and beside it ``<graph>-<key>.json`` tells in clear
what it was made of. The key is a hash of just that, so that what an engine does not depend on never rebuilds it. The
sidecar is written last: an engine without one is not there.

Nothing here imports TensorRT. `tango build` builds what :func:`plan` gives; the runtime loads what :func:`find` gives.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tango_plugins import PruneParams, TangoError, op
from tango_runtime.bundle import GRAPHS, Bundle, GraphName, Manifest, TensorSpec, sha256
from tango_runtime.schema import from_json

__all__ = [
    "FOLDER", "GRAPHS", "BuildOptions", "Estimate", "Found", "Machine", "Planned", "Profile", "Recipe", "Sidecar",
    "build_command", "check", "find", "plan", "read_sidecar", "release", "sidecars",
]  # fmt: skip

FOLDER = "engines"
FORMAT = 1

#: Smallest, typical and largest shape of one input.
Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]
#: The ranges of all inputs of a graph, by name.
Profile = dict[str, Range]

#: The decoder's profiles, by their index in its engine.
PREFILL, DECODE = 0, 1

#: trtexec's words for --hardware-compatibility, and the flag of TensorRT that each one is.
HARDWARE_LEVELS = {"none": "NONE", "ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"}

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
class Machine:
    """What an engine depends on beside its graph; :func:`tango_runtime.machine.here` gives this machine's.

    Attributes:
        tensorrt: Version of TensorRT, as ``8.6.0``.
        compute_capability: Of the GPU, as ``9.0``.
        gpu: The GPU's name.
        plugin: Interface version of the TensorRT plugin, None where it is not built.
    """

    tensorrt: str
    compute_capability: str
    gpu: str
    plugin: str | None = None


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
class Recipe:
    """All that one engine depends on; its key is the hash of this.

    Attributes:
        graph: Which graph.
        files: SHA-256 of the graph's files. None of prune's: its network is one node, made of ``attributes``.
        attributes: The operator's attributes, of prune only.
        plugin: Interface version of the TensorRT plugin, of prune only.
        tensorrt: Version of TensorRT.
        compute_capability: Of the GPU, as ``9.0``; ``8.0+`` where any from there on will do.
        flags: Names of TensorRT's network and builder flags.
        hardware_compatibility: A key of ``HARDWARE_LEVELS``.
        optimization_level: The builder's.
        workspace: MiB, None for TensorRT's own limit.
        profiles: One, or the decoder's two: ``PREFILL`` and ``DECODE``.
    """

    graph: GraphName
    files: dict[str, str]
    attributes: dict[str, int | str | list[int]]
    plugin: str | None
    tensorrt: str
    compute_capability: str
    flags: tuple[str, ...]
    hardware_compatibility: str
    optimization_level: int
    workspace: int | None
    profiles: tuple[Profile, ...]

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """File name of the engine."""
        return f"{self.graph}-{self.key}.engine"


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


@dataclass(frozen=True)
class Sidecar:
    """What ``<graph>-<key>.json`` tells of the engine beside it.

    Attributes:
        format: Version of this schema.
        recipe: What the engine was made of.
        gpu: Name of the GPU that it was made on.
        size: Bytes of the engine.
        sha256: Its SHA-256.
        seconds: Time that building it took.
        peak_host: The most host memory of the process that built it, resident set in bytes.
    """

    format: int
    recipe: Recipe
    gpu: str
    size: int
    sha256: str
    seconds: float
    peak_host: int


@dataclass(frozen=True)
class Found:
    """An engine to load.

    Where ``version_compatible`` the runtime must allow the engine's host code
    (``runtime.engine_host_code_allowed = True``); where ``stripped`` it must be refitted from the graph's ONNX file
    (``OnnxParserRefitter``). TensorRT 8 and 9 turn a graph's int64 inputs into int32: ask the engine for its types.

    Attributes:
        path: The engine.
        sidecar: What it was made of, read and checked.
        inputs: The graph's inputs.
        rebuild: The command that builds another.
        caution: What speaks against it without forbidding it, None as a rule.
    """

    path: Path
    sidecar: Sidecar
    inputs: tuple[TensorSpec, ...]
    rebuild: str
    caution: str | None = None

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """Its optimisation profiles."""
        return self.sidecar.recipe.profiles

    @property
    def version_compatible(self) -> bool:
        """Whether it embeds a runtime of its own, which is host code."""
        return "VERSION_COMPATIBLE" in self.sidecar.recipe.flags

    @property
    def stripped(self) -> bool:
        """Whether it holds no weights."""
        return "STRIP_PLAN" in self.sidecar.recipe.flags

    def largest(self, axis: str, profile: int = 0) -> int:
        """The most that a named axis of the graph (``F``, ``N``, ``P``) may have in a profile."""
        return self._bounds(axis, profile)[1]

    def smallest(self, axis: str, profile: int = 0) -> int:
        """The least that a named axis of the graph may have in a profile."""
        return self._bounds(axis, profile)[0]

    def check(self, shapes: Mapping[str, Sequence[int]], profile: int = 0) -> None:
        """Refuses shapes that the engine was not built for.

        Args:
            shapes: Shape of each input, by name.
            profile: Index of the optimisation profile.

        Raises:
            TangoError: A shape is outside; the message names the axis and the bound, the hint the flag.
        """
        for tensor in self.inputs:
            low, _, high = self.profiles[profile][tensor.name]
            shape = shapes[tensor.name]
            if len(shape) != len(low):
                raise TangoError(
                    f"{tensor.name} has shape {list(shape)}, the engine takes {len(low)} axes", self.rebuild
                )
            for axis, least, size, most in zip(tensor.shape, low, shape, high, strict=True):
                if not least <= size <= most:
                    raise TangoError(
                        f"{tensor.name} has {size} {_AXES.get(axis, 'along an axis')}, {self.path.name} was built for "
                        f"{least} to {most}",
                        f"build it with {_FLAGS.get(axis, 'another bundle')}: {self.rebuild}",
                    )

    def _bounds(self, axis: str, profile: int) -> tuple[int, int]:
        for tensor in self.inputs:
            if axis in tensor.shape:
                low, _, high = self.profiles[profile][tensor.name]
                place = tensor.shape.index(axis)
                return low[place], high[place]
        raise KeyError(axis)


_AXES: dict[int | str, str] = {"F": "frames", "N": "tokens", "P": "cached positions"}
_FLAGS: dict[int | str, str] = {"F": "--min-frames/--max-frames", "N": "--max-tokens", "P": "--context"}


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


def find(
    bundle: Bundle,
    graph: GraphName,
    machine: Machine,
    params: PruneParams | None = None,
    *,
    verify: bool = False,
) -> Found:
    """The newest engine of a graph that fits bundle, machine and parameters.

    Args:
        bundle: The bundle.
        graph: Which graph.
        machine: What is to run it.
        params: Parameters of the operator, for prune; None takes the bundle's.
        verify: Also compare the engine's SHA-256, which reads all of it.

    Raises:
        TangoError: There is none. The message names what an engine was made with and what is here, the hint is the
            command that builds one.
    """
    params = params or bundle.manifest.params
    refusals = []
    for file in sidecars(bundle, graph):
        try:
            return check(bundle, file, machine, params, verify=verify)
        except TangoError as error:
            refusals.append(error)
    if refusals:  # the newest is the likeliest to be the one that was meant
        raise refusals[0]
    raise TangoError(f"{bundle.path} has no engine for {graph}", f"build it: {build_command(bundle, graph, params)}")


def check(bundle: Bundle, file: Path, machine: Machine, params: PruneParams, *, verify: bool = False) -> Found:
    """One engine, if it fits bundle, machine and parameters.

    Args:
        bundle: The bundle.
        file: The engine's sidecar, one of :func:`sidecars`.
        machine: What is to run it.
        params: Parameters of the operator, for prune.
        verify: Also compare the engine's SHA-256, which reads all of it.

    Raises:
        TangoError: It does not fit, or is not whole. The message names both sides, the hint is the command that builds
            another.
    """
    sidecar, engine = read_sidecar(file), file.with_suffix(".engine")
    graph = sidecar.recipe.graph
    rebuild = build_command(bundle, graph, params)
    again = f"build it again: {rebuild}"
    difference = _difference(bundle.manifest, sidecar.recipe, machine, params)
    if difference:
        raise TangoError(f"{engine} {difference}", again)
    size = engine.stat().st_size if engine.is_file() else None
    if size != sidecar.size:
        raise TangoError(f"{engine} has {size or 0} bytes, its sidecar says {sidecar.size}", again)
    if verify and sha256(engine) != sidecar.sha256:
        raise TangoError(f"{engine} has changed: its SHA-256 is not the one in {file.name}", again)
    return Found(engine, sidecar, bundle.manifest.graphs[graph].inputs, rebuild, _caution(sidecar, machine))


def sidecars(bundle: Bundle, graph: GraphName) -> list[Path]:
    """The sidecars of a graph's engines, the newest first."""
    found = []
    for file in (bundle.path / FOLDER).glob(f"{graph}-*.json"):
        with suppress(FileNotFoundError):  # a build that replaces it
            found.append((file.stat().st_mtime, file))
    return [file for _, file in sorted(found, reverse=True)]


def read_sidecar(file: Path) -> Sidecar:
    """Reads and checks a sidecar.

    Raises:
        TangoError: It cannot be read, is not JSON, or not what this tango-edge writes.
    """
    again = f"remove it and build again: rm {shlex.quote(str(file))}"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("format") != FORMAT:
            raise TangoError(f"{file} has format {data.get('format')!r}, this tango-edge reads {FORMAT}", again)
        return from_json(Sidecar, data, str(file))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise TangoError(f"{file} is not JSON: {error}", again) from error
    except OSError as error:
        raise TangoError(f"{file} cannot be read: {error.strerror}", again) from error
    except TangoError as error:
        raise TangoError(error.message, again) from error


def build_command(bundle: Bundle, graph: GraphName, params: PruneParams) -> str:
    """The command that builds a graph's engine."""
    command = f"tango build {shlex.quote(str(bundle.path))} --graphs {graph}"
    if graph == "prune" and params.retention_ratio != bundle.manifest.params.retention_ratio:
        command += f" --retention-ratio {params.retention_ratio:g}"
    return command


def release(version: str) -> tuple[int, ...]:
    """A version as numbers: ``8.6.0`` → (8, 6, 0)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


# What is planned.


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
    runs_it = manifest.graphs[graph].engines
    if "tensorrt" not in runs_it:
        raise TangoError(
            f"TensorRT cannot run the {graph} graph of {bundle.path}: it is for {', '.join(runs_it)}",
            "leave it out with --graphs, or quantise to int8",
        )
    if prune and machine.plugin is None:
        raise TangoError(
            "the TensorRT plugin, which the prune engine needs, is not built",
            "build it: tango plugin build (--tensorrt-include names the headers); or without: "
            "--graphs vision embed decoder",
        )
    recipe = Recipe(
        graph=graph,
        files={} if prune else _digests(manifest, graph),
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


def _digests(manifest: Manifest, graph: GraphName) -> dict[str, str]:
    file = manifest.graphs[graph].file
    return {name: spec.sha256 for name, spec in manifest.files.items() if name in (file, f"{file}.data")}


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
    frames, tokens, width = sizes.frames[2], sizes.tokens[2], manifest.decoder.width
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


# What is found.


def _difference(manifest: Manifest, recipe: Recipe, machine: Machine, params: PruneParams) -> str | None:
    """In what an engine differs from what is wanted here, both sides named; None where it fits."""
    if not _runs_in(recipe, machine.tensorrt):
        return f"was made with TensorRT {recipe.tensorrt}, here is {machine.tensorrt}"
    if not _runs_on(recipe, machine.compute_capability):
        return (
            f"was made for compute capability {recipe.compute_capability}, "
            f"here is {machine.compute_capability} ({machine.gpu})"
        )
    if recipe.graph != "prune":
        return (
            None if recipe.files == _digests(manifest, recipe.graph) else "was made of another graph than the bundle's"
        )
    if recipe.plugin != machine.plugin:
        here = f"interface {machine.plugin}" if machine.plugin else "none (tango plugin build)"
        return f"was made with the plugin's interface {recipe.plugin}, here is {here}"
    wanted = op.node_attributes(params)
    for name, value in recipe.attributes.items():
        if wanted.get(name) != value:
            return f"was made for {name} {value}, asked is {wanted.get(name)}"
    return None


def _runs_in(recipe: Recipe, version: str) -> bool:
    """Version-compatible engines run in later versions of their major one, those of 8 in 10, and those of 10 in 11."""
    if "VERSION_COMPATIBLE" not in recipe.flags:
        return recipe.tensorrt == version
    made, here = release(recipe.tensorrt), release(version)
    return made <= here and (made[0] == here[0] or (made[0], here[0]) in ((8, 10), (10, 11)))


def _runs_on(recipe: Recipe, capability: str) -> bool:
    if recipe.compute_capability.endswith("+"):
        return release(capability) >= release(recipe.compute_capability[:-1])
    return recipe.compute_capability == capability


def _caution(sidecar: Sidecar, machine: Machine) -> str | None:
    if sidecar.gpu == machine.gpu or sidecar.recipe.hardware_compatibility != "none":
        return None
    return f"{sidecar.recipe.name} was made on a {sidecar.gpu}; on this {machine.gpu} it may be slower than its own"
