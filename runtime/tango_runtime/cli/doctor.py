"""`tango doctor`: what works on this machine, what does not, and how to fix it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace

from rich.console import Console
from rich.text import Text

from tango_runtime.cli.args import STDOUT, add_bundle, add_json, add_verify, write_json
from tango_runtime.cli.command import Command
from tango_runtime.doctor import Check, Diagnosis, diagnose
from tango_runtime.doctor.check import GPU_BACKENDS
from tango_runtime.util.files import check_apart

_STYLES = {"ok": "green", "missing": "red", "warning": "yellow"}


def _configure(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser, nargs="?")
    add_verify(parser)
    add_json(parser)


def _run(args: argparse.Namespace) -> int:
    check_apart({"--json": args.json}, {"the bundle": args.bundle})
    diagnosis = diagnose(args.bundle, verify=args.verify)
    if args.json:
        write_json(args.json, {"ready": diagnosis.ready, "checks": [asdict(check) for check in diagnosis.checks]})
    if args.json != STDOUT:
        _print(diagnosis)
    return 0 if diagnosis.ready else 1


def _print(diagnosis: Diagnosis) -> None:
    """One line per check; its fix is on the next line, unbroken so that it can be copied."""
    console = Console(soft_wrap=True)
    checks = _shown(diagnosis.checks)
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text(f"{check.status:<8}", style=_STYLES[check.status])
        console.print(line.append(f"{check.name:<{width}}  {check.text}", style="default"))
        if check.fix:
            console.print(Text(f"{'':<{8 + width}}→ {check.fix}", style="bold"))
    console.print(Text(f"\nready: {', '.join(diagnosis.ready) or 'no backend'}"))


def _shown(checks: Sequence[Check]) -> list[Check]:
    """The checks, but without a GPU one line for everything that only a GPU needs."""
    gpu = next((check for check in checks if check.name == "GPU" and check.status == "missing"), None)
    if gpu is None:
        return list(checks)
    others = [check for check in checks if check.status == "missing" and set(check.backends) <= set(GPU_BACKENDS)]
    also = ", ".join(check.name for check in others if check is not gpu)
    text = f"{gpu.text}; also missing for a GPU: {also}" if also else gpu.text
    line = replace(gpu, text=text, fix=f"a CPU needs none of this; {gpu.fix}")
    return [line if check is gpu else check for check in checks if check is gpu or check not in others]


DOCTOR = Command(_configure, _run)
