"""Save 16 frames of a video as JPEGs named by their time in milliseconds: python save_frames.py VIDEO FOLDER"""

import sys
from pathlib import Path

from PIL import Image

from tango_runtime.video import sample

COUNT = 16

video, folder = sys.argv[1], Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
for seconds, frame in sample(video, COUNT):
    Image.fromarray(frame).save(folder / f"{1000 * seconds:06.0f}.jpg", quality=95)
print(f"{COUNT} images in {folder}")
