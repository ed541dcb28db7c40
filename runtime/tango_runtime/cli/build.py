"""`tango build`: the engines of a bundle, for this machine. Its flags have trtexec's names where trtexec has them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tango_plugins import TangoError
from tango_runtime.bundle import GRAPHS, Bundle, GraphName
from tango_runtime.cli.main import Command
from tango_runtime.engines import HARDWARE_LEVELS, BuildOptions, EnginePlan, Profile, Target, plan_engines, read_sidecar
from tango_runtime.engines.build import OnStatus, build, is_built, require_memory
from tango_runtime.system import gpu as machine
from tango_runtime.util.console import status

_QUARTERS = 4


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder that tango-export made")
    parser.add_argument("--graphs", nargs="+", choices=GRAPHS, help="which (default: all)")
    _configure_shapes(parser.add_argument_group("shapes"))
    _configure_builder(parser.add_argument_group("builder"))
    parser.add_argument("--dry-run", action="store_true", help="tell what would be built, and build nothing")
    parser.add_argument("--rebuild", action="store_true", help="build what is there already too")
    parser.add_argument("--no-memory-check", action="store_true", help="begin though memory will hardly do")


def _configure_shapes(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--min-frames", type=int, default=1, help="fewest frames of a video (default: %(default)s)")
    group.add_argument("--opt-frames", type=int, help="frames that kernels are chosen for (default: the bundle's)")
    group.add_argument("--max-frames", type=int, help="most frames of a video (default: --opt-frames)")
    group.add_argument(
        "--max-tokens", type=int, help="most tokens of one pass of the prefill (default: what pruning leaves, and 128)"
    )
    group.add_argument("--context", type=int, help="positions of the cache (default: --max-tokens and 512)")
    group.add_argument("--retention-ratio", type=float, help="fraction that prune keeps (default: the bundle's)")


def _configure_builder(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--workspace", type=int, metavar="MIB", help="most memory of one kernel (default: TensorRT's)")
    group.add_argument(
        "--builder-optimization-level",
        type=int,
        default=3,
        metavar="0..5",
        help="how long to look for the fastest kernels (default: %(default)s)",
    )
    group.add_argument("--timing-cache", type=Path, metavar="FILE", help="what kernels took (default: in engines/)")
    group.add_argument("--version-compatible", action="store_true", help="run in later versions of TensorRT too")
    group.add_argument(
        "--hardware-compatibility", choices=HARDWARE_LEVELS, default="none", help="run on other GPUs too"
    )
    group.add_argument("--strip-weights", action="store_true", help="take the weights from the bundle when loading")


def _options(args: argparse.Namespace) -> BuildOptions:
    return BuildOptions(
        min_frames=args.min_frames,
        opt_frames=args.opt_frames,
        max_frames=args.max_frames,
        max_tokens=args.max_tokens,
        context=args.context,
        workspace=args.workspace,
        optimization_level=args.builder_optimization_level,
        version_compatible=args.version_compatible,
        hardware_compatibility=args.hardware_compatibility,
        strip_weights=args.strip_weights,
        retention_ratio=args.retention_ratio,
    )


def _run(args: argparse.Namespace) -> int:
    if args.timing_cache and not args.timing_cache.resolve().parent.is_dir():
        raise TangoError(f"there is no folder {args.timing_cache.resolve().parent}", "make it, or name another file")
    bundle = Bundle.load(args.bundle)
    version = _tensorrt()
    this, library = machine.current_target(version), machine.plugin()
    planned = plan_engines(bundle, this, _options(args), args.graphs or _all(library, version))
    if library and not library.serves(version) and any(one.graph == "prune" for one in planned):
        raise TangoError(
            f"{library.path} has the interface {library.api}, which is not for TensorRT {version}",
            "build it with this TensorRT's headers: tango plugin build --tensorrt-include FOLDER",
        )
    status(f"TensorRT {version}, {this.gpu}, compute capability {this.compute_capability}")
    if args.dry_run:
        _print_plan(planned)
        return 0
    for one in planned:
        _build(bundle, one, this, library, args)
    return 0


def _all(library: machine.Plugin | None, version: str) -> Sequence[GraphName]:
    """All graphs; without prune where its plugin is not built: `tango run` takes the CUDA library for it."""
    if library and library.serves(version):
        return GRAPHS
    status("without an engine for prune: its plugin is not built for this TensorRT (tango plugin build)")
    return tuple(graph for graph in GRAPHS if graph != "prune")


def _tensorrt() -> str:
    try:
        import tensorrt
    except ImportError as error:
        raise TangoError(f"this Python has no TensorRT: {error}", "see what is missing: tango doctor") from error
    version: str = tensorrt.__version__
    return version


def _build(
    bundle: Bundle, planned: EnginePlan, this: Target, library: machine.Plugin | None, args: argparse.Namespace
) -> None:
    if is_built(planned) and not args.rebuild:
        status(f"{planned.path.name} is there already")
        return
    if not args.no_memory_check:
        require_memory(planned, machine.free(machine.gpu()))
    with _watch(planned.graph) as on_status:
        built = build(
            bundle,
            planned,
            this,
            plugin=library.path if library else None,
            timing_cache=args.timing_cache.resolve() if args.timing_cache else None,
            rebuild=args.rebuild,
            on_status=on_status,
        )
    _tell_built(planned, built)


def _tell_built(planned: EnginePlan, built: bool) -> None:
    sidecar = read_sidecar(planned.path.with_suffix(".json"))
    how = f"in {sidecar.seconds:.0f} s" if built else "by another process"
    peak = f"{sidecar.peak_host / 1e6:.0f} MB of host memory (peak resident set)"
    status(f"{planned.path.name}: {sidecar.size / 1e6:.1f} MB, built {how}, {peak}")


@contextmanager
def _watch(graph: str) -> Iterator[OnStatus]:
    """A bar, stage and elapsed time on a terminal; elsewhere a line for each stage and quarter."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(graph)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[stage]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{graph:<8}", total=None, stage="")

        def on_status(stage: str, fraction: float | None) -> None:
            bar.update(task, total=None if fraction is None else 1.0, completed=fraction or 0.0, stage=stage)

        yield on_status


