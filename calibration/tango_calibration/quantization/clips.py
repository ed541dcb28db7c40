"""The clips that calibration runs on: a folder of videos, or generated ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tango_calibration.data.dataset import QUESTIONS, SYNTHETIC, Video, read_folder, synthetic
from tango_calibration.data.questions import Question
from tango_plugins import PruneParams, TangoError
from tango_runtime.bundle import Bundle
from tango_runtime.video import Clock
from tango_runtime.video.preprocess import preprocess
from tango_runtime.video.shape import ClipShape, FrameOptions, open_clip

#: Ranges from fewer clips describe the clips rather than the model.
MIN_CLIPS = 4

_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
_QUESTION = "What happens in this video?"


def read_clips(clips: str, count: int, frames: int, seed: int = 0) -> list[Video]:
    """Lists the calibration clips, each with at least one question.

    Args:
        clips: A folder of videos, with or without a questions.jsonl, or ``synthetic``.
        count: Maximum number of clips.
        frames: Frames sampled from each clip.
        seed: Seed of generated clips. They come from the validation split, which no evaluation uses.

    Raises:
        TangoError: The folder does not exist, or it has too few videos.
    """
    videos = _synthetic(count, frames, seed) if clips == SYNTHETIC else _folder(Path(clips).absolute(), frames)[:count]
    if len(videos) < MIN_CLIPS:
        raise TangoError(
            f"{clips} gives {len(videos)} of the {MIN_CLIPS} clips that calibration needs at least",
            "add videos to the folder, raise --videos, or use --clips synthetic",
        )
    return videos


def _synthetic(count: int, frames: int, seed: int) -> list[Video]:
    return synthetic(count, seed=seed, questions=1, frames=frames, split="validation")


def _folder(folder: Path, frames: int) -> list[Video]:
    if not folder.is_dir():
        raise TangoError(f"there is no folder {folder}", f"name a folder of videos, or {SYNTHETIC}")
    if (folder / QUESTIONS).is_file():
        return read_folder(folder, frames)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise TangoError(
            f"there are no clips in {folder}", f"put videos there ({', '.join(_SUFFIXES)}), or name {SYNTHETIC}"
        )
    questions = (Question("describe", _QUESTION, ""),)
    names = [str(file.relative_to(folder)) for file in files]
    return [Video(name, file, frames, questions, (name,)) for name, file in zip(names, files, strict=True)]


@dataclass(frozen=True)
class LoadedClip:
    """A clip, ready for the vision graph.

    Attributes:
        steps: Steps of its frames, uint8, as :meth:`ClipShape.as_steps` gives them.
        seconds: Times of the steps [T] fp32.
        shape: Shape of the clip.
        clock: Times of its frames.
    """

    steps: NDArray[np.uint8]
    seconds: NDArray[np.float32]
    shape: ClipShape
    clock: Clock

    def params(self, bundle: Bundle) -> PruneParams:
        """The bundle's parameters of the operator, on the grid of the clip's tokens."""
        return bundle.manifest.params.on(self.shape.grid)


def load_clip(bundle: Bundle, video: Video) -> LoadedClip:
    """Reads a clip.

    Raises:
        TangoError: It cannot be read.
    """
    try:
        stream, shape = open_clip(bundle.manifest, video.source, FrameOptions(video.frames))
        batch = preprocess(stream, shape.size)
    except TangoError as error:
        raise TangoError(f"clip {video.name}: {error.message}", error.hint) from error
    return LoadedClip(shape.as_steps(batch.host_frames), shape.step_seconds(batch.seconds), shape, stream.clock)
