"""Bundle → answers: the part of tango-edge that a device installs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tango_plugins import TangoError
    from tango_runtime.pipeline.answer import Answer, AnswerStream
    from tango_runtime.pipeline.encoded import EncodedVideo
    from tango_runtime.pipeline.live import LiveVideo
    from tango_runtime.pipeline.session import Session
    from tango_runtime.pipeline.video_llm import VideoLLM

__all__ = ["Answer", "AnswerStream", "EncodedVideo", "LiveVideo", "Session", "TangoError", "VideoLLM"]

_MODULES = {
    "Answer": "tango_runtime.pipeline.answer",
    "AnswerStream": "tango_runtime.pipeline.answer",
    "EncodedVideo": "tango_runtime.pipeline.encoded",
    "LiveVideo": "tango_runtime.pipeline.live",
    "Session": "tango_runtime.pipeline.session",
    "TangoError": "tango_plugins",
    "VideoLLM": "tango_runtime.pipeline.video_llm",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line answers an interrupt before all of it is loaded.
    if name == "__version__":
        return importlib.import_module("tango_plugins").__version__
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
