"""The engines of a bundle on disk: which of them fits this machine, and why the others do not."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tango_plugins import PruneParams, TangoError, op
from tango_runtime.bundle import Bundle, GraphForm, GraphName, Manifest, TensorSpec, sha256
from tango_runtime.engines.spec import FOLDER, EngineSpec, Profile, Target, digests
from tango_runtime.util.jsonschema import from_json, parse_json, shown
from tango_runtime.util.versions import release

#: Version of the sidecar's schema.
FORMAT = 3


@dataclass(frozen=True)
class Sidecar:
    """Content of ``<graph>-<key>.json``, the description of the engine beside it.

    Attributes:
        format: Version of this schema.
        spec: What the engine was built from.
        gpu: Name of the GPU that it was built on.
        size: Size of the engine in bytes.
        sha256: The engine's SHA-256.
        seconds: Duration of the build.
        peak_host: Peak resident set of the building process, in bytes.
    """

    format: int
    spec: EngineSpec
    gpu: str
    size: int
    sha256: str
    seconds: float
    peak_host: int


@dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk that fits this machine.

    The caller must set ``runtime.engine_host_code_allowed = True`` for a ``version_compatible`` engine, load the
    library of the plugins for any other that has ``plugins``, bind the weights of a ``device`` graph, and refit a
    ``stripped`` engine from the graph's ONNX file (``OnnxParserRefitter``). TensorRT 8 and 9 turn a graph's int64
    inputs into int32: ask the engine for its types.

    Attributes:
        path: The engine.
        sidecar: Its sidecar, read and checked.
        inputs: The graph's inputs but for weights.
        rebuild: The command that builds the engine again.
        warning: Why the engine may be slow here; None for no reason.
    """

    path: Path
    sidecar: Sidecar
    inputs: tuple[TensorSpec, ...]
    rebuild: str
    warning: str | None = None

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """Its optimization profiles."""
        return self.sidecar.spec.profiles

    @property
    def form(self) -> GraphForm:
        """The form of its graph."""
        return self.sidecar.spec.form

    @property
    def plugins(self) -> bool:
        """Whether it has plugins."""
        return self.sidecar.spec.plugin is not None

    @property
    def version_compatible(self) -> bool:
        """Whether it embeds its own lean runtime, which is host code."""
        return "VERSION_COMPATIBLE" in self.sidecar.spec.flags

    @property
    def stripped(self) -> bool:
        """Whether it was built without weights."""
        return "STRIP_PLAN" in self.sidecar.spec.flags

    def max_size(self, axis: str, profile: int = 0) -> int:
        """Largest size of a named axis of the graph (``F``, ``H``, ``W``, ``N``, ``P``) in a profile."""
        return self._bounds(axis, profile)[1]

    def min_size(self, axis: str, profile: int = 0) -> int:
        """Smallest size of a named axis of the graph in a profile."""
        return self._bounds(axis, profile)[0]

    def check(self, shapes: Mapping[str, Sequence[int]], profile: int = 0) -> None:
        """Rejects shapes that the engine was not built for.

        Args:
            shapes: Shape of each input, by name.
            profile: Index of the optimization profile.

        Raises:
            TangoError: A shape is out of range. The message names axis and bounds, the hint names the flag.
        """
        for tensor in self.inputs:
            low, _, high = self.profiles[profile][tensor.name]
            shape = shapes[tensor.name]
            if len(shape) != len(low):
                raise TangoError(
                    f"{tensor.name} has shape {list(shape)}, the engine takes {len(low)} axes", self.rebuild
                )
            for axis, minimum, size, maximum in zip(tensor.shape, low, shape, high, strict=True):
                if not minimum <= size <= maximum:
                    raise TangoError(
                        f"{tensor.name} has {size} {_AXES.get(axis, 'along an axis')}, {self.path.name} was built for "
                        f"{minimum} to {maximum}",
                        f"build it with {_FLAGS.get(axis, 'another bundle')}: {self.rebuild}",
                    )

    def _bounds(self, axis: str, profile: int) -> tuple[int, int]:
        for tensor in self.inputs:
            if axis in tensor.shape:
                low, _, high = self.profiles[profile][tensor.name]
                place = tensor.shape.index(axis)
                return low[place], high[place]
        raise KeyError(axis)


_AXES: dict[int | str, str] = {
    "F": "frames",
    "H": "pixels of height",
    "W": "pixels of width",
    "N": "tokens",
    "P": "cached positions",
}
_FLAGS: dict[int | str, str] = {
    "F": "--min-frames/--max-frames",
    "H": "--frame",
    "W": "--frame",
    "N": "--max-tokens",
    "P": "--context",
}


