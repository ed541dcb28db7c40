"""Bundle → engines → answers: the part of tango-edge that a device installs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tango_runtime.pipeline.video_llm import Answer, AnswerStream, VideoLLM

__all__ = ["Answer", "AnswerStream", "VideoLLM"]


def __getattr__(name: str) -> Any:
    # On first use: before the chain's imports are through, the command line already answers an interrupt.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tango_runtime.pipeline import video_llm as chain

    return getattr(chain, name)
