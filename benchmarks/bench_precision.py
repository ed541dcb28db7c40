"""What quantised bundles cost and save on an engine, beside the bundle that they were made of.

    python benchmarks/bench_precision.py fp16 int8 int8-int4 --backend ort-cuda --json results.json

All bundles in one run: milliseconds of the stages, measured as `tango bench` measures them; bytes of the graphs, and of
the engines where TensorRT runs them; which tokens they keep of generated clips and what they answer, held against the
first bundle. A bundle that the engine cannot run gets a row that says why. Two tables are printed at the end.

It needs what a device installs, and neither torch nor onnx.
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
from tango_calibration.evaluation.methods import shared
from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.backends.registry import BACKENDS
from tango_runtime.bench.conditions import gpu_state, machine
from tango_runtime.bench.measure import BUDGET, CLIP, MARKED, Bench, Case, Setting, spread
from tango_runtime.bundle import Bundle, GraphName
from tango_runtime.engines import Machine, find
from tango_runtime.system.gpu import here
from tango_runtime.util.console import progress, status
from tango_runtime.video import sample

STAGES = ("vision", "prune", "prefill", "decode")
#: What an engine runs; prune has no weights, and is the CUDA library or the reference.
GRAPHS: tuple[GraphName, ...] = ("vision", "embed", "decoder")

#: Most questions about a clip, and most tokens of an answer.
QUESTIONS = 4
ANSWER = 16


@dataclass(frozen=True)
class Said:
    """What came of the clips.

    Attributes:
        kept: Of each clip, flat indices of the kept tokens, [K] int32.
        salient: Likewise, of those that were kept as they are.
        answers: Token ids of each question's answer, greedy; none where it stops at once.
    """

    kept: list[NDArray[np.int32]]
    salient: list[NDArray[np.int32]]
    answers: list[list[int]]


def bench(
    bundles: Sequence[Bundle], engine: str, setting: Setting, videos: Sequence[Video]
) -> Iterator[dict[str, Any]]:
    """One record per bundle; the first is what the others are held against.

    Raises:
        TangoError: The first cannot be run, or another is not of its kind.
    """
    for bundle in bundles:
        _check_alike(bundles[0], bundle)
    first: Said | None = None
    for bundle in bundles:
        record = describe(bundle)
        try:
            record |= measure(bundle, engine, setting)
            said = ask(bundle, engine, videos)
        except TangoError as error:
            if first is None:
                raise
            record["not_run"] = {"error": error.message, "hint": error.hint}
        else:
            if first:
                record["against_first"] = compare(first, said)
            first = first or said
        yield record


def _check_alike(first: Bundle, other: Bundle) -> None:
    """Refuses bundles whose tokens or ids do not mean the same."""
    for name in ("video", "prompt", "prune"):
        if getattr(first.manifest, name) != getattr(other.manifest, name):
            raise TangoError(
                f"{other.path} and {first.path} differ in {name}",
                "name the bundle that tango-export made first, then those that tango calibrate made of it",
            )


def describe(bundle: Bundle) -> dict[str, Any]:
    """Name, precision of each graph, and bytes of its files as bundle.json lists them, weights and all."""
    manifest = bundle.manifest
    specs = {name: manifest.graphs[name] for name in GRAPHS}
    return {
        "bundle": bundle.path.resolve().name,
        "precision": {n: s.quantization.precision if s.quantization else manifest.dtype for n, s in specs.items()},
        "graph_bytes": {
            name: sum(file.size for path, file in manifest.files.items() if path.startswith(spec.files))
            for name, spec in specs.items()
        },
    }


def measure(bundle: Bundle, engine: str, setting: Setting) -> dict[str, Any]:
    """Milliseconds of the pruned chain, and bytes of the engines that ran it."""
    found = Bench(bundle, engine, setting)
    edge = bundle.manifest.video.size[0]
    with progress(f"time {bundle.path.name}", setting.warm_up + setting.repeats) as on_progress:
        measured = found.measure(Case(True, edge, edge), on_progress)
    return {
        "engine": found.description,
        "load_ms": round(found.load_ms, 1),
        "clock": f"{', '.join(MARKED)} by CUDA events, the rest by the host's" if found.on_device else "the host's",
        **{name: getattr(measured, name) for name in ("kept", "total", "prompt_tokens", "device_memory")},
        "milliseconds": {stage: spread(samples) for stage, samples in measured.milliseconds.items()},
        "engine_bytes": engine_bytes(bundle, _machine()) if engine == "tensorrt" else {},
    }


def engine_bytes(bundle: Bundle, machine: Machine) -> dict[str, int]:
    """Bytes of the TensorRT engines that this machine loads for a bundle, by graph."""
    return {graph: find(bundle, graph, machine).sidecar.size for graph in GRAPHS}


def _machine() -> Machine:
    import tensorrt  # late: it is there where it has just run

    return here(tensorrt.__version__)


def ask(bundle: Bundle, engine: str, videos: Sequence[Video]) -> Said:
    """Asks every question about every clip, through the chain as everybody calls it."""
    llm, said = VideoLLM(bundle, engine), Said([], [], [])
    with progress(f"ask {bundle.path.name}", len(videos)) as on_progress:
        for video in videos:
            clip = list(sample(video.source, video.frames))  # rendered once for all of its questions
            answers = [
                llm.generate(clip, question.text, frames=video.frames, max_new_tokens=ANSWER)
                for question in video.questions
            ]
            said.kept.append(answers[0].indices)
            said.salient.append(answers[0].indices[~answers[0].merged])
            said.answers.extend(answer.ids for answer in answers)
            on_progress(1)
    return said


def compare(first: Said, other: Said) -> dict[str, Any]:
    """Shares of the first's tokens that the other keeps, mean over clips and least; how many answers are alike."""
    kept, salient = (
        [shared(before, after) for before, after in zip(*pair, strict=True)]
        for pair in ((first.kept, other.kept), (first.salient, other.salient))
    )
    answers = list(zip(first.answers, other.answers, strict=True))
    return {
        "kept": round(float(np.mean(kept)), 4),
        "kept_least": round(min(kept), 4),
        "salient": round(float(np.mean(salient)), 4),
        "clips": len(kept),
        "first_tokens": sum(before[:1] == after[:1] for before, after in answers),
        "answers": sum(before == after for before, after in answers),
        "questions": len(answers),
    }


