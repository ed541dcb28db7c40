"""What quantized bundles cost and save on a backend, compared with the bundle that they were made from.

    python -m benchmarks.bench_precision fp16 int8 int8-int4 --backend ort-cuda --json results.json

For every bundle, one run measures the times of the stages as `tango bench` does, the bytes of the graphs and of
TensorRT's engines, and the kept tokens and answers on generated clips, compared with the first bundle's. A bundle that
the backend cannot run gets a row with the reason. Two tables are printed at the end.

It needs neither torch nor onnx, so it runs on a device. Products alone, beside PyTorch's in each precision, are in
bench_weights.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tango_calibration.data.dataset import Video, synthetic
from tango_calibration.evaluation.methods import overlap
from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.backends.registry import BACKENDS
from tango_runtime.bench.conditions import gpu_state, machine
from tango_runtime.bench.measure import BUDGET, CLIP, EVENT_TIMED, Bench, Case, Setting, spread
from tango_runtime.bundle import Bundle, GraphName
from tango_runtime.engines import Target, find
from tango_runtime.engines.target import current_target
from tango_runtime.system.packages import import_tensorrt
from tango_runtime.util.console import progress, status
from tango_runtime.video import sample

STAGES = ("vision", "prune", "prefill", "decode")
#: Graphs with weights; prune has none and runs as the CUDA library or the reference.
GRAPHS: tuple[GraphName, ...] = ("vision", "embed", "decoder")

MAX_QUESTIONS = 4  # about a clip
MAX_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Outputs:
    """Kept tokens and answers of all clips.

    Attributes:
        kept: Flat indices of each clip's kept tokens, [K] int32.
        salient: Flat indices of those that are not merged tokens.
        answers: Token ids of each question's greedy answer; empty if it stops at once.
    """

    kept: list[NDArray[np.int32]]
    salient: list[NDArray[np.int32]]
    answers: list[list[int]]


def bench(
    bundles: Sequence[Bundle], backend: str, setting: Setting, videos: Sequence[Video]
) -> Iterator[dict[str, Any]]:
    """One record per bundle; the others are compared with the first.

    Raises:
        TangoError: The first cannot run, or another belongs to a different model.
    """
    for bundle in bundles:
        _check_alike(bundles[0], bundle)
    first: Outputs | None = None
    for bundle in bundles:
        record = describe(bundle)
        try:
            record |= measure(bundle, backend, setting)
            outputs = ask(bundle, backend, videos)
        except TangoError as error:
            if first is None:
                raise
            record["not_run"] = {"error": error.message, "hint": error.hint}
        else:
            if first:
                record["against_first"] = compare(first, outputs)
            first = first or outputs
        yield record


def _check_alike(first: Bundle, other: Bundle) -> None:
    """Rejects bundles whose tokens or ids mean different things."""
    for name in ("video", "prompt", "prune"):
        if getattr(first.manifest, name) != getattr(other.manifest, name):
            raise TangoError(
                f"{other.path} and {first.path} differ in {name}",
                "name the bundle of tango-export first, then those that tango calibrate made from it",
            )


def describe(bundle: Bundle) -> dict[str, Any]:
    """Name, precision of each graph, and bytes of all its files."""
    manifest = bundle.manifest
    return {
        "bundle": bundle.path.resolve().name,
        "precision": {name: manifest.precision(name) for name in GRAPHS},
        "graph_bytes": {name: bundle.graph_bytes(name) for name in GRAPHS},
    }


def measure(bundle: Bundle, backend: str, setting: Setting) -> dict[str, Any]:
    """Milliseconds of the pruned pipeline, and bytes of the TensorRT engines that ran it."""
    found = Bench(bundle, backend, setting)
    clock = f"{', '.join(EVENT_TIMED)} by CUDA events, the rest by the host's"
    edge = bundle.manifest.video.size[0]
    with progress(f"time {bundle.path.name}", setting.warm_up + setting.repeats) as on_progress:
        measured = found.measure(Case(True, edge, edge), on_progress)
    return {
        "backend": found.description,
        "load_ms": round(found.load_ms, 1),
        "clock": clock if found.on_device else "the host's",
        **{name: getattr(measured, name) for name in ("kept", "total", "prompt_tokens", "device_memory")},
        "milliseconds": {stage: spread(samples) for stage, samples in measured.milliseconds.items()},
        "engine_bytes": engine_bytes(bundle, _target()) if backend == "tensorrt" else {},
    }


def engine_bytes(bundle: Bundle, target: Target) -> dict[str, int]:
    """Bytes of the TensorRT engines that this machine loads for a bundle, by graph."""
    return {graph: find(bundle, graph, target).sidecar.size for graph in GRAPHS}


def _target() -> Target:
    return current_target(import_tensorrt().__version__)


def ask(bundle: Bundle, backend: str, videos: Sequence[Video]) -> Outputs:
    """Asks every question about every clip, through :meth:`VideoLLM.generate`."""
    llm, outputs = VideoLLM(bundle, backend), Outputs([], [], [])
    with progress(f"ask {bundle.path.name}", len(videos)) as on_progress:
        for video in videos:
            clip = list(sample(video.source, video.frames))  # rendered once for all of its questions
            answers = [
                llm.generate(clip, question.text, frames=video.frames, max_new_tokens=MAX_ANSWER_TOKENS)
                for question in video.questions
            ]
            outputs.kept.append(answers[0].indices)
            outputs.salient.append(answers[0].indices[~answers[0].merged])
            outputs.answers.extend(answer.ids for answer in answers)
            on_progress(1)
    return outputs


def compare(first: Outputs, other: Outputs) -> dict[str, Any]:
    """Share of the first's tokens that the other keeps, mean and minimum over clips; number of equal answers."""
    kept, salient = (
        [overlap(before, after) for before, after in zip(*pair, strict=True)]
        for pair in ((first.kept, other.kept), (first.salient, other.salient))
    )
    answers = list(zip(first.answers, other.answers, strict=True))
    return {
        "kept": round(float(np.mean(kept)), 4),
        "kept_min": round(min(kept), 4),
        "salient": round(float(np.mean(salient)), 4),
        "clips": len(kept),
        "first_tokens": sum(before[:1] == after[:1] for before, after in answers),
        "answers": sum(before == after for before, after in answers),
        "questions": len(answers),
    }


