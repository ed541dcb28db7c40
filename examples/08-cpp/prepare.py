"""Writes the input of examples/08-cpp: a clip's frames as raw bytes, and a text file with everything else.

    python examples/08-cpp/prepare.py llava-ov-0.5b clip.mp4 "What is the person doing?" clip

writes clip/frames.raw, uint8 [F, size, size, 3], and clip/clip.txt, which names the bundle's engines for this machine. For
an engine of a device graph, whose weights are inputs, it also writes where in the bundle they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from tango_plugins import TangoError
from tango_runtime import engines
from tango_runtime.bundle import Bundle, GraphName
from tango_runtime.engines.target import current_target
from tango_runtime.pipeline.prompt import Prompt, describe
from tango_runtime.system.packages import import_tensorrt
from tango_runtime.video import sample
from tango_runtime.video.preprocess import preprocess


def find_engines(bundle: Bundle, ratio: float | None) -> dict[GraphName, engines.BuiltEngine]:
    """The engine of each graph that fits this machine."""
    params, target = bundle.manifest.params, current_target(import_tensorrt().__version__)
    params = params if ratio is None else params.at(ratio)
    chosen = {graph: engines.find(bundle, graph, target, params) for graph in engines.all_graphs(bundle)}
    for engine in chosen.values():
        if engine.stripped or engine.version_compatible:
            raise TangoError(
                f"{engine.path} was built with --strip-weights or --version-compatible",
                f"the C++ program supports neither: {engine.rebuild}",
            )
    return chosen


def list_weights(bundle: Bundle, graph: GraphName, folder: Path) -> Path:
    """Writes the data file of a device graph's weights, and a line with the offset and the name of each."""
    spec, file = bundle.manifest.graphs[graph], folder / f"{graph}.weights"
    lines = [str((bundle.path / spec.data).resolve())]
    lines += [f"{weight.offset} {name}" for name, weight in spec.device_weights.items()]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def _require_plain(bundle: Bundle) -> None:
    """Refuses a bundle that asks for what the C++ program does not do."""
    manifest = bundle.manifest
    asked = {
        "prompts": ("have row ends, which the C++ program does not place", manifest.prompt.row_end is not None),
        "decoders": ("drop tokens on their way, which the C++ program does not do", manifest.decoder.inner),
        "positions": ("have three axes, which the C++ program does not count", manifest.decoder.rotary),
    }
    for what, (problem, is_asked) in asked.items():
        if is_asked:
            raise TangoError(f"{what} of a {manifest.family} bundle {problem}", "ask in Python: tango run")


def write(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise TangoError(f"--max-new-tokens is {args.max_new_tokens}", "give at least 1")
    bundle = Bundle.load(args.bundle)
    _require_plain(bundle)
    manifest, found = bundle.manifest, find_engines(bundle, args.retention_ratio)
    count = manifest.video.frames if args.frames is None else args.frames
    stream = sample(args.video, count)
    before, after = Prompt.of(bundle).encode(args.question, describe(manifest.prompt.video_text, stream.clock))
    batch = preprocess(stream, manifest.video.size)
    args.output.mkdir(parents=True, exist_ok=True)
    frames = args.output.resolve() / "frames.raw"
    batch.frames.tofile(frames)
    on_device = [graph for graph, engine in found.items() if engine.form == "device"]
    clip: dict[str, object] = {graph: engine.path.resolve() for graph, engine in found.items()}
    clip |= {f"{graph}_weights": list_weights(bundle, graph, args.output.resolve()) for graph in on_device}
    clip |= {
        "frames": frames,
        "seconds": " ".join(map(str, batch.seconds)),  # the shortest digits that give the same fp32
        "before": " ".join(map(str, before)),
        "after": " ".join(map(str, np.concatenate((manifest.prompt.after_video, after)))),
        "stop": " ".join(map(str, manifest.prompt.stop)),
        "tokens": args.max_new_tokens,
    }
    text = "".join(f"{name} {value}\n" for name, value in clip.items())
    (args.output / "clip.txt").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder of a bundle with engines of tango build")
    parser.add_argument("video", help="video file, or folder of images")
    parser.add_argument("question")
    parser.add_argument("output", type=Path, help="folder to write the clip to")
    parser.add_argument("--frames", type=int, help="frames of the clip (default: the bundle's)")
    parser.add_argument(
        "--retention-ratio", type=float, help="retention ratio of the prune engine (default: the bundle's)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="most tokens of the answer (default: %(default)s)"
    )
    try:
        write(parser.parse_args())
    except TangoError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")


if __name__ == "__main__":
    main()
