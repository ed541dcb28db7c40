"""`tango plugin build` and `tango plugin info`: the CUDA library and the TensorRT plugin of this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from tango_plugins.build import Info, build, info
from tango_plugins.native_library import VARIABLE, installed
from tango_runtime.cli.main import Command
from tango_runtime.util.console import status


def _configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="build | info")
    building = actions.add_parser("build", help="build them with CMake and nvcc, for this machine's GPU")
    building.add_argument("--architectures", nargs="+", default=[], metavar="SM", help="such as 87 90")
    building.add_argument("--tensorrt-include", type=Path, metavar="FOLDER", help="folder of NvInfer.h")
    building.add_argument("--output", type=Path, metavar="FOLDER", help="default: where it is looked for")
    building.add_argument("--jobs", type=int, default=2, help="compilations at a time (default: %(default)s)")
    telling = actions.add_parser("info", help="tell what is installed")
    telling.add_argument("--output", type=Path, metavar="FOLDER", help="look here (default: where it is looked for)")


def _run(args: argparse.Namespace) -> int:
    if args.action == "info":
        return _tell(info(args.output))
    status("building with CMake and nvcc; this takes minutes")
    built = build(args.architectures, args.tensorrt_include, args.output, args.jobs)
    if built.library is not None and built.library.resolve() != installed().resolve():
        status(f"to use this library, set {VARIABLE}={built.library.resolve()}")
    return _tell(built)


def _tell(found: Info) -> int:
    """Prints what is installed; 0 if the CUDA library is there, else 1."""
    missing = "not built: tango plugin build"
    print(f"folder        {found.directory}")
    print(f"CUDA library  {f'{found.library.name} {found.version}' if found.library else missing}")
    print(f"TensorRT      {found.plugin.name if found.plugin else 'no plugin: --tensorrt-include names the headers'}")
    return 0 if found.library else 1


PLUGIN = Command(_configure, _run)
