"""`tango inspect`: the contents of a bundle, and which of its TensorRT engines fit this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tango_plugins import TangoError
from tango_runtime import engines
from tango_runtime.bundle import GRAPHS, Bundle, GraphSpec, Manifest, TensorSpec, VideoSpec
from tango_runtime.cli.args import add_bundle, add_verify
from tango_runtime.cli.command import Command
from tango_runtime.engines import Target
from tango_runtime.engines.target import current_target
from tango_runtime.system.packages import import_tensorrt
from tango_runtime.util.console import printable
from tango_runtime.util.units import megabytes


def _configure(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add_verify(parser)


def _run(args: argparse.Namespace) -> int:
    bundle = Bundle.load(args.bundle, verify=args.verify)
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)  # names are a stranger's
    for name, fact in _facts(bundle, verified=args.verify).items():
        console.print(f"{name:<9}{printable(fact)}")
    console.print(_graph_table(bundle.manifest))
    files = [file for graph in GRAPHS for file in engines.sidecars(bundle, graph)]
    target, reason = _target() if files else (None, "")  # it takes a second and some GPU memory
    for file in files:
        line = _engine(bundle, file, target, reason, args.verify)
        console.print(f"{'engine':<9}{printable(line)}")
    return 0


def _facts(bundle: Bundle, *, verified: bool) -> dict[str, str]:
    manifest = bundle.manifest
    video, decoder, params, source = manifest.video, manifest.decoder, manifest.params, manifest.source
    salience = f", salience of {source.salience}" if source.salience else ""
    return {
        "bundle": f"{bundle.path}: {manifest.family}, {manifest.dtype}",
        "source": f"{source.checkpoint}{salience}, by {source.exporter}",
        "video": _video(video),
        "prune": f"retention ratio {params.retention_ratio}, budget {params.budget}, merge order {params.merge_order}",
        "decoder": f"{decoder.layers} layers, hidden size {decoder.hidden_size}, context {decoder.context}"
        + (f", {inner.ratio:g} of the video from layer {inner.layer} on" if (inner := decoder.inner) else ""),
        "files": "SHA-256 of every file matches bundle.json" if verified else "sizes match bundle.json",
    }


def _video(video: VideoSpec) -> str:
    height, width = video.size
    step = "each" if video.frames_per_step == 1 else f"every {video.frames_per_step}"
    if video.budget is None:
        return f"{video.frames} frames of {width}x{height}, {video.tokens_per_frame} tokens {step}"
    budget = f"up to {video.budget.max_pixels} pixels in multiples of {video.budget.factor}"
    return f"{video.frames} frames of {budget}, by default {width}x{height}: {video.tokens_per_frame} tokens {step}"


def _graph_table(manifest: Manifest) -> Table:
    table = Table("graph", "inputs", "outputs", "opset", "runs on", "MB", box=None, header_style="bold")
    for name, graph in manifest.graphs.items():
        size = sum(spec.size for file, spec in manifest.files.items() if file.startswith(graph.files))
        table.add_row(
            f"{name}\n{_precision(manifest, graph)}",
            _tensors(graph.inputs),
            _tensors(graph.outputs),
            str(graph.opset),
            "\n".join(dict.fromkeys((*graph.runtimes, *(graph.device.runtimes if graph.device else ())))),
            f"{size / 1e6:.1f}",
        )
    return table


def _precision(manifest: Manifest, graph: GraphSpec) -> str:
    found, device = graph.quantization, "\nand device" if graph.device else ""
    if found is None:
        return manifest.dtype + device
    excluded = f"\n{len(found.excluded)} excluded" if found.excluded else ""
    origin = f"{found.clips} clips" if found.clips else "without clips"
    return f"{found.precision}{device}\n{origin}{excluded}"


def _tensors(tensors: tuple[TensorSpec, ...], limit: int = 3) -> str:
    lines = [f"{printable(t.name)} {t.dtype} [{_axes(t)}]" for t in tensors[:limit]]
    return "\n".join(lines + ([f"and {len(tensors) - limit} more"] if len(tensors) > limit else []))


def _axes(tensor: TensorSpec) -> str:
    return ", ".join(printable(str(axis)) for axis in tensor.shape)


def _engine(bundle: Bundle, sidecar: Path, target: Target | None, reason: str, verify: bool) -> str:
    """One line about an engine: whether it fits, or why that is unknown."""
    file = sidecar.with_suffix(".engine")
    line = f"{file.name}, {megabytes(file.stat().st_size if file.is_file() else 0, 1)}: "
    if target is None:
        return f"{line}{_built_with(sidecar)}; cannot tell whether it fits: {reason}"
    try:
        engine = engines.check(bundle, sidecar, target, bundle.manifest.params, verify=verify)
    except TangoError as error:
        return line + error.message.removeprefix(f"{file} ")
    return f"{line}fits" + (f"; {engine.warning.removeprefix(f'{file.name} ')}" if engine.warning else "")


def _target() -> tuple[Target | None, str]:
    """This machine, or None and why no engine can run on it."""
    try:
        return current_target(import_tensorrt().__version__), ""
    except TangoError as error:
        return None, error.message


def _built_with(sidecar: Path) -> str:
    try:
        found = engines.read_sidecar(sidecar)
    except TangoError as error:
        return error.message
    return f"built with TensorRT {found.spec.tensorrt} on {found.gpu}"


INSPECT = Command(_configure, _run)
