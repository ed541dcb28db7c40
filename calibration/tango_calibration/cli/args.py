"""Options that both commands share; see :mod:`tango_runtime.cli.args`."""

from __future__ import annotations

import argparse

from tango_calibration.data.dataset import SYNTHETIC
from tango_runtime.cli.args import add_count


def add_data(parser: argparse.ArgumentParser) -> None:
    """``--data``."""
    parser.add_argument(
        "--data",
        default=SYNTHETIC,
        metavar="FOLDER",
        help=f"folder with a questions.jsonl, another table of questions, or {SYNTHETIC} for generated clips "
        "(default: %(default)s)",
    )


def add_videos(parser: argparse.ArgumentParser, default: int | None = None, note: str = "%(default)s") -> None:
    """``--videos``."""
    add_count(parser, "--videos", "maximum number of videos to use", default, note)