def _lines(graph: str) -> OnStatus:
    shown: tuple[str, int] = ("", 0)

    def on_status(stage: str, fraction: float | None) -> None:
        nonlocal shown
        quarter = int((fraction or 0.0) * _QUARTERS)
        if stage != shown[0] or quarter > shown[1]:
            shown = (stage, quarter)
            status(f"{graph}: {stage}" + (f" {100 * quarter // _QUARTERS}%" if quarter else ""))

    return on_status


def _print_plan(planned: Sequence[EnginePlan]) -> None:
    """What --dry-run says, on standard output."""
    for one in planned:
        state = "built" if is_built(one) else "not built"
        print(f"{one.graph}: {one.path} ({state})")
        print(f"  key      {one.key}")
        print(f"  flags    {' '.join(one.flags)}")
        for i, profile in enumerate(one.profiles):
            print(f"  profile  {i}: {_shapes(profile)}")
        memory = one.memory
        parts = {"weights": memory.weights, "activations": memory.activations, "cache": memory.cache}
        told = " + ".join(f"{name} {size / 1e6:.0f}" for name, size in parts.items() if size)
        print(f"  running  about {memory.run / 1e6:.0f} MB: {told}")
        building = f"{memory.build_device / 1e6:.0f} MB on the device, {memory.build_host / 1e6:.0f} MB on the host"
        print(f"  building about {building}")


def _shapes(profile: Profile, most: int = 3) -> str:
    """``name 1x384x384x3 .. 32x384x384x3 .. 32x384x384x3`` of the first inputs."""
    lines = [f"{name} {' .. '.join('x'.join(map(str, shape)) for shape in shapes)}" for name, shapes in profile.items()]
    return "; ".join(lines[:most]) + (f"; and {len(lines) - most} more alike" if len(lines) > most else "")


BUILD = Command(_configure, _run)
