"""`tango inspect`: what a bundle holds, its engines too, and whether they fit this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tango_plugins import TangoError
from tango_runtime import engines
from tango_runtime.bundle import GRAPHS, Bundle, GraphSpec, Manifest, TensorSpec
from tango_runtime.cli.main import Command
from tango_runtime.engines import Machine
from tango_runtime.system.gpu import here


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder that tango-export made")
    parser.add_argument("--verify", action="store_true", help="compare the SHA-256 of files, and of engines that fit")


def _run(args: argparse.Namespace) -> int:
    bundle = Bundle.load(args.bundle, verify=args.verify)
    manifest = bundle.manifest
    video, decoder, params = manifest.video, manifest.decoder, manifest.params
    (height, width), salience = video.size, ""
    if manifest.source.salience:
        salience = f", salience of {manifest.source.salience}"
    facts = {
        "bundle": f"{args.bundle}: {manifest.family}, {manifest.dtype}",
        "source": f"{manifest.source.checkpoint}{salience}, by {manifest.source.exporter}",
        "video": f"{video.frames} frames of {width}x{height}, {video.tokens_per_frame} tokens each",
        "prune": f"retention ratio {params.retention_ratio}, budget {params.budget}, merge order {params.merge_order}",
        "decoder": f"{decoder.layers} layers, width {decoder.hidden_size}, context {decoder.context}",
        "files": "SHA-256 of every file is as in bundle.json" if args.verify else "sizes are as in bundle.json",
    }
    console = Console(soft_wrap=True)
    for name, fact in facts.items():
        console.print(f"{name:<9}{fact}", markup=False, highlight=False)
    console.print(_graph_table(manifest))
    files = [file for graph in GRAPHS for file in engines.sidecars(bundle, graph)]
    machine, why = _machine() if files else (None, "")  # which takes a second, and some memory of the GPU
    for file in files:
        line = _told(bundle, file, machine, why, args.verify)
        console.print(f"{'engine':<9}{line}", markup=False, highlight=False)
    return 0


def _graph_table(manifest: Manifest) -> Table:
    table = Table("graph", "inputs", "outputs", "opset", "runs on", "MB", box=None, header_style="bold")
    for name, graph in manifest.graphs.items():
        size = sum(spec.size for file, spec in manifest.files.items() if file.startswith(graph.files))
        tensors = _tensors(graph.inputs), _tensors(graph.outputs)
        table.add_row(
            f"{name}\n{_precision(manifest, graph)}",
            *tensors,
            str(graph.opset),
            "\n".join(graph.runtimes),
            f"{size / 1e6:.1f}",
        )
    return table


def _precision(manifest: Manifest, graph: GraphSpec) -> str:
    found = graph.quantization
    if found is None:
        return manifest.dtype + ("\nand device" if graph.device else "")
    excluded = f"\n{len(found.excluded)} excluded" if found.excluded else ""
    return f"{found.precision}\n{found.clips} clips{excluded}"


def _tensors(tensors: tuple[TensorSpec, ...], most: int = 3) -> str:
    lines = [f"{t.name} {t.dtype} {list(t.shape)}".replace("'", "") for t in tensors[:most]]
    return "\n".join(lines + ([f"and {len(tensors) - most} more"] if len(tensors) > most else []))


def _told(bundle: Bundle, file: Path, machine: Machine | None, why: str, verify: bool) -> str:
    """An engine in one line."""
    engine = file.with_suffix(".engine")
    told = f"{engine.name}, {engine.stat().st_size / 1e6 if engine.is_file() else 0:.1f} MB: "
    if machine is None:
        return f"{told}{_made_with(file)}; whether it fits is not known: {why}"
    try:
        found = engines.check(bundle, file, machine, bundle.manifest.params, verify=verify)
    except TangoError as error:
        return told + error.message.removeprefix(f"{engine} ")
    return f"{told}fits" + (f"; {found.caution.removeprefix(f'{engine.name} ')}" if found.caution else "")


def _machine() -> tuple[Machine | None, str]:
    """This machine, or why no engine can run on it."""
    try:
        import tensorrt

        return here(tensorrt.__version__), ""
    except ImportError:
        return None, "TensorRT cannot be imported"
    except TangoError as error:
        return None, error.message


def _made_with(file: Path) -> str:
    try:
        sidecar = engines.read_sidecar(file)
    except TangoError as error:
        return error.message
    return f"made with TensorRT {sidecar.recipe.tensorrt} on {sidecar.gpu}"


INSPECT = Command(_configure, _run)
