"""Answer a question about images whose names are times in milliseconds: python ask.py BUNDLE FOLDER QUESTION

A folder passed as it is has evenly spaced images. Pairs of seconds and frame may be any time apart.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tango_runtime import VideoLLM


def timed_frames(files: list[Path]) -> Iterator[tuple[float, np.ndarray]]:
    """Pairs of seconds and a uint8 RGB frame [H, W, 3], times ascending."""
    for file in files:
        yield int(file.stem) / 1000, np.array(Image.open(file).convert("RGB"))


bundle, folder, question = sys.argv[1:]
files = sorted(Path(folder).glob("*.jpg"))
answer = VideoLLM(bundle).generate(timed_frames(files), question, frames=len(files), max_new_tokens=32)
print(answer.text)
print(f"{len(answer.seconds)} images from {answer.seconds[0]:.1f} to {answer.seconds[-1]:.1f} s")
