"""How fast it is: tables of docs/results/performance.md."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from tools.docs.markdown import table
from tools.docs.measured import Column, link, load, number, stages

_STAGES = {
    "open the file": "open",
    "sample and resize frames": "video",
    "copy frames to the GPU": "upload",
    "vision": "vision",
    "prune": "prune",
    "prefill": "prefill",
    "**first token**": "first token",
    "**each further token**": "decode",
    "first token of a second question": "second question",
}
_CONDITIONS = ("backend", "repeats", "load average of the host", "file")
_TOKENS = ("tokens kept", "positions of the prompt")
_MEMORY = ("memory on the GPU, MB", "peak memory on the host, MB")
_RUNNERS = {
    "tango-edge": "tango",
    "transformers": "transformers",
    "as a CUDA graph": "CUDA graph",
    "compiled": "compiled",
    "compiled, windows in one call": "compiled, varlen",
}


def pipeline() -> str:
    """The pipeline with device graphs in the CUDA library's operators."""
    columns = (
        Column("0.5B, a tenth", "h200-onnxruntime-0.5b-ahead"),
        Column("0.5B, a tenth, TensorRT", "h200-tensorrt-0.5b-device"),
        Column("7B, a tenth", "h200-onnxruntime-7b-linear"),
        Column("7B, all tokens", "h200-onnxruntime-7b-linear", "unpruned, 384x384"),
        Column("7B, a tenth, TensorRT", "h200-tensorrt-7b-device"),
    )
    return stages(columns, _STAGES, (*_TOKENS, *_MEMORY, *_CONDITIONS))


def transformers() -> str:
    """The pipeline and transformers with as many tokens, in one run."""
    return _peers({size: (f"h200-onnxruntime-{size.lower()}-transformers",) for size in ("0.5B", "7B")})


def video() -> str:
    """From a file to the first token."""
    columns = tuple(Column(way, f"h200-video-0.5b-{way}", "pruned, 1920x1080") for way in ("exact", "keyframes"))
    return stages(columns, _STAGES, (*_MEMORY, *_CONDITIONS))


def families() -> str:
    """Other families with the 7B's shapes."""
    qwen, video = ("h200-onnxruntime-qwen2.5-vl-7b-560x1008", "pruned, 1008x560"), "h200-onnxruntime-llava-video-7b"
    columns = (
        Column("Qwen2.5-VL-7B, 32 frames of 560×1008", *qwen),
        Column("32 frames of 336×588", "h200-onnxruntime-qwen2.5-vl-7b-336x588", "pruned, 588x336"),
        Column("LLaVA-Video-7B, 64 frames", video),
        Column("with inner pruning", f"{video}-inner"),
    )
    return stages(columns, _STAGES, (*_TOKENS, *_MEMORY, *_CONDITIONS))


def family_peers() -> str:
    """Earlier versions of them and transformers with as many tokens, in one run."""
    files = {
        "Qwen2.5-VL-7B, later run": ("h200-onnxruntime-qwen2.5-vl-7b-560x1008-plain", "pruned, 1008x560"),
        "Qwen2.5-VL-7B": ("h200-onnxruntime-qwen2.5-vl-7b-560x1008-compiled", "pruned, 1008x560"),
        "LLaVA-Video-7B": ("h200-onnxruntime-llava-video-7b-transformers",),
    }
    return _peers(files)


def live() -> str:
    """Questions about a live window, and many streams in one process."""
    sizes = {"0.5B": load("h200-live-0.5b"), "7B": load("h200-live-7b")}
    shown = ("p50", "p90", "p99")
    asked = [
        (f"{size}, a question about the window, ms", "", *(number(found["one"]["question_ms"][p]) for p in shown))
        for size, found in sizes.items()
    ]
    lags = [
        (
            f"{size}, {many['streams']} streams, lag, s",
            str(many["answers"]),
            *(f"{many['lag_s'][p]:.3f}" for p in shown),
        )
        for size, found in sizes.items()
        for many in found["many"]
    ]
    return table(("", "answers", *shown), [*asked, *lags])


def cold_starts() -> str:
    """New processes, from their start to the first token."""
    files = {
        "0.5B, ONNX Runtime": "h200-onnxruntime-0.5b-linear",
        "0.5B, TensorRT": "h200-tensorrt-0.5b-device",
        "7B, TensorRT": "h200-tensorrt-7b-device",
    }
    parts = {"import": "import", "load the bundle": "load", "first token": "first token", "**together**": "total"}
    rows = [(title, *(_median_start(name, part) for name in files.values())) for title, part in parts.items()]
    return table(("median of three, ms", *files), [*rows, ("file", *(link(name) for name in files.values()))])


def operator() -> str:
    """The operator against the same steps in PyTorch, at r = 0.1."""
    rows = [_pruned(record) for record in load("prune-h200")["records"] if record["ratio"] == 0.1]
    times = ("`fast`, ms", "`exact`, ms", "PyTorch, ms")
    return table(("F×L×D", "content", "kept", *times, "workspace of `fast` and `exact`, MB"), rows)


def kernels() -> str:
    """Kernels of a vision tower and products of fp16, against PyTorch's."""
    found = load("kernels-h200")["records"]
    return table(("kernel", "shape", "µs", "peers, µs"), [row for record in found for row in _kernel(record)])


def frames() -> str:
    """Frames of 1920×1080 to 384×384 on the GPU."""
    found = load("h200-frames")["ms"]
    titles = {"host": "resized by eight threads of the host", "gpu": "copied to the GPU and resized there"}
    rows = [(title, number(median(found[where]))) for where, title in titles.items()]
    return table(("32 frames of 1920×1080 to 384×384", "median, ms"), rows)


