"""`tango validate`: a bundle against the original model."""

from __future__ import annotations

import argparse

from tango_export.cli.args import add_checkpoints
from tango_export.validate import MAX_NORM_ERROR, MIN_COSINE, Comparison, validate
from tango_runtime.cli.args import add_bundle
from tango_runtime.cli.command import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add_checkpoints(parser, "the one that the bundle names")


def _run(args: argparse.Namespace) -> int:
    return print_comparisons(validate(args.bundle, args.checkpoint, args.salience_checkpoint))


def print_comparisons(results: list[Comparison]) -> int:
    """Prints the comparisons; returns 0 if all are within the limits, else 1."""
    width = 2 + max(len(result.graph) for result in results)
    print(f"{'graph':<{width}}{'output':<14}{'cosine':>10}{'norm ratio':>12}")
    for result in results:
        figures = f"{result.output:<14}{result.cosine:>10.6f}{result.norm_ratio:>12.5f}"
        print(f"{result.graph:<{width}}{figures}  {'ok' if result.passed else 'FAILED'}")
    failed = sum(not result.passed for result in results)
    limits = f"cosine at least {MIN_COSINE}, norm within {MAX_NORM_ERROR:.0%}"
    print(f"{len(results) - failed} of {len(results)} within the limits ({limits})")
    return 1 if failed else 0


VALIDATE = Command(_configure, _run)
