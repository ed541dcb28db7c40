"""Options that several commands share: each has one name, one type and one help text everywhere.

Only what is in the parentheses of a help text, its default, may differ between commands.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from tango_plugins import PruneParams, TangoError
from tango_runtime.backends.registry import BACKENDS
from tango_runtime.util.files import atomic_write, check_file
from tango_runtime.util.jsonschema import parse_json
from tango_runtime.video import Sampling

#: The value of an output option that stands for standard output.
STDOUT = Path("-")

#: Precisions of a graph, and what each graph is called in help texts.
PRECISIONS = {"vision": ("fp16", "int8", "fp8"), "decoder": ("fp16", "int8", "fp8", "int4")}
_GRAPHS = {"vision": "vision tower", "decoder": "decoder"}


# Types.


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    return _int(text, 1, "a positive integer")


def non_negative_int(text: str) -> int:
    """An integer of at least 0."""
    return _int(text, 0, "a non-negative integer")


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    return _float(text, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def ratio(text: str) -> float:
    """A share that the operator holds exactly: it has at most four decimals."""
    return PruneParams(retention_ratio=share(text)).retention_ratio


def percent(text: str) -> float:
    """A number above 0 and at most 100."""
    return _float(text, lambda value: 0 < value <= 100, "a percentage above 0 and at most 100")


def positive_float(text: str) -> float:
    """A finite number above 0."""
    return _float(text, lambda value: 0 < value < math.inf, "a number above 0")


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    return _float(text, lambda value: 0 <= value < math.inf, "a number of at least 0")


def frame_size(text: str) -> tuple[int, int]:
    """A height and a width in pixels, as ``336x588``."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) > 0 and int(width) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a height and a width, as in 336x588")
    return int(height), int(width)


def new_file(text: str) -> Path:
    """A file that can be written."""
    path = Path(text)
    check_file(path)
    return path


def json_file(text: str) -> Path:
    """A file that can be written, or standard output."""
    return STDOUT if Path(text) == STDOUT else new_file(text)


def page_file(text: str) -> Path:
    """A web page to write: another kind of file of that name is never replaced."""
    return _output_file(text, ".html")


def picture_file(text: str) -> Path:
    """A picture to write: another kind of file of that name is never replaced."""
    return _output_file(text, ".png")


def ray_address(text: str) -> str:
    """The address of a Ray cluster; an error where Ray is not installed, before there is any output."""
    if find_spec("ray") is None:
        raise TangoError("--ray needs Ray, which is not installed", "pip install 'tango-edge[ray]'")
    return text


def schema_file(text: str) -> Any:
    """The JSON of a file with a JSON schema."""
    return parse_json(Path(text).read_bytes(), text, "give a file with a JSON schema")


def _output_file(text: str, suffix: str) -> Path:
    path = new_file(text)
    device = path.exists() and not path.is_file()
    if not device and path.suffix.lower() != suffix:
        raise TangoError(f"{path} does not end in {suffix}", f"name it {path.stem}{suffix}")
    return path


