"""Makes a quantized bundle from a bundle: measures activations, chooses layers, writes graphs, compares answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from tango_calibration.data.dataset import Video
from tango_calibration.evaluation.evaluate import ALL, BundleEvaluator, Record, Trial, evaluate_in_parallel
from tango_calibration.evaluation.methods import overlap
from tango_calibration.evaluation.scores import Estimate, accuracy, difference
from tango_calibration.parallel import map_with_progress, threads_of
from tango_calibration.quantization import replay
from tango_calibration.quantization.arithmetic import BLOCK
from tango_calibration.quantization.cache import ObservationCache
from tango_calibration.quantization.capture import Capture
from tango_calibration.quantization.clips import load_clip, read_clips
from tango_calibration.quantization.formats import Scheme
from tango_calibration.quantization.observe import Observer
from tango_calibration.quantization.replay import Session, Sessions, open_written
from tango_calibration.quantization.sensitivity import LayerSensitivity, PartQuantizer, QuantizedPart
from tango_calibration.quantization.stored import Part, graphs_of
from tango_plugins import TangoError, reference
from tango_runtime.bundle import (
    MANIFEST,
    Bundle,
    GraphName,
    GraphSpec,
    Precision,
    Runtime,
    describe,
    write_manifest,
)
from tango_runtime.util.console import progress
from tango_runtime.util.files import check_output, require_space, staged_folder

Choice = Literal["fp16", "int8", "fp8", "int4"]

#: Runtimes of the portable graphs of each precision.
_RUNTIMES: dict[Precision, tuple[Runtime, ...]] = {
    "int8": ("onnxruntime", "tensorrt"),
    "fp8": ("tensorrt",),
    "int4": ("onnxruntime",),
}


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate, and how.

    Attributes:
        bundle: The bundle, not quantized.
        output: Folder of the new bundle.
        clips: A folder of videos, or ``synthetic``; None where nothing is measured on clips.
        vision: ``int8``, ``fp8``, or ``fp16`` to keep the graph as it is.
        decoder: ``int8``, ``fp8``, ``int4``, or ``fp16`` to keep the graph as it is.
        group: Weights that share a scale in an int4 decoder: 32 or 128.
        search: Measure the loss of each layer, and exclude those that lose too much. Without, every layer is quantized,
            no loss is measured, and clips only give the ranges of 8-bit activations.
        videos: Maximum number of clips.
        frames: Frames sampled from each clip; by default the bundle's number.
        max_new_tokens: Maximum length of an answer.
        seed: Seed of generated clips.
        runtime: What will run the new bundle; by default ONNX Runtime. For TensorRT, INT8 weights are stored in fp32,
            which its versions from 8.6 on and ONNX Runtime read.
        min_overlap: Share of the kept tokens that must stay the same; more vision layers are excluded until they do.
            None accepts any share.
        cache: Folder of captures, statistics and losses; by default beside the output.
        overwrite: Replace an output that exists.
        jobs: Number of processes that run clips and answer questions.
        ray: Address of a Ray cluster that does so instead, or ``local``.
        backend: What runs the graphs: ``ort-cpu`` or ``ort-cuda``.
    """

    bundle: Path
    output: Path
    clips: str | None
    vision: Choice = "int8"
    decoder: Choice = "fp16"
    group: int = BLOCK
    search: bool = True
    videos: int = 16
    frames: int | None = None
    max_new_tokens: int = 16
    seed: int = 0
    runtime: Runtime | None = None
    min_overlap: float | None = None
    cache: Path | None = None
    overwrite: bool = False
    jobs: int = 1
    ray: str | None = None
    backend: str = replay.CPU

    @property
    def precisions(self) -> dict[Part, Precision]:
        """What is to be quantized."""
        named: dict[Part, Choice] = {"vision": self.vision, "decoder": self.decoder}
        return {name: choice for name, choice in named.items() if choice != "fp16"}

    @property
    def needs_clips(self) -> bool:
        """Whether anything is measured on clips: 4-bit weights can be rounded without."""
        return self.search or any(choice != "int4" for choice in self.precisions.values())

    @property
    def target(self) -> Runtime:
        """What will run the new bundle."""
        return self.runtime or "onnxruntime"


@dataclass(frozen=True)
class Overlap:
    """Share of the tokens kept before quantization that are also kept after it.

    Attributes:
        kept: Share of all kept tokens; merged ones count by their cluster centers.
        salient: Share of the kept tokens that are not merged.
    """

    kept: float
    salient: float


