"""`tango export` and `tango validate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from tango_export.export import DTYPES, Request, export, known_models
from tango_export.validate import MAX_NORM_ERROR, MIN_COSINE, Comparison, missing_packages, validate
from tango_plugins import TangoError
from tango_plugins.params import Budget
from tango_runtime.cli.main import Command
from tango_runtime.util.console import status


def _configure_export(parser: argparse.ArgumentParser) -> None:
    default = Request()
    parser.add_argument(
        "--model",
        default=default.model,
        help=f"a family or a published checkpoint: {', '.join(known_models())} (default: %(default)s)",
    )
    parser.add_argument("--checkpoint", help="folder or hub id, in place of the published checkpoint")
    parser.add_argument(
        "--salience-checkpoint",
        metavar="CHECKPOINT",
        help="folder or hub id of the checkpoint whose pooling head gives the salience: the SigLIP of the vision tower",
    )
    parser.add_argument("--output", type=Path, help="the bundle's folder (default: named after the checkpoint)")
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="default: %(default)s")
    parser.add_argument(
        "--retention-ratio",
        type=float,
        default=default.retention_ratio,
        help="fraction of video tokens kept (default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        choices=get_args(Budget),
        default=default.budget,
        help="keep as many as the paper's steps give, or always exactly that fraction, "
        "so that on a GPU nothing waits for their count (default: %(default)s)",
    )
    parser.add_argument("--frames", type=int, help="frames sampled from a video (default: the family's number)")
    parser.add_argument(
        "--context", type=int, default=default.context, help="most positions, prompt and answer (default: %(default)s)"
    )
    parser.add_argument(
        "--sink-positions",
        type=int,
        nargs="*",
        metavar="P",
        help="grid positions, row-major, whose salience means nothing; no number for none of them "
        "(default: the family's for the grid)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--no-validate", action="store_true", help="do not compare the graphs with the original model")


def _export(args: argparse.Namespace) -> int:
    output = export(
        Request(
            args.model,
            args.checkpoint,
            args.salience_checkpoint,
            args.output,
            args.dtype,
            args.retention_ratio,
            args.budget,
            args.frames,
            args.context,
            None if args.sink_positions is None else tuple(args.sink_positions),
            args.overwrite,
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
        return _verdict(validate(output))
    except KeyboardInterrupt as error:
        raise TangoError("interrupted while validating", f"{output} is whole: tango validate {output}") from error


def _configure_validate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder that tango-export made")
    parser.add_argument("--checkpoint", help="the original, if it is not where the bundle says")
    parser.add_argument(
        "--salience-checkpoint",
        metavar="CHECKPOINT",
        help="the source of its salience, if it is not where the bundle says",
    )


def _validate(args: argparse.Namespace) -> int:
    return _verdict(validate(args.bundle, args.checkpoint, args.salience_checkpoint))


def _verdict(results: list[Comparison]) -> int:
    """Prints the comparisons; 0 if every one is within the gates, else 1."""
    width = 2 + max(len(r.graph) for r in results)
    print(f"{'graph':<{width}}{'output':<14}{'cosine':>10}{'norm ratio':>12}")
    for r in results:
        measured = f"{r.output:<14}{r.cosine:>10.6f}{r.norm_ratio:>12.5f}"
        print(f"{r.graph:<{width}}{measured}  {'ok' if r.passed else 'FAILED'}")
    failed = sum(not r.passed for r in results)
    gates = f"cosine at least {MIN_COSINE}, norm within {MAX_NORM_ERROR:.0%}"
    print(f"{len(results) - failed} of {len(results)} within the gates ({gates})")
    return 1 if failed else 0


EXPORT = Command(_configure_export, _export)
VALIDATE = Command(_configure_validate, _validate)
