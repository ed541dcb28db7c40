"""`tango doctor`: what works on this machine, what does not, and how to fix it."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from tango_runtime.cli.args import STDOUT, add_bundle, add_json, add_verify, write_json
from tango_runtime.cli.command import Command
from tango_runtime.doctor import Diagnosis, diagnose
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
    width = max(len(check.name) for check in diagnosis.checks)
    for check in diagnosis.checks:
        line = Text(f"{check.status:<8}", style=_STYLES[check.status])
        console.print(line.append(f"{check.name:<{width}}  {check.text}", style="default"))
        if check.fix:
            console.print(Text(f"{'':<{8 + width}}→ {check.fix}", style="bold"))
    console.print(Text(f"\nready: {', '.join(diagnosis.ready) or 'no backend'}"))


DOCTOR = Command(_configure, _run)
