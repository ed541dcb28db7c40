"""`tango export`, also `tango-export`: a checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from tango_export.cli.args import add_checkpoints
from tango_export.cli.validate import print_comparisons
from tango_export.export import DTYPES, Request, export, known_models
from tango_export.validate import missing_packages, validate
from tango_plugins import TangoError
from tango_plugins.params import Budget
from tango_runtime.bundle import InnerPruning
from tango_runtime.cli.args import (
    add_context,
    add_frame_size,
    add_frames,
    add_output,
    add_overwrite,
    add_retention_ratio,
    non_negative_int,
    positive_int,
    ratio,
)
from tango_runtime.cli.command import Command
from tango_runtime.util.console import status
from tango_runtime.util.files import check_apart


def _configure(parser: argparse.ArgumentParser) -> None:
    default = Request()
    parser.add_argument(
        "--model",
        default=default.model,
        help=f"model (a family or a published checkpoint: {', '.join(known_models())}; default: %(default)s)",
    )
    add_checkpoints(parser, "the published one")
    add_output(parser, "BUNDLE", "default: named after the checkpoint")
    add_overwrite(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, default=default.dtype, help="precision of the weights (default: %(default)s)"
    )
    add_retention_ratio(parser, "%(default)s", default=default.retention_ratio)
    parser.add_argument(
        "--budget",
        choices=get_args(Budget),
        default=default.budget,
        help="how many tokens are kept: as many as the steps of the paper give, or exactly the retention ratio, "
        "so that a GPU need not wait for their number (default: %(default)s)",
    )
    add_frames(parser, note="the family's number")
    add_frame_size(parser, "16:9 within the budget of pixels")
    add_context(parser, "the family's number")
    parser.add_argument(
        "--sink-positions",
        type=non_negative_int,
        nargs="*",
        metavar="P",
        help="row-major grid positions of attention sinks, whose salience is ignored; give none if there are none "
        "(default: the family's for the grid)",
    )
    parser.add_argument(
        "--inner-layer",
        type=positive_int,
        metavar="LAYER",
        help="layer from which on the decoder sees only some of the video's tokens (18 of LLaVA-Video's 28 as Tango's "
        "authors evaluate it; default: it sees all of them in every layer)",
    )
    parser.add_argument(
        "--inner-ratio",
        type=ratio,
        metavar="RATIO",
        help="fraction of the video's tokens that it sees from there on (default with --inner-layer: 0.5)",
    )
    parser.add_argument(
        "--time-step",
        choices=("seconds", "unit"),
        help="what positions in time follow, for decoders with positions on three axes: the clock, or the number of "
        "steps as in the code of Tango's authors (default: seconds)",
    )
    parser.add_argument("--no-validate", action="store_true", help="do not compare the graphs with the original model")


def _run(args: argparse.Namespace) -> int:
    given = {"--checkpoint": args.checkpoint, "--salience-checkpoint": args.salience_checkpoint}
    check_apart({"--output": args.output}, {name: Path(where) for name, where in given.items() if where})
    output = export(
        Request(
            model=args.model,
            checkpoint=args.checkpoint,
            salience=args.salience_checkpoint,
            output=args.output,
            dtype=args.dtype,
            retention_ratio=args.retention_ratio,
            budget=args.budget,
            frames=args.frames,
            context=args.context,
            sink_positions=None if args.sink_positions is None else tuple(args.sink_positions),
            inner=_inner(args),
            frame=args.frame,
            max_pixels=args.max_pixels,
            time_step=args.time_step,
            overwrite=args.overwrite,
        )
    )
    status(f"bundle: {output}")
    if args.no_validate:
        return 0
    if missing := missing_packages():
        status(
            f"the comparison with the original model was left out: it needs {' and '.join(missing)}; to make it: "
            f"pip install 'tango-edge[validate]', tango validate {output}"
        )
        return 0
    try:
        return print_comparisons(validate(output))
    except KeyboardInterrupt as error:
        raise TangoError(
            "interrupted while validating", f"the bundle {output} is complete; to validate it: tango validate {output}"
        ) from error


def _inner(args: argparse.Namespace) -> InnerPruning | None:
    if args.inner_layer is None:
        if args.inner_ratio is not None:
            raise TangoError("--inner-ratio is given without --inner-layer", "add --inner-layer 18, or leave it out")
        return None
    return InnerPruning(args.inner_layer, 0.5 if args.inner_ratio is None else args.inner_ratio)


EXPORT = Command(_configure, _run)
