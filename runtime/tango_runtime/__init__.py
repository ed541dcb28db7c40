"""Bundle → engines → answers: the part of tango-edge that a device installs."""

from tango_runtime.chain import Answer, AnswerStream, VideoLLM

__all__ = ["Answer", "AnswerStream", "VideoLLM"]
