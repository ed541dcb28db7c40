"""`tango build`: the TensorRT engines of a bundle, for this machine. Options have trtexec's names where it has them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from tango_runtime.bundle import GRAPHS, Bundle, GraphForm, GraphName
from tango_runtime.cli.args import (
    add_bundle,
    add_context,
    add_count,
    add_frame,
    add_retention_ratio,
    new_file,
    positive_int,
)
from tango_runtime.cli.command import Command
from tango_runtime.engines import (
    HARDWARE_LEVELS,
    BuildOptions,
    EnginePlan,
    Profile,
    Target,
    all_graphs,
    plan_engines,
    read_sidecar,
)
from tango_runtime.engines.build import build, is_built, require_memory
from tango_runtime.engines.target import current_target
from tango_runtime.system import gpu as system
from tango_runtime.system.packages import import_tensorrt
from tango_runtime.util.console import stages, status
from tango_runtime.util.units import megabytes


def _configure(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument("--graphs", nargs="+", choices=GRAPHS, help="graphs to build engines for (default: all)")
    parser.add_argument(
        "--form",
        choices=get_args(GraphForm),
        help="device: graphs in the CUDA library's operators, with weights beside the engine; portable: graphs in "
        "standard operators (default: device where the bundle has it and the plugins are built)",
    )
    _configure_shapes(parser.add_argument_group("shapes"))
    _configure_builder(parser.add_argument_group("builder"))
    parser.add_argument("--dry-run", action="store_true", help="show what would be built, and build nothing")
    parser.add_argument("--rebuild", action="store_true", help="build engines that already exist, too")
    parser.add_argument("--no-memory-check", action="store_true", help="build even if memory may not suffice")


def _configure_shapes(group: argparse._ArgumentGroup) -> None:
    add_count(group, "--min-frames", "minimum number of frames of a video", 1)
    add_count(group, "--opt-frames", "number of frames to optimize for", note="the bundle's")
    add_count(group, "--max-frames", "maximum number of frames of a video", note="--opt-frames")
    add_count(group, "--max-tokens", "maximum number of tokens in one prefill pass", note="the pruned video plus 128")
    add_frame(group)
    add_context(group, "--max-tokens plus 512")
    add_retention_ratio(group)


def _configure_builder(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workspace", type=positive_int, metavar="MIB", help="workspace limit of a kernel (default: TensorRT's)"
    )
    group.add_argument(
        "--builder-optimization-level",
        type=int,
        default=3,
        metavar="0..5",
        help="how long to search for faster kernels (default: %(default)s)",
    )
    group.add_argument(
        "--timing-cache", type=new_file, metavar="FILE", help="measured kernel times, to reuse (default: in engines/)"
    )
    group.add_argument("--version-compatible", action="store_true", help="also run on later versions of TensorRT")
    group.add_argument(
        "--hardware-compatibility", choices=HARDWARE_LEVELS, default="none", help="also run on other GPUs"
    )
    group.add_argument("--strip-weights", action="store_true", help="read the weights from the bundle at load time")


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
        frame=args.frame,
        form=args.form,
    )


def _run(args: argparse.Namespace) -> int:
    bundle = Bundle.load(args.bundle)
    target, plugin = current_target(import_tensorrt().__version__), system.plugin()
    plans = plan_engines(bundle, target, _options(args), args.graphs or _available_graphs(bundle, target))
    status(f"TensorRT {target.tensorrt}, {target.gpu}, compute capability {target.compute_capability}")
    if args.dry_run:
        _print_plans(plans)
        return 0
    for plan in plans:
        _build(bundle, plan, target, plugin, args)
    return 0


def _available_graphs(bundle: Bundle, target: Target) -> Sequence[GraphName]:
    """All graphs, without prune if its plugin is not built: `tango run` then uses the CUDA library for it."""
    if target.plugin is not None:
        return all_graphs(bundle)
    status("no prune engine, no device graphs: the plugins are not built for this TensorRT (tango plugin build)")
    return tuple(graph for graph in all_graphs(bundle) if graph != "prune")


def _build(
    bundle: Bundle, plan: EnginePlan, target: Target, plugin: system.Plugin | None, args: argparse.Namespace
) -> None:
    if is_built(plan) and not args.rebuild:
        status(f"{plan.path.name} already exists")
        return
    if not args.no_memory_check:
        require_memory(plan, system.free(system.gpu()))
    with stages(plan.graph) as on_status:
        built = build(
            bundle,
            plan,
            target,
            plugin=plugin.path if plugin else None,
            timing_cache=args.timing_cache.resolve() if args.timing_cache else None,
            rebuild=args.rebuild,
            on_status=on_status,
        )
    _print_built(plan, built)


def _print_built(plan: EnginePlan, built: bool) -> None:
    sidecar = read_sidecar(plan.path.with_suffix(".json"))
    how = f"in {sidecar.seconds:.0f} s" if built else "by another process"
    peak = f"{megabytes(sidecar.peak_host)} of host memory (peak resident set)"
    status(f"{plan.path.name}: {megabytes(sidecar.size, 1)}, built {how}, {peak}")


def _print_plans(plans: Sequence[EnginePlan]) -> None:
    """The output of --dry-run."""
    for plan in plans:
        print(f"{plan.graph}: {plan.path} ({'built' if is_built(plan) else 'not built'})")
        print(f"  key      {plan.key}")
        print(f"  form     {plan.spec.form}")
        print(f"  flags    {' '.join(plan.flags)}")
        for i, profile in enumerate(plan.profiles):
            print(f"  profile  {i}: {_shapes(profile)}")
        memory = plan.memory
        parts = {"weights": memory.weights, "activations": memory.activations, "cache": memory.cache}
        sizes = " + ".join(f"{name} {size / 1e6:.0f}" for name, size in parts.items() if size)
        print(f"  running  about {megabytes(memory.run)}: {sizes}")
        host = megabytes(memory.build_host)
        print(f"  building about {megabytes(memory.build_device)} on the device, {host} on the host")


def _shapes(profile: Profile, limit: int = 3) -> str:
    """``name 1x384x384x3 .. 32x384x384x3 .. 32x384x384x3`` of the first inputs."""
    lines = [f"{name} {' .. '.join('x'.join(map(str, shape)) for shape in shapes)}" for name, shapes in profile.items()]
    return "; ".join(lines[:limit]) + (f"; and {len(lines) - limit} more like them" if len(lines) > limit else "")


BUILD = Command(_configure, _run)
