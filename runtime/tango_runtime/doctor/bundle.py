"""Checks of a bundle and its TensorRT engines."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from tango_plugins import TangoError
from tango_runtime.bundle import GRAPHS, Bundle
from tango_runtime.doctor.check import Check
from tango_runtime.doctor.machine import Machine
from tango_runtime.engines import FOLDER, BuiltEngine, Target, all_graphs, find, read_sidecar, sidecars
from tango_runtime.engines.target import target_of
from tango_runtime.system import gpu as system
from tango_runtime.system.precisions import require_precisions
from tango_runtime.util.console import printable
from tango_runtime.util.units import megabytes

#: The axis that limits a graph's engines, and what it counts; of the others it is the tokens of a pass.
_AXES = {"vision": ("F", "frames"), "prune": ("F", "frames")}


def check_bundle(bundle: Bundle, machine: Machine, *, verify: bool) -> list[Check]:
    """Checks a bundle's engines against this machine.

    Args:
        bundle: The bundle, loaded with the same ``verify``.
        machine: This machine.
        verify: Compare the SHA-256 of the engines, too.
    """
    manifest = bundle.manifest
    verified = ", every SHA-256 matches bundle.json" if verify else ""
    checks = [Check("bundle", "ok", f"{bundle.path}: {printable(manifest.family)}, {manifest.dtype}{verified}")]
    gpu, tensorrt = machine.gpu, machine.tensorrt
    if gpu is not None:
        try:
            require_precisions(bundle, manifest.graphs, gpu.compute_capability)
        except TangoError as error:
            checks.append(Check("precision", "missing", error.message, error.hint, ("tensorrt", "ort-cuda")))
    if gpu is None or tensorrt is None:
        count = sum(len(sidecars(bundle, graph)) for graph in GRAPHS)
        if not count:
            return checks
        needed = "a GPU" if gpu is None else "TensorRT"
        return [*checks, Check("engines", "warning", f"{count} built; none can run here without {needed}", "see above")]
    try:
        plugin = system.plugin()
    except TangoError:  # check_machine has reported it
        plugin = None
    target = target_of(gpu, tensorrt, plugin)
    return [*checks, *_engines(bundle, target, verify), *_unused_engines(bundle)]


def _engines(bundle: Bundle, target: Target, verify: bool) -> Iterator[Check]:
    for graph in all_graphs(bundle):
        try:
            engine = find(bundle, graph, target, verify=verify)
        except TangoError as error:
            # The CUDA library does what a missing prune engine would.
            required = graph != "prune"
            backends = ("tensorrt",) if required else ()
            yield Check(f"{graph} engine", "missing" if required else "warning", error.message, error.hint, backends)
            continue
        if engine.warning:
            text, fix = f"{_describe(engine)}; {engine.warning}", f"{engine.rebuild} --rebuild"
            yield Check(f"{graph} engine", "warning", text, fix)
        else:
            yield Check(f"{graph} engine", "ok", _describe(engine))


def _describe(engine: BuiltEngine) -> str:
    sidecar = engine.sidecar
    axis, what = _AXES.get(sidecar.spec.graph, ("N", "tokens"))
    size = f"{megabytes(sidecar.size, 1)}, {engine.min_size(axis)} to {engine.max_size(axis)} {what}"
    context = f", context {engine.max_size('P', -1)}" if sidecar.spec.graph.startswith("decoder") else ""
    return f"{engine.path.name}, {engine.form} graph, {size}{context}"


def _unused_engines(bundle: Bundle) -> Iterator[Check]:
    """Engines of graphs that have changed since: nothing will ever load them."""
    unused = [file for graph in GRAPHS for file in sidecars(bundle, graph) if _is_unused(bundle, file)]
    if not unused:
        return
    engines = [file.with_suffix(".engine") for file in unused]
    size = sum(file.stat().st_size for file in engines if file.is_file())
    files = " ".join(shlex.quote(str(file)) for file in [*unused, *engines])
    text = f"{len(unused)} of graphs that this bundle no longer has, {megabytes(size, 1)}"
    yield Check(f"{FOLDER}/", "warning", text, f"rm {files}")


def _is_unused(bundle: Bundle, sidecar: Path) -> bool:
    try:
        spec = read_sidecar(sidecar).spec
    except TangoError:
        return True
    hashes = {name: file.sha256 for name, file in bundle.manifest.files.items()}
    return any(hashes.get(name) != digest for name, digest in spec.files.items())