# What is told


def tables(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: times and likeness, then sizes."""
    names = [record["bundle"] for record in records]
    times = [_times(record) + _likeness(record) for record in records]
    sizes = [[_size(record, graph) for graph in GRAPHS] for record in records]
    return "\n\n".join(
        (
            "Milliseconds, p50 (p90); tokens and answers against the first bundle's.",
            _table(("bundle", *STAGES, "tokens kept alike (least)", "first token alike", "answer alike"), names, times),
            "MB of the files, by precision.",
            _table(("bundle", *GRAPHS), names, sizes),
        )
    )


def _times(record: dict[str, Any]) -> list[str]:
    if "not_run" in record:
        return [f"not run: {record['not_run']['error']}".replace("|", "\\|"), *["–"] * (len(STAGES) - 1)]
    found = [record["milliseconds"][stage] for stage in STAGES]
    return [f"{stage['p50']:.3f} ({stage['p90']:.3f})" for stage in found]


def _likeness(record: dict[str, Any]) -> list[str]:
    found = record.get("against_first")
    if found is None:
        return ["–"] * 3
    return [
        f"{100 * found['kept']:.1f} % ({100 * found['kept_least']:.1f} %)",
        *(f"{found[name]} of {found['questions']}" for name in ("first_tokens", "answers")),
    ]


def _size(record: dict[str, Any], graph: GraphName) -> str:
    built = record.get("engine_bytes", {}).get(graph)
    told = f"{record['precision'][graph]} {record['graph_bytes'][graph] / 1e6:.1f}"
    return told + (f", engine {built / 1e6:.1f}" if built else "")


def _table(head: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([name, *row] for name, row in zip(names, rows, strict=True))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Measures everything; see the module's docstring."""
    default = Setting()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="that in fp16, then those made of it")
    parser.add_argument("--backend", required=True, choices=BACKENDS, help="what runs all of them")
    parser.add_argument("--frames", type=int, default=16, help="of the clips (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=20, help="generated ones, to ask about (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="answers that are timed (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=default.warm_up, help="answers before (default: %(default)s)")
    parser.add_argument("--decode-tokens", type=int, default=default.decode_tokens, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and conditions")
    options = parser.parse_args(arguments)
    try:
        told = _run(options)
    except TangoError as error:
        parser.exit(2, f"error: {error.message}\nhint: {error.hint}\n")
    print(told)
    return 0


def _run(options: argparse.Namespace) -> str:
    setting = Setting(options.frames, None, options.decode_tokens, options.warm_up, options.repeats)
    videos = synthetic(options.clips, questions=QUESTIONS, frames=options.frames)
    if not videos:
        raise TangoError(f"--clips {options.clips} gives no clip that can be asked about", "ask for more")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)  # now, and not when all has been measured
    bundles = [Bundle.load(folder) for folder in options.bundles]
    conditions = {"machine": machine(), "gpu_before": gpu_state()}
    records = []
    for record in bench(bundles, options.backend, setting, videos):
        status(json.dumps(record))
        records.append(record)
    conditions["gpu_after"] = gpu_state()
    asked = {"clips": [video.name for video in videos], "answer_tokens": ANSWER}
    found = {
        "conditions": conditions,
        "setting": vars(setting)
        | {"engine": options.backend, "budget": BUDGET, "batch": 1, "timed": CLIP, "asked": asked},
        "records": records,
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return tables(records)


if __name__ == "__main__":
    raise SystemExit(main())
