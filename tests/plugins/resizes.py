"""Random frames for the CUDA library's resize, and the same conversion and resize by NumPy and Pillow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from tango_plugins import resize
from tango_plugins.device_array import DeviceArray
from tango_plugins.structs import TangoResizeShape

#: Color matrices of ITU-T H.273, with the shares of red and blue in luma.
MATRICES = {
    1: (0.2126, 0.0722),
    2: (0.299, 0.114),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}


@dataclass(frozen=True)
class Shape:
    """Frames as they are stored; ``gap`` bytes follow each row, ``gap_rows`` rows each frame."""

    rows: int
    columns: int
    out_rows: int
    out_columns: int
    frames: int = 1
    format: int = resize.RGB24
    matrix: int = 1
    full_range: int = 0
    turn: tuple[int, int, int] = (0, 0, 0)  # transpose, flip_rows, flip_columns
    gap: int = 0
    gap_rows: int = 0


class Frames:
    """Random frames on a device; the result is 123 everywhere, and so is what surrounds it.

    Args:
        shape: Of the frames.
        planes: Luma [F, rows, columns] and chroma [F, ⌈rows / 2⌉, ⌈columns / 2⌉, 2], or RGB; None draws noise.
        path: The library; None takes the one that is installed.
        device: Where the tensors are.
    """

    def __init__(self, shape, planes=None, path=None, device="cuda", seed=0):
        self.shape, self.path, self.device = shape, path, device
        self.planes = planes or noise(shape, np.random.default_rng(seed))
        self.image, self.chroma = self.put(self.planes)
        size = shape.frames * shape.out_rows * shape.out_columns * 3
        self.surrounded = torch.full((size + 512,), 123, dtype=torch.uint8, device=device)
        self.described = TangoResizeShape(
            *(shape.frames, shape.format, shape.rows, shape.columns, self.pitch, self.frame_rows),
            *(shape.matrix, shape.full_range, *shape.turn, shape.out_rows, shape.out_columns),
            resize.columns_first(self.shown, (shape.out_rows, shape.out_columns)),
        )

    @property
    def shown(self):
        return (self.shape.columns, self.shape.rows) if self.shape.turn[0] else (self.shape.rows, self.shape.columns)

    @property
    def pitch(self):
        sample = 2 if self.shape.format == resize.P010 else 1
        width = 3 * self.shape.columns if self.shape.format == resize.RGB24 else -(-self.shape.columns // 2) * 2
        return width * sample + self.shape.gap

    @property
    def frame_rows(self):
        chroma = 0 if self.shape.format == resize.RGB24 else -(-self.shape.rows // 2)
        return self.shape.rows + chroma + self.shape.gap_rows

    def put(self, planes):
        """The frames in memory with gaps, on the device: image and chroma, as views of one tensor."""
        held = np.full((self.shape.frames, self.frame_rows, self.pitch), 77, np.uint8)
        at, begins = 0, []
        for plane in planes:
            # The upper ten bits count; the others are noise.
            stored = (plane << 6 | 13).astype("<u2") if self.shape.format == resize.P010 else plane.astype(np.uint8)
            rows = stored.reshape(*stored.shape[:2], -1).view(np.uint8)
            held[:, at : at + rows.shape[1], : rows.shape[2]] = rows
            begins.append(at)
            at += rows.shape[1]
        self.held = torch.from_numpy(held).to(self.device)
        return *(self.held[:1, begin:] for begin in begins), *[None] * (2 - len(begins))

    def enqueue(self, **change):
        """Runs it on the current stream; ``change`` replaces fields of the shape, or arguments."""
        for name, value in change.items():
            setattr(self.described, name, value)
        size = resize.workspace_bytes(self.described, self.path)
        workspace = torch.full((size + 256,), 0xEE, dtype=torch.uint8, device=self.device)
        begin = -workspace.data_ptr() % 256
        result = (self.shape.frames, self.shape.out_rows, self.shape.out_columns, 3)
        chroma = None if self.chroma is None else self.chroma.data_ptr()
        resize.enqueue(
            *(self.described, self.image.data_ptr(), chroma),
            DeviceArray(self.surrounded.data_ptr() + 256, result, "uint8"),
            DeviceArray(workspace.data_ptr() + begin, (size,), "uint8"),
            torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0,
            self.path,
        )

    def result(self):
        """uint8 [F, out_rows, out_columns, 3], once it is certain that nothing beside it was written."""
        found = self.surrounded.cpu().numpy()
        assert (found[:256] == 123).all()
        assert (found[-256:] == 123).all()
        return found[256:-256].reshape(self.shape.frames, self.shape.out_rows, self.shape.out_columns, 3)

    def expected(self):
        """The same by NumPy and Pillow."""
        transpose, *flips = self.shape.turn
        shown = []
        for frame in rgb(self.shape, self.planes):
            frame = frame.transpose(1, 0, 2) if transpose else frame
            frame = np.ascontiguousarray(frame[tuple(slice(None, None, -1 if flip else 1) for flip in flips)])
            size = (self.shape.out_columns, self.shape.out_rows)
            shown.append(np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)))
        return np.stack(shown) if shown else np.empty((0, self.shape.out_rows, self.shape.out_columns, 3), np.uint8)


def noise(shape, rng):
    """Planes of noise, over the whole range of the format."""
    size, most = (shape.frames, shape.rows, shape.columns), 1023 if shape.format == resize.P010 else 255
    if shape.format == resize.RGB24:
        return [rng.integers(0, 256, (*size, 3))]
    half = (shape.frames, -(-shape.rows // 2), -(-shape.columns // 2), 2)
    return [rng.integers(0, most + 1, size), rng.integers(0, most + 1, half)]


def rgb(shape, planes):
    """uint8 RGB [F, rows, columns, 3]: sums of the upper halves of products of 16 bits; chroma is not interpolated."""
    if shape.format == resize.RGB24:
        return planes[0].astype(np.uint8)
    eighths = 2 if shape.format == resize.P010 else 8
    luma, (u, v) = planes[0] * eighths, np.moveaxis(planes[1] * eighths - 1024, -1, 0)
    u, v = (plane.repeat(2, 1).repeat(2, 2)[:, : shape.rows, : shape.columns] for plane in (u, v))
    red, blue = MATRICES[shape.matrix]
    green = 1 - red - blue
    chroma_scale, luma_scale, zero = (1, 1, 0) if shape.full_range else (255 / 224, 255 / 219, 128)

    def times(plane, factor):
        return plane * int(np.rint(8192 * factor)) >> 16

    y, on_red, on_blue = times(luma - zero, luma_scale), 2 * (1 - red) * chroma_scale, 2 * (1 - blue) * chroma_scale
    channels = (
        y + times(v, on_red),
        y + times(u, -on_blue * blue / green) + times(v, -on_red * red / green),
        y + times(u, on_blue),
    )
    return np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)


def check(frames):
    """The result is that of NumPy and Pillow, bit for bit."""
    frames.enqueue()
    np.testing.assert_array_equal(frames.result(), frames.expected())


#: Sizes up and down, odd, of one pixel, equal in one dimension or both.
SIZES = [
    (48, 64, 24, 24),
    (37, 53, 16, 21),
    (9, 11, 23, 17),
    (1, 1, 5, 4),
    (40, 31, 1, 1),
    (17, 16, 17, 9),
    (17, 16, 5, 16),
    (12, 13, 12, 13),
    (16, 90, 33, 7),
    (90, 16, 7, 33),
    (90, 40, 20, 8),
    (90, 40, 20, 3),
]
TURNS = [(transpose, rows, columns) for transpose in (0, 1) for rows in (0, 1) for columns in (0, 1)]
SURFACES = [
    *(Shape(18, 26, 9, 13, format=kind, matrix=m, full_range=r) for kind in (1, 2) for m in MATRICES for r in (0, 1)),
    *(Shape(17, 23, 8, 30, format=kind, frames=2, gap=6, gap_rows=3, turn=(1, 0, 1)) for kind in (1, 2)),
]
