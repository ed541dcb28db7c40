"""`tango calibrate`: a quantized bundle, made by observing clips."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from tango_calibration.cli.args import add_data, add_videos
from tango_calibration.cli.calibration_report import REPORT, summarize, write_report
from tango_calibration.data.dataset import SYNTHETIC, Video, read_folder, synthetic
from tango_calibration.evaluation import results
from tango_calibration.evaluation.evaluate import check_room
from tango_calibration.quantization.calibrate import CalibrationRequest, cache_folder, calibrate, check, drops
from tango_calibration.quantization.replay import CPU, usable
from tango_plugins import TangoError
from tango_runtime.bundle import Bundle
from tango_runtime.cli.args import (
    add_backend,
    add_bundle,
    add_count,
    add_frames,
    add_jobs,
    add_max_new_tokens,
    add_output,
    add_overwrite,
    add_precisions,
    add_ray,
    add_seed,
    percent,
)
from tango_runtime.cli.command import Command
from tango_runtime.util.console import status
from tango_runtime.util.files import check_apart, check_output

_PER_CLIP = 8  # questions per generated clip


def _configure(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    add_output(parser, "BUNDLE2", required=True)
    add_overwrite(parser)
    parser.add_argument(
        "--clips",
        metavar="FOLDER",
        help=f"folder of videos to observe, with or without a questions.jsonl; or {SYNTHETIC}; needed except for an "
        "int4 decoder alone with --no-search",
    )
    add_precisions(parser, vision="int8", decoder="fp16")
    parser.add_argument(
        "--group",
        type=int,
        choices=[32, 128],
        default=32,
        help="weights that share a scale in an int4 decoder; 128 is a little smaller, and less exact (default: 32)",
    )
    parser.add_argument(
        "--no-search",
        dest="search",
        action="store_false",
        help="quantize every layer and measure no losses: quicker, and less exact (default: leave out the layers that "
        "lose too much)",
    )
    add_videos(parser, 16)
    add_frames(parser)
    add_max_new_tokens(parser, 16)
    add_seed(parser, 0)
    parser.add_argument(
        "--target",
        choices=["onnxruntime", "tensorrt"],
        help="what the new bundle is for: for tensorrt, INT8 weights are stored in fp32, as version 8 requires, and "
        "become 8 bits in the engine; fp8 is for ONNX Runtime on a GPU and for TensorRT 10 and later, where it has "
        "not been tested (default: onnxruntime)",
    )
    parser.add_argument(
        "--min-overlap",
        type=percent,
        metavar="PERCENT",
        help="exclude layers of the vision tower until this share of the kept tokens is the same as before "
        "(default: no requirement)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="folder of cached observations (default: BUNDLE2.observed)"
    )
    parser.add_argument(
        "--report-dir", type=Path, metavar="FOLDER", help=f"write {REPORT}, calibration.md and layers.png to a folder"
    )
    add_count(parser, "--evaluate", "ask both bundles N questions, and compare their accuracy", note="none")
    add_data(parser)
    add_backend(parser)
    add_jobs(parser, 1)
    add_ray(parser)
    parser.add_argument(
        "--max-drop", type=float, metavar="POINTS", help="exit with 1 if accuracy drops by more percentage points"
    )


def _calibrate(args: argparse.Namespace) -> int:
    request = _request(args)
    outputs = {"--output": args.output, "--cache": cache_folder(request), "--report-dir": args.report_dir}
    check_apart(
        outputs, {"the bundle": args.bundle, "--clips": args.clips and Path(args.clips), "--data": Path(args.data)}
    )
    bundle = check(request)
    if args.report_dir:
        check_output(args.report_dir, overwrite=args.overwrite, holding=REPORT)
        results.require_matplotlib()
    asked = _questions(args, bundle) if args.evaluate else []
    if asked:
        check_room(bundle, asked)
    if request.needs_clips:
        status(f"observations: {cache_folder(request)}")
    outcome = calibrate(request)
    found = drops(request, asked) if asked else []
    status(f"bundle: {args.output}")
    if args.report_dir:  # before printing, which fails if the reader of standard output has closed it
        write_report(args.report_dir, _conditions(request, bundle), outcome, found, overwrite=args.overwrite)
        status(f"report: {args.report_dir}")
    print(*summarize(outcome, found), sep="\n")
    missed = args.max_drop is not None and any(drop.points.value > args.max_drop for drop in found)
    if missed:
        status(f"accuracy dropped by more than {args.max_drop:g} points (--max-drop)")
    return int(missed)


def _request(args: argparse.Namespace) -> CalibrationRequest:
    if args.max_drop is not None and not args.evaluate:
        raise TangoError("--max-drop needs an evaluation", "add --evaluate N")
    if args.report_dir and not args.search:
        raise TangoError("--report-dir is about losses, which --no-search does not measure", "drop one")
    backend = usable(args.backend)
    if args.evaluate and "fp8" in (args.vision, args.decoder) and backend == CPU:
        raise TangoError(
            "--evaluate runs on ONNX Runtime, which runs fp8 on a GPU only",
            "calibrate on a GPU, or drop it and compare both bundles there: tango evaluate",
        )
    names = (
        "bundle",
        "output",
        "clips",
        "vision",
        "decoder",
        "group",
        "search",
        "videos",
        "frames",
        "max_new_tokens",
        "seed",
    )
    asked = {name: getattr(args, name) for name in (*names, "cache", "overwrite", "jobs", "ray")}
    asked["backend"] = backend
    return CalibrationRequest(**asked, runtime=args.target, min_overlap=args.min_overlap and args.min_overlap / 100)


def _questions(args: argparse.Namespace, bundle: Bundle) -> list[Video]:
    """Videos with ``--evaluate`` questions in total."""
    frames, remaining = args.frames or bundle.manifest.video.frames, args.evaluate
    if args.data == SYNTHETIC:
        videos = synthetic(-(-remaining // _PER_CLIP) + 8, seed=args.seed, questions=_PER_CLIP, frames=frames)
    else:
        videos = read_folder(Path(args.data), frames)
    chosen = []
    for video in videos:
        if remaining > 0:
            chosen.append(replace(video, questions=video.questions[:remaining], ids=video.ids[:remaining]))
            remaining -= len(video.questions)
    return chosen


def _conditions(request: CalibrationRequest, bundle: Bundle) -> dict[str, Any]:
    return {
        "bundle": bundle.path.resolve().name,
        "clips": request.clips if request.clips == SYNTHETIC else Path(str(request.clips)).resolve().name,
        "videos": request.videos,
        "frames": request.frames or bundle.manifest.video.frames,
        "seed": request.seed,
        "target": request.target,
        "backend": request.backend,
        "min_overlap": request.min_overlap,
        "retention_ratio": bundle.manifest.params.retention_ratio,
    }


CALIBRATE = Command(_configure, _calibrate)
