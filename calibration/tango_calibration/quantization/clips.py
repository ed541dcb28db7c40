"""The clips that calibration runs on: a folder of videos, or generated ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tango_calibration.data.dataset import QUESTIONS, SYNTHETIC, Video, read_folder, synthetic
from tango_calibration.data.questions import Question
from tango_plugins import TangoError
from tango_runtime.bundle import Bundle
from tango_runtime.video import sample
from tango_runtime.video.preprocess import preprocess

#: Ranges of fewer clips describe the clips rather than the model.
MIN_CLIPS = 4

_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
_QUESTION = "What happens in this video?"


def read_clips(clips: str, count: int, frames: int, seed: int = 0) -> list[Video]:
    """Lists the calibration clips, each with at least one question.

    Args:
        clips: A folder of videos, with or without a questions.jsonl, or ``synthetic``.
        count: Maximum number of clips.
        frames: Frames sampled from each clip.
        seed: Seed of generated clips. They are of the validation split, which no evaluation uses.

    Raises:
        TangoError: The folder does not exist, or it has too few videos.
    """
    videos = _synthetic(count, frames, seed) if clips == SYNTHETIC else _folder(Path(clips), frames)[:count]
    if len(videos) < MIN_CLIPS:
        raise TangoError(
            f"{clips} has only {len(videos)} clips", f"calibration needs at least {MIN_CLIPS}: add some (--videos)"
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


def load_frames(bundle: Bundle, video: Video) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Reads a clip as the vision graph takes it.

    Returns:
        (frames [F, height, width, 3], their times in seconds [F]).

    Raises:
        TangoError: The clip cannot be read.
    """
    try:
        batch = preprocess(sample(video.source, video.frames), bundle.manifest.video.size)
    except TangoError as error:
        raise TangoError(f"clip {video.name}: {error.message}", error.hint) from error
    return batch.host_frames, batch.seconds
