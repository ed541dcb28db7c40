"""The commands of an example's README, what they need, and what they print."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tango_plugins.native_library import installed

EXAMPLES = Path(__file__).parents[2] / "examples"
READMES = sorted(EXAMPLES.glob("[0-9][0-9]-*/README.md"))

_BLOCK = re.compile(r"(?:^<!-- needs: ([\w -]+) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Commands:
    """A block of bash.

    Attributes:
        bash: What a reader enters.
        needs: Keys of `MISSING`: what the machine must have, besides what all examples need.
        output: What the README says that it prints; None where it says nothing.
    """

    bash: str
    needs: frozenset[str]
    output: str | None


def commands(readme: Path) -> list[Commands]:
    """The blocks of a README, each with the text that follows it."""
    found: list[Commands] = []
    for needs, language, text in _BLOCK.findall(readme.read_text(encoding="utf-8")):
        if language == "bash":
            found.append(Commands(text, frozenset(needs.split()), None))
        else:
            assert language == "text", f"{readme}: a block is {language!r}"
            assert found[-1].output is None, f"{readme}: two outputs of a block"
            found[-1] = Commands(found[-1].bash, found[-1].needs, text)
    return found


def _packages(*modules: str) -> str:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def _server() -> str:
    return _packages("starlette", "uvicorn", "openai") or ("" if shutil.which("curl") else "curl is not on the PATH")


def _gpu() -> str:
    if not installed().is_file():
        return "the CUDA library is not built (tango plugin build)"
    if packages := _packages("torch"):
        return packages
    import torch

    return "" if torch.cuda.is_available() else "no NVIDIA GPU, or PyTorch cannot use it"


def _ort_cuda() -> str:
    if packages := _packages("onnxruntime"):
        return packages
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    return "" if "CUDAExecutionProvider" in providers else "ONNX Runtime is the one without CUDA"


def _tensorrt() -> str:
    if reason := _gpu() or _packages("tensorrt"):
        return reason
    if not all(map(shutil.which, ("nvcc", "cmake"))):
        return "nvcc or cmake is not on the PATH"
    return "" if any(Path("/usr/include").glob("*/NvInfer.h")) else "there is no NvInfer.h in a usual place"


#: What a block may need → why this machine cannot run it; empty where it can.
MISSING: dict[str, Callable[[], str]] = {
    "calibration": lambda: _packages("matplotlib", "onnx"),
    "gpu": _gpu,
    "nvcc": lambda: "" if shutil.which("nvcc") else "nvcc is not on the PATH",
    "ort-cuda": _ort_cuda,
    "ray": lambda: _packages("ray"),
    "rtsp": lambda: "there is no RTSP camera",
    "server": _server,
    "tensorrt": _tensorrt,
    "torch": lambda: _packages("torch"),
    "v4l2": lambda: "" if Path("/dev/video0").exists() else "there is no /dev/video0",
}


def missing(needs: frozenset[str]) -> str:
    """Why this machine cannot run a block with these needs; empty where it can."""
    return next(filter(None, (MISSING[need]() for need in sorted(needs))), "")


def pattern(output: str, answers: tuple[str, ...] = ()) -> re.Pattern[str]:
    """What output must match: numbers may be others, ``…`` is anything, and so is a word of ``answers``.

    Numbers are counts, times and losses, of which some depend on the machine, and may be small; blanks in front of them
    fill up a column.
    """
    free = re.compile("|".join(["(…)", r"( *\d+(?:\.\d+)?)", *(rf"(\b{word}\b)" for word in answers)]))
    parts, end = [], 0
    for match in free.finditer(output.rstrip("\n")):
        blanks = " +" if match[0].startswith(" ") else ""
        parts += [re.escape(output[end : match.start()]), rf"{blanks}\d+(?:\.\d+)?(?:e-\d+)?" if match[2] else ".*?"]
        end = match.end()
    return re.compile("".join([*parts, re.escape(output[end:].rstrip("\n")), r"\s*"]), re.DOTALL)