def batch() -> str:
    """A batch of videos by what decodes them, and by how many models answer."""
    files = {
        "a model": "h200-batch-0.5b",
        "a model, the GPU decodes": "h200-batch-gpu-decoders",
        "Ray, a model": "h200-batch-one-model",
        "Ray, two models": "h200-batch-two-models",
        "Ray, three models": "h200-batch-three-models",
        "Ray, a node of two models, 200 videos": "h200-batch-ray-200-videos",
        "Ray, a node of two models": "h200-batch-ray-one-node",
        "Ray, two nodes of two models": "h200-batch-ray-two-nodes",
    }
    rows = []
    for title, name in files.items():
        data = load(name)
        for found in data["batches"]:
            busy = found["gpu_busy_percent"]
            rates = (f"{found['answers_per_second_at_work']:.1f}", f"{found['seconds']:.1f}")
            use = (f"{found['model_busy_percent']} %", f"{busy['mean']:.0f} % ({100 * busy['share_of_90']:.0f} %)")
            rows.append((title, f"{data['videos']:,}", found["decoders"], *rates, *use, link(name)))
    times = ("answers a second", "seconds in all")
    return table(("", "videos", "decoders of a model", *times, "model busy", "GPU busy", "file"), rows)


def sampling() -> str:
    """Frames of a file on a CPU, and other libraries."""
    found = load("cpu-sampling-1080p")["ms"]
    readers = {"tango": "tango-edge", "decord2": "decord2", "torchcodec": "torchcodec"}
    rows = [(title, *(f"{median(times[reader]):,.0f}" for reader in readers)) for title, times in found.items()]
    return table(("32 frames of 60 s of 1920×1080", *readers.values()), rows)


def server() -> str:
    """What HTTP adds to the first token."""
    shown, rows = ("p50", "p90", "p99"), []
    for model, name in {"0.5B": "h200-server-0.5b", "models/tiny": "cpu-server-tiny"}.items():
        found = load(name)
        times = {
            f"{found['questions']} questions in the process": found["first_token_ms"]["here"],
            f"{found['questions']} questions over HTTP": found["first_token_ms"]["server"],
            f"{found['clients']['asked']} clients at once": found["clients"]["first_token_ms"],
        }
        where = f"{model}, {found['backend'].split(', ')[1]}"
        rows += [
            (where, title, *(number(percentiles[p]) for p in shown), link(name)) for title, percentiles in times.items()
        ]
    return table(("", "first token, ms", *shown, "file"), rows)


def together() -> str:
    """Answers that take turns, and as many that share decode steps."""
    found = load("h200-together-0.5b")
    ways = {"each in turn": found["turns"], "in one step": found["together"]}
    rows = [
        (title, *(f"{each['step_ms']:.2f} ({each['tokens_per_second']:,.0f})" for each in way.values()))
        for title, way in ways.items()
    ]
    return table(("a token of each answer, ms (tokens a second)", *(f"{n} answers" for n in found["turns"])), rows)


def _median_start(name: str, part: str) -> str:
    return f"{median(start[part] for start in load(name)['cold_starts']):,.0f}"


def _pruned(record: dict[str, Any]) -> tuple[str, ...]:
    shape = "×".join(str(record[key]) for key in ("frames", "tokens_per_frame", "width"))
    times = (_range(record[key]) for key in ("fast", "exact", "peer"))
    workspace = " / ".join(f"{record[key] / 1e6:.0f}" for key in ("workspace_fast", "workspace_exact"))
    return (shape, record["content"], f"{record['kept']:,}", *times, workspace)


def _range(microseconds: list[float]) -> str:
    p50, p10, p90 = (f"{value / 1000:.3f}" for value in microseconds)
    return f"{p50} ({p10}–{p90})"


def _kernel(record: dict[str, Any]) -> list[tuple[str, ...]]:
    shape, name = str(record["shape"]), record["kernel"]
    if "dtypes" in record:
        name += f" (stream, branch, result: {', '.join(kind.removeprefix('torch.') for kind in record['dtypes'])})"
    peers = {
        "mma_us": "mma.sync",
        "cudnn_us": "cuDNN",
        "flash_us": "flash attention 2",
        "linear_and_gelu_us": "in two kernels",
        "torch_us": "PyTorch",
        "torch_and_gelu_us": "PyTorch's product and our GELU",
    }
    against = ", ".join(f"{title} {record[key]}" for key, title in peers.items() if key in record)
    titles = {"us": name, "erf_us": f"{name}, exact", "tanh_us": f"{name}, by tanh"}
    found = [(key, title) for key, title in titles.items() if key in record]
    return [(title, shape, str(record[key]), "" if key == "tanh_us" else against) for key, title in found]


def _peers(files: dict[str, tuple[str, ...]]) -> str:
    """A table of models with what was measured beside them; a file, and a case where it is not a Column's default."""
    columns = (
        Column(f"{model}, {title}", *file, runner=runner)
        for model, file in files.items()
        for title, runner in _RUNNERS.items()
    )
    return stages(tuple(column for column in columns if column.measured), _STAGES, _CONDITIONS)


PARTS: dict[str, Callable[[], str]] = {
    "pipeline": pipeline,
    "transformers": transformers,
    "families": families,
    "family-peers": family_peers,
    "cold-starts": cold_starts,
    "operator": operator,
    "kernels": kernels,
    "frames": frames,
    "batch": batch,
    "video": video,
    "live": live,
    "sampling": sampling,
    "server": server,
    "together": together,
}
