"""What a checkpoint's processor makes of pixels, which must be what the graphs and the runtime make of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tango_export.checkpoint import read_json
from tango_plugins import TangoError

#: Where transformers looks for a video's processor, first to last; the first may hold it under a key of its own.
_FILES = (
    "processor_config.json",
    "video_preprocessor_config.json",
    "video_processor/preprocessor_config.json",
    "preprocessor_config.json",
)

#: Pillow's number of the bicubic filter.
_BICUBIC = 3


def check_processor(folder: Path, mean: Sequence[float], std: Sequence[float]) -> None:
    """Rejects a checkpoint whose processor scales or normalizes pixels in another way.

    Args:
        folder: The checkpoint. Without a processor's file, it is taken to be as released.
        mean: What the graphs subtract from the channels of a pixel from 0 to 1.
        std: What they divide them by then.

    Raises:
        TangoError: A value is another one.
    """
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    for file in files:
        found: Any = read_json(file)
        if file.name == "processor_config.json":
            found = found.get("video_processor")
        if isinstance(found, dict):
            _check(file, found, mean, std)
            return


def _check(file: Path, found: dict[str, Any], mean: Sequence[float], std: Sequence[float]) -> None:
    expected = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True) | {
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    for key, value in expected.items():
        if (given := found.get(key)) is not None and not _same(given, value):
            raise TangoError(
                f"{file}: {key} is {str(given)[:60]}, only {value} is supported",
                "the checkpoint was made for other pixels; export the one that it was tuned from, or restore the file",
            )


def _same(given: object, value: object) -> bool:
    if isinstance(value, list):
        return isinstance(given, list) and len(given) == len(value) and all(map(_same, given, value))
    if isinstance(value, bool) or isinstance(given, bool) or not isinstance(given, int | float):
        return given is value
    return abs(given) < 1e6 and math.isclose(given, float(str(value)), rel_tol=1e-6)
