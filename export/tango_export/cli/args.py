"""Options that both commands share; see :mod:`tango_runtime.cli.args`."""

from __future__ import annotations

import argparse


def add_checkpoints(parser: argparse.ArgumentParser, note: str) -> None:
    """``--checkpoint`` and ``--salience-checkpoint``."""
    parser.add_argument("--checkpoint", help=f"folder or hub id of the original model (default: {note})")
    parser.add_argument(
        "--salience-checkpoint",
        "--siglip",  # what it is for LLaVA's families
        metavar="SALIENCE_CHECKPOINT",
        help="folder or hub id of the checkpoint whose pooling head gives the salience: the SigLIP of the vision tower "
        f"(default: {note})",
    )