# Tables


def tables(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: times and agreement, then sizes."""
    names = [record["bundle"] for record in records]
    times = [_times(record) + _agreement(record) for record in records]
    sizes = [[_size(record, graph) for graph in GRAPHS] for record in records]
    return "\n\n".join(
        (
            "Milliseconds, p50 (p90); tokens and answers compared with the first bundle's.",
            _table(("bundle", *STAGES, "same tokens kept (min)", "same first token", "same answer"), names, times),
            "MB of the files, by precision.",
            _table(("bundle", *GRAPHS), names, sizes),
        )
    )


def _times(record: dict[str, Any]) -> list[str]:
    if "not_run" in record:
        return [f"not run: {record['not_run']['error']}".replace("|", "\\|"), *["–"] * (len(STAGES) - 1)]
    found = [record["milliseconds"][stage] for stage in STAGES]
    return [f"{stage['p50']:.3f} ({stage['p90']:.3f})" for stage in found]


def _agreement(record: dict[str, Any]) -> list[str]:
    found = record.get("against_first")
    if found is None:
        return ["–"] * 3
    return [
        f"{100 * found['kept']:.1f} % ({100 * found['kept_min']:.1f} %)",
        *(f"{found[name]} of {found['questions']}" for name in ("first_tokens", "answers")),
    ]


def _size(record: dict[str, Any], graph: GraphName) -> str:
    built = record.get("engine_bytes", {}).get(graph)
    files = f"{record['precision'][graph]} {record['graph_bytes'][graph] / 1e6:.1f}"
    return files + (f", engine {built / 1e6:.1f}" if built else "")


def _table(head: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([name, *row] for name, row in zip(names, rows, strict=True))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Measures all bundles; see the module's docstring."""
    default = Setting()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "bundles", type=Path, nargs="+", metavar="BUNDLE", help="the fp16 bundle, then those made from it"
    )
    parser.add_argument("--backend", required=True, choices=BACKENDS, help="what runs the graphs")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=20, help="generated clips to ask about (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="answers to measure (default: %(default)s)")
    parser.add_argument(
        "--warm-up", type=int, default=default.warm_up, help="answers before measuring (default: %(default)s)"
    )
    parser.add_argument(
        "--decode-tokens",
        type=int,
        default=default.decode_tokens,
        help="tokens to generate after the first (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and conditions")
    options = parser.parse_args(arguments)
    try:
        report = _run(options)
    except TangoError as error:
        parser.exit(2, f"error: {error.message}\nhint: {error.hint}\n")
    print(report)
    return 0


def _run(options: argparse.Namespace) -> str:
    setting = Setting(options.frames, None, options.decode_tokens, options.warm_up, options.repeats)
    videos = synthetic(options.clips, questions=MAX_QUESTIONS, frames=options.frames)
    if not videos:
        raise TangoError(f"--clips {options.clips} gives no clip with a question", "ask for more")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)  # fail before measuring
    bundles = [Bundle.load(folder) for folder in options.bundles]
    conditions = {"machine": machine(), "gpu_before": gpu_state()}
    records = []
    for record in bench(bundles, options.backend, setting, videos):
        status(json.dumps(record))
        records.append(record)
    conditions["gpu_after"] = gpu_state()
    asked = {"clips": [video.name for video in videos], "answer_tokens": MAX_ANSWER_TOKENS}
    found = {
        "conditions": conditions,
        "setting": vars(setting)
        | {"backend": options.backend, "budget": BUDGET, "batch": 1, "timed": CLIP, "asked": asked},
        "records": records,
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return tables(records)


if __name__ == "__main__":
    raise SystemExit(main())