def _int(text: str, minimum: int, what: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def _float(text: str, accepts: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not accepts(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


# Options.


def add_bundle(parser: argparse.ArgumentParser, **options: Any) -> None:
    """``BUNDLE``."""
    parser.add_argument("bundle", type=Path, help="bundle folder written by tango-export", **options)


def add_count(
    parser: argparse._ActionsContainer, name: str, text: str, default: int | None = None, note: str = "%(default)s"
) -> None:
    """An option that takes a number of at least 1; ``note`` says what the default is."""
    parser.add_argument(name, type=positive_int, default=default, metavar="N", help=f"{text} (default: {note})")


def add_frames(parser: argparse.ArgumentParser, default: int | None = None, note: str = "the bundle's") -> None:
    """``--frames``."""
    add_count(parser, "--frames", "number of frames sampled from a video", default, "%(default)s" if default else note)


def add_frame(parser: argparse._ActionsContainer, note: str = "the bundle's") -> None:
    """``--frame``."""
    parser.add_argument(
        "--frame",
        type=frame_size,
        metavar="HxW",
        help=f"height and width in pixels that frames are resized to, for models that take any size (default: {note})",
    )


def add_frame_size(parser: argparse.ArgumentParser, note: str = "the video's aspect within the pixels allowed") -> None:
    """``--frame`` or ``--max-pixels``."""
    group = parser.add_mutually_exclusive_group()
    add_frame(group, note)
    add_count(
        group, "--max-pixels", "maximum number of pixels of a frame, for models that take any size", note="the bundle's"
    )


def add_sampling_of_frames(parser: argparse.ArgumentParser) -> None:
    """``--sampling``."""
    parser.add_argument(
        "--sampling",
        choices=get_args(Sampling),
        default="exact",
        help="which frames of a video file: evenly spaced ones, or the keyframe nearest to each, which is faster "
        "(default: %(default)s)",
    )


def add_video(parser: argparse.ArgumentParser) -> None:
    """``VIDEO``, and what :func:`add_video_options` adds."""
    parser.add_argument(
        "video",
        help="video file, folder of images, or live stream: rtsp://, http://, https://, /dev/video0, gst:PIPELINE, "
        "csi:0, or - for standard input",
    )
    add_video_options(parser)


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """``--frames``, ``--sampling``, ``--fps``, ``--frame`` and ``--max-pixels``."""
    add_frames(parser)
    add_sampling_of_frames(parser)
    add_frame_size(parser)
    add_fps(parser)


def add_fps(parser: argparse.ArgumentParser) -> None:
    """``--fps``."""
    parser.add_argument(
        "--fps",
        type=positive_float,
        help="frame rate of a folder of images, or at which a live stream is sampled (default: 1)",
    )


def add_every(parser: argparse.ArgumentParser) -> None:
    """``--every``."""
    parser.add_argument(
        "--every",
        type=positive_float,
        default=5.0,
        metavar="SECONDS",
        help="seconds of the stream from one answer to the next (default: %(default)s)",
    )


def add_streams(parser: argparse.ArgumentParser, default: int | None, note: str) -> None:
    """``--streams``."""
    add_count(parser, "--streams", "streams that may be open", default, note)


def add_retention_ratio(parser: argparse._ActionsContainer, note: str = "the bundle's", **options: Any) -> None:
    """``--retention-ratio``."""
    parser.add_argument(
        "--retention-ratio",
        type=ratio,
        metavar="RATIO",
        help=f"fraction of video tokens that pruning keeps (default: {note})",
        **options,
    )


def add_pruning(parser: argparse.ArgumentParser, note: str = "the bundle's", **options: Any) -> None:
    """``--retention-ratio`` or ``--no-prune``."""
    group = parser.add_mutually_exclusive_group()
    add_retention_ratio(group, note, **options)
    group.add_argument(
        "--no-prune",
        action="store_true",
        help="run unpruned, with all video tokens; a retention ratio of 1 still merges tokens of static content",
    )


def add_max_new_tokens(parser: argparse.ArgumentParser, default: int) -> None:
    """``--max-new-tokens``."""
    add_count(parser, "--max-new-tokens", "maximum number of tokens in an answer", default)


def add_seed(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """``--seed``."""
    shown = "%(default)s" if default is not None else "a different one each time"
    parser.add_argument(
        "--seed",
        type=non_negative_int,
        default=default,
        metavar="N",
        help=f"seed of the random numbers (default: {shown})",
    )


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int = 128) -> None:
    """``--max-new-tokens``, ``--temperature``, ``--top-p`` and ``--seed``."""
    add_max_new_tokens(parser, max_new_tokens)
    parser.add_argument(
        "--temperature",
        type=non_negative_float,
        default=0.0,
        help="sampling temperature; 0 is greedy (default: %(default)s)",
    )
    parser.add_argument("--top-p", type=share, default=1.0, help="nucleus sampling threshold (default: %(default)s)")
    add_seed(parser)


def video_options(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_video` and :func:`add_pruning` were given, for :meth:`tango_runtime.VideoLLM.session`."""
    return {
        "frames": args.frames,
        "frame_size": args.frame,
        "max_pixels": args.max_pixels,
        "fps": args.fps,
        "sampling": args.sampling,
        "retention_ratio": args.retention_ratio,
        "prune": not args.no_prune,
    }


def add_json_schema(parser: argparse.ArgumentParser) -> None:
    """``--json-schema``."""
    parser.add_argument(
        "--json-schema",
        type=schema_file,
        metavar="FILE",
        help="answer with JSON that fits the JSON schema in this file (extra: structured)",
    )


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_sampling` was given, for :meth:`tango_runtime.VideoLLM.stream` and a session's."""
    names = ("max_new_tokens", "temperature", "top_p", "seed")
    return {name: getattr(args, name) for name in names}


def add_context(parser: argparse._ActionsContainer, note: str) -> None:
    """``--context``."""
    parser.add_argument(
        "--context",
        type=positive_int,
        metavar="TOKENS",
        help=f"context length in tokens, prompt and answer together (default: {note})",
    )


def add_precisions(parser: argparse.ArgumentParser, **defaults: str) -> None:
    """``--vision`` and ``--decoder``, by default as the model is."""
    for graph, choices in PRECISIONS.items():
        default = defaults.get(graph)
        parser.add_argument(
            f"--{graph}",
            default=default,
            choices=choices,
            help=f"precision of the {_GRAPHS[graph]} (default: {default or 'the precision it has'})",
        )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """``--backend``."""
    parser.add_argument(
        "--backend",
        default="auto",
        choices=["auto", *BACKENDS],
        help="what runs the graphs; auto is the fastest that is available (default: %(default)s)",
    )


def add_nvdec(parser: argparse.ArgumentParser) -> None:
    """``--nvdec``."""
    parser.add_argument(
        "--nvdec",
        action="store_true",
        help="decode video files on the GPU where it can, which is faster on few cores; frames of damaged files may "
        "differ (default: decode in software)",
    )


def add_output(parser: argparse.ArgumentParser, metavar: str, note: str = "", *, required: bool = False) -> None:
    """``--output``."""
    default = f" ({note})" if note else ""
    parser.add_argument("--output", type=Path, required=required, metavar=metavar, help=f"output to write{default}")


def add_ray(parser: argparse.ArgumentParser) -> None:
    """``--ray``."""
    parser.add_argument(
        "--ray",
        type=ray_address,
        metavar="ADDRESS",
        help="share the videos with the nodes of a Ray cluster, a worker for each GPU; local starts one here "
        "(default: this process)",
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """``--overwrite``."""
    parser.add_argument("--overwrite", action="store_true", help="replace output that already exists")


def add_jobs(parser: argparse.ArgumentParser, default: int) -> None:
    """``--jobs``."""
    add_count(parser, "--jobs", "number of parallel processes", default)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """``--verify``."""
    parser.add_argument("--verify", action="store_true", help="also compare the SHA-256 of every file and engine")


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json FILE``; see :func:`write_json`."""
    parser.add_argument(
        "--json",
        type=json_file,
        metavar="FILE",
        help="also write the results as JSON; - writes them to standard output in place of the text",
    )


def write_json(file: Path, data: object) -> None:
    """Writes results to the value of ``--json``.

    Raises:
        TangoError: The file cannot be written.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False)
    if file == STDOUT:
        print(text)
    else:
        # Half a surrogate pair, as in a name that is not UTF-8, becomes the escape that JSON has for it.
        atomic_write(file, lambda stream: stream.write(f"{text}\n".encode(errors="backslashreplace")))
