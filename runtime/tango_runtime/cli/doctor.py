"""`tango doctor`: what is there, what is lacking, and what mends it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tango_runtime.cli.main import Command
from tango_runtime.system.doctor import Examination, examine

_STYLES = {"ok": "green", "lacking": "red", "beware": "yellow"}


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", help="look at this bundle's engines too")
    parser.add_argument("--verify", action="store_true", help="compare every file's and engine's SHA-256")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    found = examine(args.bundle, verify=args.verify)
    if args.json:
        told = {"ready": found.ready, "findings": [asdict(finding) for finding in found.findings]}
        print(json.dumps(told, indent=2))
    else:
        _print(found)
    return 0 if found.ready else 1


def _print(found: Examination) -> None:
    """A finding a line, its remedy on the next, unbroken so that it can be copied."""
    console = Console(soft_wrap=True)
    width = max(len(finding.name) for finding in found.findings)
    for finding in found.findings:
        line = Text(f"{finding.state:<8}", style=_STYLES[finding.state])
        console.print(line.append(f"{finding.name:<{width}}  {finding.text}", style="default"))
        if finding.mend:
            console.print(Text(f"{'':<{8 + width}}→ {finding.mend}", style="bold"))
    console.print(Text(f"\nready: {', '.join(found.ready) or 'no engine'}"))


DOCTOR = Command(_configure, _run)
