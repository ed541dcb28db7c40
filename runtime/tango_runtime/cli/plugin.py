"""`tango plugin build` and `tango plugin info`: the CUDA library and the TensorRT plugin of this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from tango_plugins.build import Info, build, info
from tango_plugins.native_library import VARIABLE, installed
from tango_runtime.cli.args import add_jobs, add_output
from tango_runtime.cli.command import Command
from tango_runtime.util.console import status


def _configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="build | info")
    building = actions.add_parser(
        "build", allow_abbrev=False, help="build them with CMake and nvcc for this machine's GPU"
    )
    building.add_argument(
        "--architectures", nargs="+", default=[], metavar="SM", help="GPU architectures, such as 87 90"
    )
    building.add_argument("--tensorrt-include", type=Path, metavar="FOLDER", help="folder of NvInfer.h")
    add_output(building, "FOLDER", "default: where tango looks for them")
    add_jobs(building, 2)
    showing = actions.add_parser("info", allow_abbrev=False, help="show what is installed")
    showing.add_argument("--folder", type=Path, help="where to look (default: where tango looks for them)")


def _run(args: argparse.Namespace) -> int:
    if args.action == "info":
        return _print_info(info(args.folder))
    status("building with CMake and nvcc; this takes minutes")
    built = build(args.architectures, args.tensorrt_include, args.output, args.jobs)
    if built.library is not None and built.library.resolve() != installed().resolve():
        status(f"to use this library, set {VARIABLE}={built.library.resolve()}")
    return _print_info(built)


def _print_info(found: Info) -> int:
    """Prints what is installed; returns 0 if the CUDA library is there, else 1."""
    missing = "none for this machine: tango plugin build"
    print(f"folder        {found.directory}")
    print(f"CUDA library  {f'{found.library.name} {found.version}' if found.library else missing}")
    if found.origin is not None:
        fit = f"{found.code} for this GPU" if found.code else "no GPU to compare it with"
        print(f"in use        {found.origin}: {fit}")
    for reason in found.passed_over:
        print(f"not used      {reason}")
    print(f"TensorRT      {found.plugin.name if found.plugin else 'no plugin: build with --tensorrt-include'}")
    return 0 if found.library else 1


PLUGIN = Command(_configure, _run)
