"""The engines of a bundle on disk: which of them fits this machine, and why the others do not."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tango_plugins import PruneParams, TangoError, op
from tango_runtime.bundle import Bundle, GraphName, Manifest, TensorSpec, sha256
from tango_runtime.engines.spec import FOLDER, Machine, Profile, Recipe, digests, release
from tango_runtime.util.jsonschema import from_json

#: Version of the sidecar's schema.
FORMAT = 1


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
            None if recipe.files == digests(manifest, recipe.graph) else "was made of another graph than the bundle's"
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