@dataclass(frozen=True)
class Outcome:
    """Result of a calibration.

    Attributes:
        graphs: What was quantized: vision, the decoder or both.
        overlaps: Overlap of each clip; empty if vision was not quantized.
    """

    graphs: dict[Part, QuantizedPart]
    overlaps: tuple[Overlap, ...]


def calibrate(request: CalibrationRequest) -> Outcome:
    """Writes a quantized bundle, or nothing.

    Raises:
        TangoError: The request is invalid, the bundle or a clip cannot be used, or the output cannot be written.
    """
    bundle = check(request)
    frames = request.frames or bundle.manifest.video.frames
    videos = read_clips(request.clips, request.videos, frames, request.seed) if request.clips is not None else []
    cache = ObservationCache(cache_folder(request), bundle, request.max_new_tokens, request.backend)
    observer = Observer(bundle, cache, request.max_new_tokens, request.jobs, request.ray, request.backend)
    captures = observer.captures(videos)
    quantizers = [
        PartQuantizer(bundle, part, precision, request.group, cache, observer, videos, captures)
        for part, precision in request.precisions.items()
    ]
    overlaps_of = partial(_overlaps, bundle, videos, captures)
    choices = [_choose(quantizer, request, overlaps_of) for quantizer in quantizers]
    with staged_folder(request.output, holding=MANIFEST, overwrite=request.overwrite) as folder:
        size = sum(file.size for file in bundle.manifest.files.values())
        require_space(folder, 2 * size if request.target == "tensorrt" else size)  # fp32 may replace fp16
        written = {
            quantizer.part: quantizer.write(folder, scheme, layers, request.target, measured=request.search)
            for quantizer, (scheme, layers) in zip(quantizers, choices, strict=True)
        }
        _complete(folder, bundle, request, written)
        overlaps: tuple[Overlap, ...] = ()
        if "vision" in written:
            overlaps = overlaps_of(open_written(folder, written["vision"][1]["vision"], request.backend))
    return Outcome({name: part for name, (part, _) in written.items()}, overlaps)


def check(request: CalibrationRequest) -> Bundle:
    """Loads the bundle, and checks everything that can be checked before any work.

    Raises:
        TangoError: The request is inconsistent, or does not suit the bundle.
    """
    if not request.precisions:
        raise TangoError("nothing to quantize", "add --vision int8, --decoder int8 or --decoder int4")
    if request.vision == "int4":
        raise TangoError("vision cannot be quantized to int4", "use --vision int8, which has 8-bit activations, too")
    if request.needs_clips and request.clips is None:
        raise TangoError(
            "there are no clips to measure", "name a folder of videos, or generated ones: --clips synthetic"
        )
    if not request.needs_clips and request.clips is not None:
        raise TangoError("--no-search measures no clips for 4-bit weights", "drop --clips")
    if not request.search and request.min_overlap is not None:
        raise TangoError("--no-search and --min-overlap are mutually exclusive", "drop one")
    if request.min_overlap is not None and "vision" not in request.precisions:
        raise TangoError("--min-overlap is about vision, which is not quantized", "add --vision int8")
    bundle = Bundle.load(request.bundle)
    if "fp8" in request.precisions.values() and bundle.manifest.dtype != "float16":
        raise TangoError(
            f"fp8 needs an fp16 bundle, and {request.bundle} is in {bundle.manifest.dtype}",
            "export the checkpoint in fp16 (tango-export --dtype fp16)",
        )
    for name, choice in request.precisions.items():
        for graph in graphs_of(bundle.manifest, name):
            if quantization := bundle.manifest.graphs[graph].quantization:
                raise TangoError(
                    f"{name} of {request.bundle} is already quantized to {quantization.precision}",
                    "calibrate the bundle that tango-export made",
                )
        if choice == "fp8" and request.target == "onnxruntime":
            if any(bundle.manifest.graphs[graph].device is None for graph in graphs_of(bundle.manifest, name)):
                raise TangoError(
                    f"onnxruntime runs fp8 in device graphs only, and {name} of {request.bundle} has none",
                    "add --target tensorrt, or quantize to int8",
                )
        elif request.target not in _RUNTIMES[choice]:
            raise TangoError(
                f"{request.target} cannot run {name} in {choice}", f"use {' or '.join(_RUNTIMES[choice])}, or int8"
            )
    check_output(request.output, holding=MANIFEST, overwrite=request.overwrite)
    return bundle


def cache_folder(request: CalibrationRequest) -> Path:
    """Folder of captures, statistics and losses."""
    output = request.output.resolve()
    return request.cache or output.with_name(f"{output.name}.observed")


