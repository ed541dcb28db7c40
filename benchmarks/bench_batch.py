"""`tango batch` against as many `tango run`s, on generated files.

    python -m benchmarks.bench_batch BUNDLE [--videos 200] [--seconds 30] [--size 720x1280] [--decoders 8+7] [--json …]

8+7 decoders are 8 processes that decode in software and 7 that decode on the GPU. All batches should give the same
answers, whatever decodes. A few single runs are timed and stand for all of them. The times of single runs and of
batches include the start of their processes. Where nvidia-smi is installed, it samples how busy the first GPU and its
decoding engines are during a batch; the GPU is also busy with kernels that decoding needs. The rate at which the same
processes only decode shows whether decoding or the model is the bottleneck. With ``--ray``, the workers of a Ray
cluster answer the batch; run it again with more nodes to compare.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from tango_runtime.batch.decoding import Decoders
from tango_runtime.bench.conditions import gpu_state, machine
from tango_runtime.bundle import Bundle
from tango_runtime.cli.args import frame_size
from tango_runtime.video.shape import FrameOptions

TANGO = [sys.executable, "-m", "tango_runtime.cli.main"]
QUESTIONS = ["What happens?", "Who comes in?", "What color is it?", "How many are there?"]

#: Files of their own; the others are copies, which take as long to read and to decode.
DISTINCT = 16

#: Frames a second of the files.
FPS = 30

#: Milliseconds between two samples of the GPU's use.
_SAMPLE_MS = 200


def write_video(folder: Path, seconds: int, size: tuple[int, int], number: int) -> Path:
    """A camera pans over a texture, in H.264 with the encoder's default of a keyframe every 250 frames."""
    (height, width), path = size, folder / f"{number:03}.mp4"
    if path.exists():
        return path
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (height // 8, width // 4, 3), dtype=np.uint8)
    texture = small.repeat(16, 0).repeat(16, 1) // 2
    noise = rng.integers(0, 8, (8, height, width, 3), dtype=np.uint8)  # like a sensor's, it costs bits in every frame
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "26"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(seconds * FPS):
            x, y = (3 * i) % width, (i + number) % height
            frame = av.VideoFrame.from_ndarray(texture[y : y + height, x : x + width] + noise[i % 8], "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_videos(folder: Path, count: int, seconds: int, size: tuple[int, int]) -> list[Path]:
    """Writes ``count`` files, of which ``DISTINCT`` are encoded."""
    distinct = range(min(count, DISTINCT))
    with ProcessPoolExecutor() as processes:
        made = list(processes.map(partial(write_video, folder, seconds, size), distinct))
    return made + [Path(shutil.copy(made[i % DISTINCT], folder / f"{i:03}.mp4")) for i in range(len(made), count)]


@dataclass(frozen=True)
class Processes:
    """Processes that decode: in software, and on the GPU."""

    in_software: int
    on_gpu: int

    @classmethod
    def parse(cls, text: str) -> Processes:
        """Of ``8`` or ``8+7``."""
        in_software, _, on_gpu = text.partition("+")
        return cls(int(in_software), int(on_gpu or 0))

    def __str__(self) -> str:
        return f"{self.in_software}+{self.on_gpu}" if self.on_gpu else str(self.in_software)

    def __len__(self) -> int:
        return self.in_software + self.on_gpu


class GpuUse:
    """Percent of the time in which the GPU and its decoders were busy, as nvidia-smi samples it; a context manager."""

    def __enter__(self) -> GpuUse:
        query = [
            "nvidia-smi",
            "--query-gpu=utilization.gpu,utilization.decoder",
            "--format=csv,noheader,nounits",
            "-lms",
            str(_SAMPLE_MS),
            "-i",
            "0",
        ]
        there = shutil.which("nvidia-smi")
        self._process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True) if there else None
        return self

    def __exit__(self, *error: object) -> None:
        self.samples: list[tuple[int, int]] = []
        if self._process is not None:
            self._process.terminate()
            output, _ = self._process.communicate()
            found = [re.findall(r"\d+", line) for line in output.splitlines()]
            self.samples = [(int(values[0]), int(values[-1])) for values in found if values]

    def summary(self, seconds: float) -> dict[str, float] | None:
        """Mean of the samples of the last ``seconds`` before the GPU was idle, and their share of 90 or more."""
        samples = np.array(self.samples).reshape(-1, 2)
        last = int(np.flatnonzero(samples[:, 0])[-1]) + 1 if samples[:, 0].any() else 0
        gpu, decoders = samples[max(last - round(1e3 * seconds / _SAMPLE_MS), 0) : last].T
        if not len(gpu):
            return None
        shares = {"mean": gpu.mean(), "share_of_90": (gpu >= 90).mean(), "decoders_mean": decoders.mean()}
        return {name: round(float(value), 3) for name, value in shares.items()}


def _tango(*arguments: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*TANGO, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"tango {arguments[0]} failed:\n{done.stderr}")
    return done


def run_singly(bundle: Path, videos: list[Path], options: list[str]) -> tuple[list[float], dict[tuple[str, str], str]]:
    """Seconds and answers of single runs, after one that is not counted."""
    seconds, answers = [], {}
    for video in [videos[0], *videos]:
        begin = time.perf_counter()
        done = _tango("run", bundle, video, QUESTIONS[0], *options)
        seconds.append(time.perf_counter() - begin)
        answers[video.name, QUESTIONS[0]] = done.stdout.removesuffix("\n")
    return seconds[1:], answers


def run_batch(
    bundle: Path, folder: Path, decoders: Processes, options: list[str]
) -> tuple[dict[str, Any], dict[Any, str]]:
    """Figures and answers of a batch."""
    output = folder / f"answers-{decoders}.jsonl"
    output.unlink(missing_ok=True)
    named = [bundle, folder / "questions.jsonl", "--output", output]
    processes = ["--decoders", decoders.in_software, "--gpu-decoders", decoders.on_gpu]
    with GpuUse() as use:
        begin = time.perf_counter()
        done = _tango("batch", *named, *processes, *options)
        seconds = time.perf_counter() - begin
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    at_work = re.findall(r"^(\S+) answers/s, model busy (\d+)%, (\S+) s$", done.stderr, re.MULTILINE)[-1]
    figures = {
        "decoders": str(decoders),
        "answers": len(lines),
        "seconds": round(seconds, 2),
        "seconds_at_work": float(at_work[2]),
        "answers_per_second_at_work": float(at_work[0]),
        "model_busy_percent": int(at_work[1]),
        "gpu_busy_percent": use.summary(float(at_work[2])),
    }
    return figures, {(line["video"], line["question"]): line["answer"] for line in lines}


def decode_alone(bundle: Path, videos: list[Path], decoders: Processes) -> float:
    """Videos per second that running processes decode."""
    manifest = Bundle.load(bundle).manifest
    with closing(Decoders(manifest, FrameOptions(), decoders.in_software, decoders.on_gpu)) as processes:
        processes.ready(None)
        for future in [processes.submit(video) for video in videos[: len(decoders)]]:
            future.result()
        begin = time.perf_counter()
        for future in [processes.submit(video) for video in videos]:
            future.result()
        return round(len(videos) / (time.perf_counter() - begin), 2)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=30, help="length of a file (default: 30)")
    parser.add_argument("--size", type=frame_size, default=(720, 1280), help="HEIGHTxWIDTH (default: 720x1280)")
    parser.add_argument("--singles", type=int, default=4, help="single runs that are timed, may be 0 (default: 4)")
    parser.add_argument("--decoders", type=Processes.parse, nargs="+", default=[Processes(8, 0)])
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--ray", metavar="ADDRESS", help="cluster that answers the batch")
    parser.add_argument("--models-per-gpu", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="where the files are kept, and used again (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        videos = write_videos(folder, args.videos, args.seconds, args.size)
        size = sum(video.stat().st_size for video in videos) / len(videos)
        print(f"{len(videos)} files of {size / 1e6:.1f} MB in {time.perf_counter() - begin:.1f} s", flush=True)
        rows = [{"video": video.name, "question": question} for video in videos for question in QUESTIONS]
        (folder / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        options = ["--backend", args.backend, "--max-new-tokens", str(args.max_new_tokens)]
        cluster = ["--ray", args.ray, "--models-per-gpu", str(args.models_per_gpu)] if args.ray else []

        singles, wanted = run_singly(args.bundle, videos[: args.singles], options) if args.singles else ([], {})
        if singles:
            print(f"a single run: {statistics.median(singles):.2f} s (median of {len(singles)})", flush=True)
        batches: list[dict[str, Any]] = []
        first: dict[Any, str] = {}
        for decoders in args.decoders:
            figures, answers = run_batch(args.bundle, folder, decoders, [*options, *cluster])
            if singles:
                figures["times_faster"] = round(statistics.median(singles) * len(rows) / figures["seconds"], 1)
                figures["same_answers"] = sum(answers[key] == text for key, text in wanted.items())
            first = first or answers
            figures["same_as_first"] = sum(answers[key] == text for key, text in first.items())
            if not cluster:  # whose machines may be others
                figures["decoded_alone_per_second"] = decode_alone(args.bundle, videos[: 4 * len(decoders)], decoders)
            batches.append(figures)
            print(json.dumps(figures), flush=True)
        result = {
            "conditions": {"machine": machine(), "gpu_before": gpu_state()},
            "bundle": args.bundle.resolve().name,
            "ray": args.ray,
            "models_per_gpu": args.models_per_gpu,
            "videos": len(videos),
            "seconds": args.seconds,
            "size": args.size,
            "megabytes": round(size / 1e6, 2),
            "questions": len(rows),
            "max_new_tokens": args.max_new_tokens,
            "single_run_seconds": [round(value, 3) for value in singles],
            "batches": batches,
        }
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
