"""A bundle becomes a quantised bundle: observe, weigh every layer, write, look what it changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from onnx import ModelProto

from tango_calibration.data.dataset import Video
from tango_calibration.evaluation.evaluate import ALL, ChainReader, Record, Trial, evaluate_in_parallel
from tango_calibration.evaluation.methods import shared
from tango_calibration.evaluation.scores import RESAMPLES, Estimate
from tango_calibration.quantization import observe
from tango_calibration.quantization.observe import Cache, Method, Watched
from tango_calibration.quantization.quantize import FP8_OPSET, Scheme, read_graph
from tango_calibration.quantization.sensitivity import GraphWork, Quantized, Weighed
from tango_plugins import TangoError, reference
from tango_runtime.backends.registry import select
from tango_runtime.bundle import (
    MANIFEST,
    Bundle,
    GraphName,
    GraphSpec,
    Precision,
    Quantization,
    Runtime,
    describe,
    write_manifest,
)
from tango_runtime.pipeline.prompt import Prompt
from tango_runtime.util.console import progress
from tango_runtime.util.files import check_output, require_space, staged_folder

Choice = Literal["fp16", "int8", "fp8", "int4"]

#: Engines that a precision can be written for.
_ENGINES: dict[Precision, tuple[Runtime, ...]] = {
    "int8": ("onnxruntime", "tensorrt"),
    "fp8": ("tensorrt",),
    "int4": ("onnxruntime",),
}

ENGINE = "ort-cpu"


@dataclass(frozen=True)
class Request:
    """What to make.

    Attributes:
        bundle: The bundle, not quantised.
        output: Where the new one will stand.
        clips: A folder of videos, or ``synthetic``.
        vision: ``int8``, ``fp8``, or ``fp16`` to leave the graph as it is.
        decoder: ``int8``, ``fp8``, ``int4``, or ``fp16`` to leave it.
        method: How the ranges of 8-bit activations are found.
        videos: Most clips.
        frames: Frames sampled of each; the bundle's number by default.
        max_new_tokens: Most tokens of an answer.
        seed: Of generated clips.
        engine: What the new bundle is for; None takes ONNX Runtime, and TensorRT for fp8. For TensorRT, INT8 weights
            are written in fp32, which its versions from 8.6 on read, and ONNX Runtime too.
        min_overlap: Share of the tokens kept before that must be kept after; further layers of vision are spared until
            they are. None asks nothing.
        cache: Where observations are kept; by default beside the output.
        overwrite: Replace an output that exists.
    """

    bundle: Path
    output: Path
    clips: str
    vision: Choice = "int8"
    decoder: Choice = "fp16"
    method: Method = "minmax"
    videos: int = 16
    frames: int | None = None
    max_new_tokens: int = 16
    seed: int = 0
    engine: Runtime | None = None
    min_overlap: float | None = None
    cache: Path | None = None
    overwrite: bool = False

    @property
    def precisions(self) -> dict[GraphName, Precision]:
        """The graphs that are to be quantised."""
        named: dict[GraphName, Choice] = {"vision": self.vision, "decoder": self.decoder}
        return {name: choice for name, choice in named.items() if choice != "fp16"}

    @property
    def target(self) -> Runtime:
        """The engine that the new bundle is for."""
        return self.engine or ("tensorrt" if "fp8" in self.precisions.values() else "onnxruntime")


@dataclass(frozen=True)
class Overlap:
    """Share of the tokens kept before that are kept after, too.

    Attributes:
        kept: Of all that were kept; where tokens are merged, of their centres.
        salient: Of those that were kept as they are.
    """

    kept: float
    salient: float


@dataclass(frozen=True)
class Outcome:
    """What a calibration made.

    Attributes:
        graphs: The quantised graphs by name.
        overlaps: Of each clip.
    """

    graphs: dict[GraphName, Quantized]
    overlaps: tuple[Overlap, ...]


def calibrate(request: Request) -> Outcome:
    """Writes a quantised bundle.

    Raises:
        TangoError: The request, the bundle or the clips are at fault, or the disk; nothing is left half-written.
    """
    bundle = check(request)
    videos = observe.read_clips(
        request.clips, request.videos, request.frames or bundle.manifest.video.frames, request.seed
    )
    cache = Cache(cache_folder(request), bundle, request.max_new_tokens)
    watched = _watch(bundle, cache, videos, request.max_new_tokens)
    work = [
        GraphWork(bundle, name, precision, request.method, cache, videos, watched)
        for name, precision in request.precisions.items()
    ]
    schemes = [graph.observe() for graph in work]
    overlaps_of = partial(_overlaps, bundle, videos, watched)
    weighed = [_weigh(graph, scheme, request, overlaps_of) for graph, scheme in zip(work, schemes, strict=True)]
    with staged_folder(request.output, holding=MANIFEST, overwrite=request.overwrite) as folder:
        size = sum(file.size for file in bundle.manifest.files.values())
        require_space(folder, 2 * size if request.target == "tensorrt" else size)  # fp32 where there was fp16
        written = [replace(scheme, float_weights=request.target == "tensorrt") for scheme in schemes]
        decided = zip(work, written, weighed, strict=True)
        graphs = {graph.name: graph.write(folder, scheme, layers) for graph, scheme, layers in decided}
        _complete(folder, bundle, request, graphs, len(videos))
        vision = folder / bundle.manifest.graphs["vision"].file
        overlaps = overlaps_of(read_graph(vision), folder) if "vision" in graphs else ()
    return Outcome(graphs, overlaps)


def check(request: Request) -> Bundle:
    """Refuses what can be refused before any work is done; gives the bundle."""
    if not request.precisions:
        raise TangoError("nothing is to be quantised", "ask for --vision int8, --decoder int8 or --decoder int4")
    if request.vision == "int4":
        raise TangoError("vision cannot be quantised to int4", "ask for --vision int8: its activations count, too")
    if request.min_overlap is not None and "vision" not in request.precisions:
        raise TangoError("--min-overlap is about vision, which is left as it is", "add --vision int8")
    bundle = Bundle.load(request.bundle)
    if "fp8" in request.precisions.values() and bundle.manifest.dtype != "float16":
        raise TangoError(
            f"fp8 is written around fp16, and {request.bundle} is in {bundle.manifest.dtype}",
            "export the checkpoint in fp16 (tango export --dtype fp16)",
        )
    for name, choice in request.precisions.items():
        spec = bundle.manifest.graphs[name]
        if spec.quantization:
            raise TangoError(
                f"{name} of {request.bundle} is quantised already, to {spec.quantization.precision}",
                "calibrate the bundle that tango-export made",
            )
        if request.target not in _ENGINES[choice]:
            raise TangoError(
                f"{request.target} cannot run {name} in {choice}", f"{', '.join(_ENGINES[choice])} can; or take int8"
            )
    check_output(request.output, holding=MANIFEST, overwrite=request.overwrite)
    return bundle


def cache_folder(request: Request) -> Path:
    """Where observations are kept."""
    output = request.output.resolve()
    return request.cache or output.with_name(f"{output.name}.observed")


def _watch(bundle: Bundle, cache: Cache, videos: Sequence[Video], max_new_tokens: int) -> list[Watched]:
    """Every clip, gone through the chain."""
    stages, prompt = select(bundle, ENGINE), Prompt.of(bundle)

    def watched(video: Video) -> Watched:
        return cache.watched(video, lambda: observe.watch(bundle, stages, prompt, video, max_new_tokens))

    with progress("watch", len(videos)) as on_progress:
        return [watched(video) for video in observe.counted(videos, on_progress)]


def _weigh(
    graph: GraphWork,
    scheme: Scheme,
    request: Request,
    overlaps: Callable[[ModelProto, Path], Sequence[Overlap]],
) -> tuple[Weighed, ...]:
    """Decides which layers take which form."""
    weighed, least = graph.weigh(scheme), request.min_overlap
    if graph.name != "vision" or least is None:
        return weighed

    def enough(model: ModelProto, folder: Path) -> bool:
        return float(np.mean([overlap.kept for overlap in overlaps(model, folder)])) >= least

    return graph.spare_until(scheme, weighed, enough)


# The new bundle


def _complete(
    folder: Path, bundle: Bundle, request: Request, graphs: Mapping[GraphName, Quantized], clips: int
) -> None:
    """Copies what did not change, and writes bundle.json."""
    manifest = bundle.manifest
    specs = dict(manifest.graphs)
    for name, done in graphs.items():
        specs[name] = _spec(specs[name], request, done, clips)
    changed = tuple(file for name in graphs for file in manifest.graphs[name].files)
    files = {file: spec for file, spec in manifest.files.items() if not file.startswith(changed)}
    for file in files:
        shutil.copyfile(bundle.file(file), folder / file)
    new = {path.name: describe(path) for path in folder.iterdir() if path.name not in files}
    write_manifest(folder, replace(manifest, graphs=specs, files=dict(sorted((files | new).items()))))


def _spec(spec: GraphSpec, request: Request, done: Quantized, clips: int) -> GraphSpec:
    # What is written for TensorRT alone (fp8), for both (int8 with weights in fp32) or for ONNX Runtime alone.
    readers = _ENGINES[done.precision] if request.target == "tensorrt" else (request.target,)
    runtimes = tuple(runtime for runtime in spec.runtimes if runtime in readers)
    opset = FP8_OPSET if done.precision == "fp8" else spec.opset
    spared = tuple(layer.layer for layer in done.spared)
    quantization = Quantization(done.precision, clips, spared)
    # The device graph goes: no kernel reads its weights as they are now.
    return replace(spec, opset=opset, runtimes=runtimes, quantization=quantization, device=None, weights=None)


def _overlaps(
    bundle: Bundle, videos: Sequence[Video], watched: Sequence[Watched], vision: ModelProto, folder: Path
) -> tuple[Overlap, ...]:
    """Compares what is kept of each clip before and after, with a vision graph whose weights lie in a folder."""
    session, overlaps = observe.open_graph(vision, folder), []
    with progress("overlap", len(videos)) as on_progress:
        for video, before in zip(observe.counted(videos, on_progress), watched, strict=True):
            frames, seconds = observe.see(bundle, video)
            features, salience = (np.concatenate(t) for t in zip(*observe.run_vision(session, frames), strict=True))
            after = reference.prune(features, salience, seconds, bundle.manifest.params)
            salient = shared(before.indices[~before.merged], after.indices[~after.merged])
            overlaps.append(Overlap(shared(before.indices, after.indices), salient))
    return tuple(overlaps)


# What it costs in accuracy


@dataclass(frozen=True)
class Drop:
    """Accuracy of the two bundles on the same questions.

    Attributes:
        trial: Which tokens were kept.
        questions: How many were asked.
        before: Share of right answers of the old bundle.
        after: Of the new one.
        points: The first less the second in percentage points, with its 95 % interval from a bootstrap over videos.
    """

    trial: Trial
    questions: int
    before: float
    after: float
    points: Estimate


def drops(request: Request, videos: Sequence[Video], jobs: int = 1) -> list[Drop]:
    """Asks both bundles the same questions, unpruned and at the bundle's ratio.

    Args:
        request: What was calibrated.
        videos: What to ask about.
        jobs: Processes.
    """
    params = Bundle.load(request.bundle).manifest.params
    trials = [ALL, Trial("tango", params.retention_ratio)]

    def asked(bundle: Path, title: str) -> list[Record]:
        reader = partial(ChainReader, bundle, ENGINE, threads=int(jobs > 1))
        with progress(title, len(videos)) as on_progress:
            return evaluate_in_parallel(reader, videos, trials, params, on_progress, jobs=jobs)

    before, after = asked(request.bundle, "ask before"), asked(request.output, "ask after")
    return [_drop(trial, _of(trial, before), _of(trial, after)) for trial in trials]


def _of(trial: Trial, records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record.trial == trial]


def _drop(trial: Trial, before: Sequence[Record], after: Sequence[Record]) -> Drop:
    videos = {name: i for i, name in enumerate(dict.fromkeys(record.video for record in before))}
    asked, lost = np.zeros((2, len(videos)))
    for once, now in zip(before, after, strict=True):
        asked[videos[once.video]] += 1
        lost[videos[once.video]] += int(once.correct) - int(now.correct)
    n = len(videos)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    low, high = np.quantile(100 * (drawn @ lost) / (drawn @ asked), [0.025, 0.975])
    old, new = (float(np.mean([record.correct for record in records])) for records in (before, after))
    return Drop(trial, len(before), old, new, Estimate(100 * lost.sum() / asked.sum(), float(low), float(high)))