def find(
    bundle: Bundle,
    graph: GraphName,
    target: Target,
    params: PruneParams | None = None,
    *,
    verify: bool = False,
) -> BuiltEngine:
    """The newest engine of a graph that fits bundle, machine and parameters.

    Args:
        bundle: The bundle.
        graph: The graph.
        target: The machine that runs the engine.
        params: The operator's parameters, for prune; None takes the bundle's.
        verify: Also compare the engine's SHA-256, which reads the whole file.

    Raises:
        TangoError: No engine fits. The message names what an engine was built for and what is here, the hint is the
            command that builds one.
    """
    params = params or bundle.manifest.params
    errors = []
    for file in sidecars(bundle, graph):
        try:
            return check(bundle, file, target, params, verify=verify)
        except TangoError as error:
            errors.append(error)
    if errors:  # the user most likely means the newest
        raise errors[0]
    raise TangoError(f"{bundle.path} has no engine for {graph}", f"build it: {build_command(bundle, graph, params)}")


def check(bundle: Bundle, file: Path, target: Target, params: PruneParams, *, verify: bool = False) -> BuiltEngine:
    """One engine, if it fits bundle, machine and parameters.

    Args:
        bundle: The bundle.
        file: The engine's sidecar, one of :func:`sidecars`.
        target: The machine that runs the engine.
        params: The operator's parameters, for prune.
        verify: Also compare the engine's SHA-256, which reads the whole file.

    Raises:
        TangoError: It does not fit, or is incomplete. The message names both sides, the hint is the command that
            builds it again.
    """
    sidecar, engine = read_sidecar(file), file.with_suffix(".engine")
    graph = sidecar.spec.graph
    rebuild = build_command(bundle, graph, params)
    again = f"build it again: {rebuild}"
    mismatch = _mismatch(bundle.manifest, sidecar.spec, target, params)
    if mismatch:
        raise TangoError(f"{engine} {mismatch}", again)
    size = engine.stat().st_size if engine.is_file() else None
    if size != sidecar.size:
        raise TangoError(f"{engine} has {size or 0} bytes, its sidecar says {sidecar.size}", again)
    if verify and sha256(engine) != sidecar.sha256:
        raise TangoError(f"{engine} has changed: its SHA-256 is not the one in {file.name}", again)
    spec = bundle.manifest.graphs[graph]
    inputs = spec.device_inputs if sidecar.spec.form == "device" else spec.inputs
    return BuiltEngine(engine, sidecar, inputs, rebuild, _warning(sidecar, target))


def sidecars(bundle: Bundle, graph: GraphName) -> list[Path]:
    """The sidecars of a graph's engines, newest first."""
    found = []
    for file in (bundle.path / FOLDER).glob(f"{graph}-*.json"):
        with suppress(FileNotFoundError):  # a build is replacing it
            found.append((file.stat().st_mtime, file))
    return [file for _, file in sorted(found, reverse=True)]


def read_sidecar(file: Path) -> Sidecar:
    """Reads and checks a sidecar.

    Raises:
        TangoError: It cannot be read, is not JSON, or has another schema.
    """
    again = f"remove it and build again: rm {shlex.quote(str(file))}"
    try:
        data = parse_json(file.read_bytes(), str(file), again)
        if isinstance(data, dict) and data.get("format") != FORMAT:
            found = shown(data.get("format"))
            raise TangoError(f"{file} has format {found}, this tango-edge reads {FORMAT}", again)
        return from_json(Sidecar, data, str(file))
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


def _mismatch(manifest: Manifest, spec: EngineSpec, target: Target, params: PruneParams) -> str | None:
    """How an engine differs from what is needed here, both sides named; None if it fits."""
    if not _runs_in(spec, target.tensorrt):
        return f"was built with TensorRT {spec.tensorrt}, this is {target.tensorrt}"
    if not _runs_on(spec, target.compute_capability):
        return (
            f"was built for compute capability {spec.compute_capability}, "
            f"this GPU has {target.compute_capability} ({target.gpu})"
        )
    if spec.plugin not in (None, target.plugin):
        installed = f"interface {target.plugin}" if target.plugin else "none (tango plugin build)"
        return f"was built with the plugins' interface {spec.plugin}, installed is {installed}"
    if spec.graph != "prune":
        same = spec.files == digests(manifest, spec.graph, spec.form)
        return None if same else "was built from another graph than the bundle's"
    wanted = op.node_attributes(params)
    for name, value in spec.attributes.items():
        if name == "grid" and manifest.video.budget is not None:  # any that it was built for is one of the bundle's
            continue
        if wanted.get(name) != value:
            return f"was built for {name} {value}, needed is {wanted.get(name)}"
    return None


def _runs_in(spec: EngineSpec, version: str) -> bool:
    """Version-compatible engines run in later versions of their major version, those of 8 also in 10, of 10 in 11."""
    if "VERSION_COMPATIBLE" not in spec.flags:
        return spec.tensorrt == version
    built, runs = release(spec.tensorrt), release(version)
    return built <= runs and (built[0] == runs[0] or (built[0], runs[0]) in ((8, 10), (10, 11)))


def _runs_on(spec: EngineSpec, capability: str) -> bool:
    if spec.compute_capability.endswith("+"):
        return release(capability) >= release(spec.compute_capability[:-1])
    return spec.compute_capability == capability


def _warning(sidecar: Sidecar, target: Target) -> str | None:
    if sidecar.gpu == target.gpu or sidecar.spec.hardware_compatibility != "none":
        return None
    return f"{sidecar.spec.name} was built on {sidecar.gpu}; it may be slow on this {target.gpu}"
