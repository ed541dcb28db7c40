"""Options that both commands share; see :mod:`tango_runtime.cli.args`."""

from __future__ import annotations

import argparse


def add_checkpoints(parser: argparse.ArgumentParser, note: str) -> None:
    """``--checkpoint`` and ``--siglip``."""
    parser.add_argument("--checkpoint", help=f"folder or hub id of the original model (default: {note})")
    parser.add_argument("--siglip", help=f"folder or hub id of the SigLIP that has the pooling head (default: {note})")