def _choose(
    quantizer: PartQuantizer, request: CalibrationRequest, overlaps_of: Callable[[Session], Sequence[Overlap]]
) -> tuple[Scheme, tuple[LayerSensitivity, ...]]:
    """Chooses the scaling of inputs and the format of each layer."""
    if not request.search:
        return quantizer.take_all()
    (scheme, layers), min_overlap = quantizer.choose(), request.min_overlap
    if quantizer.part != "vision" or min_overlap is None:
        return scheme, layers

    def accepts(sessions: Sessions) -> bool:
        return float(np.mean([found.kept for found in overlaps_of(sessions["vision"])])) >= min_overlap

    return scheme, quantizer.exclude_until(scheme, layers, accepts)


def _overlaps(
    bundle: Bundle, videos: Sequence[Video], captures: Sequence[Capture], vision: Session
) -> tuple[Overlap, ...]:
    """Compares the kept tokens of each clip with those of another vision graph."""

    def compare(video: Video, before: Capture) -> Overlap:
        clip = load_clip(bundle, video)
        features, salience = (np.concatenate(t) for t in zip(*replay.run_vision(vision, clip.steps), strict=True))
        after = reference.prune(features, salience, clip.seconds, clip.params(bundle))
        salient = overlap(before.indices[~before.merged], after.indices[~after.merged])
        return Overlap(overlap(before.indices, after.indices), salient)

    return tuple(map_with_progress("overlap", compare, videos, captures))


# The new bundle


def _complete(
    folder: Path,
    bundle: Bundle,
    request: CalibrationRequest,
    written: Mapping[Part, tuple[QuantizedPart, Mapping[GraphName, GraphSpec]]],
) -> None:
    """Copies the files of the other graphs, and writes bundle.json."""
    manifest = bundle.manifest
    specs = {
        name: _for_runtimes(request.target, part.precision, spec)
        for part, graphs in written.values()
        for name, spec in graphs.items()
    }
    replaced = {file for name in specs for file in manifest.graph_files(name)}
    files = {file: spec for file, spec in manifest.files.items() if file not in replaced}
    for file in files:
        shutil.copyfile(bundle.file(file), folder / file)
    new = {path.name: describe(path) for path in folder.iterdir() if path.name not in files}
    files = dict(sorted((files | new).items()))
    write_manifest(folder, replace(manifest, graphs={**manifest.graphs, **specs}, files=files))


def _for_runtimes(target: Runtime, precision: Precision, spec: GraphSpec) -> GraphSpec:
    """The manifest entry of a quantized graph, with the runtimes that run it."""
    # fp8 is for TensorRT only, int8 with fp32 weights for both runtimes, the others for ONNX Runtime only.
    readers = _RUNTIMES[precision] if target == "tensorrt" or precision == "fp8" else (target,)
    return replace(spec, runtimes=tuple(runtime for runtime in spec.runtimes if runtime in readers))


# Accuracy


@dataclass(frozen=True)
class Drop:
    """Accuracy of two bundles on the same questions.

    Attributes:
        trial: How tokens were kept.
        questions: Number of questions.
        before: Accuracy of the old bundle.
        after: Accuracy of the new bundle.
        points: ``before`` − ``after`` in percentage points, with its 95 % interval from a bootstrap over videos.
    """

    trial: Trial
    questions: int
    before: float
    after: float
    points: Estimate


def drops(request: CalibrationRequest, videos: Sequence[Video]) -> list[Drop]:
    """Asks both bundles the same questions, with all tokens and at the bundle's retention ratio.

    Args:
        request: The finished calibration.
        videos: Videos with questions.
    """
    params, jobs, ray = Bundle.load(request.bundle).manifest.params, request.jobs, request.ray
    trials = [ALL, Trial("tango", params.retention_ratio)]

    def ask(bundle: Path, title: str) -> list[Record]:
        evaluator = partial(BundleEvaluator, bundle.absolute(), request.backend, threads=threads_of(jobs, ray))
        with progress(title, len(videos)) as on_progress:
            return evaluate_in_parallel(evaluator, videos, trials, params, on_progress, jobs=jobs, ray=ray)

    before, after = ask(request.bundle, "ask before"), ask(request.output, "ask after")
    return [
        _drop(trial, *([r for r in records if r.trial == trial] for records in (before, after))) for trial in trials
    ]


def _drop(trial: Trial, before: Sequence[Record], after: Sequence[Record]) -> Drop:
    points = difference(before, after).scaled(100)
    return Drop(trial, len(before), accuracy(before), accuracy(after), points)
