"""Make a short video with things in it: two scenes, a ball that rolls, a square that appears.

python examples/make_video.py clip.mp4
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT, FPS, SECONDS = 640, 360, 12, 8


def backdrop(seed: int, sky: tuple[int, int, int], ground: tuple[int, int, int]) -> Image.Image:
    """A textured sky over a textured ground."""
    noise = np.random.default_rng(seed).normal(0, 14, (HEIGHT, WIDTH, 1))
    colours = np.where(np.arange(HEIGHT)[:, None, None] < HEIGHT * 0.62, sky, ground) + noise
    return Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.5))


def frames() -> Iterator[Image.Image]:
    """Every frame: a ball rolls left to right through a meadow; after a cut, a square appears in a room at night."""
    meadow, night = backdrop(1, (150, 190, 225), (90, 140, 70)), backdrop(2, (38, 40, 66), (70, 58, 52))
    count = FPS * SECONDS
    for i in range(count):
        time = i / count
        image = (meadow if time < 0.5 else night).copy()
        draw = ImageDraw.Draw(image)
        if time < 0.5:
            draw.rectangle((500, 120, 560, 223), fill=(120, 80, 50))
            draw.ellipse((440, 30, 620, 170), fill=(40, 110, 50))
            x = 40 + 1000 * time
            draw.ellipse((x - 34, 225, x + 34, 293), fill=(210, 40, 40))
            draw.line((x, 259, x + 30 * np.cos(40 * time), 259 + 30 * np.sin(40 * time)), fill=(250, 220, 220), width=5)
        else:
            draw.rectangle((60, 70, 200, 180), fill=(210, 190, 120))
            draw.line((130, 70, 130, 180), fill=(60, 50, 40), width=6)
            if time > 0.7:
                draw.rectangle((400, 180, 480, 260), fill=(60, 120, 230))
        yield image


def write(path: Path) -> None:
    """Encodes the frames as MPEG-4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", 4_000_000
        for i, image in enumerate(frames()):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a short video with things in it.")
    parser.add_argument("path", type=Path)
    write(parser.parse_args().path)


if __name__ == "__main__":
    main()
