from __future__ import annotations

import weakref
from threading import Semaphore

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tango_plugins import TangoError
from tango_runtime.video import file, sample
from tango_runtime.video import preprocess as preprocessing
from tango_runtime.video.preprocess import preprocess, resize
from tango_runtime.video.rgb import to_rgb
from tests.runtime.video.clips import write

SIZE = 384


def natural(height, width, seed=0):
    """A picture with the 1/f spectrum of natural ones, edges and a little noise: uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])[..., None]
    spectrum = np.fft.rfft2(rng.normal(size=(height, width, 3)), axes=(0, 1)) / (frequency + 1 / width)
    clouds = np.fft.irfft2(spectrum, (height, width), axes=(0, 1))
    picture = 127 + 50 * clouds / clouds.std() + rng.normal(scale=4, size=clouds.shape)
    picture[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 60)
    return picture.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(720, 1280), (480, 270), (384, 384), (100, 37), (1, 1)])
def test_equal_to_the_checkpoints_own_processor(shape):
    rgb = natural(*shape)
    processor = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    kept = processor(Image.fromarray(rgb), do_rescale=False, do_normalize=False)["pixel_values"][0]
    ours = resize(rgb, (SIZE, SIZE))
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, np.asarray(kept).transpose(1, 2, 0))

    normalized = np.asarray(processor(Image.fromarray(rgb))["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_allclose((ours / np.float32(255) - np.float32(0.5)) / np.float32(0.5), normalized, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(720, 1280), (360, 640), (240, 320), (720, 480)])
def test_distance_to_the_tensor_resize_of_transformers_video_processors(shape, dtype):
    """They resize with torch's antialiased bicubic, in fp32 or in uint8, and round.

    Pillow rounds and clips between its two passes too, which shows where bicubic overshoots a hard edge.
    """
    rgb = natural(*shape)
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)[None].to(dtype)
    theirs = torch.nn.functional.interpolate(tensor, (SIZE, SIZE), mode="bicubic", antialias=True)
    theirs = theirs.float().round().clamp(0, 255)[0].permute(1, 2, 0).numpy()
    levels = np.abs(resize(rgb, (SIZE, SIZE)) - theirs)
    assert levels.mean() < 0.25
    assert levels.max() <= 10
    assert (levels > 1).mean() < 0.002


def test_frames_become_one_batch():
    frames = [(0.5, natural(40, 60)), (1.25, natural(30, 20, seed=1))]
    batch = preprocess(iter(frames), (16, 16))
    assert (batch.frames.shape, batch.frames.dtype) == ((2, 16, 16, 3), np.uint8)
    assert (batch.seconds.dtype, batch.seconds.tolist()) == (np.float32, [0.5, 1.25])
    assert (len(batch), batch.aspect) == (2, 1.5)
    np.testing.assert_array_equal(batch.frames[1], resize(frames[1][1], (16, 16)))


def test_height_comes_before_width():
    rgb = natural(40, 60)
    (frame,) = preprocess([(0.0, rgb)], (28, 56)).frames
    theirs = SiglipImageProcessorPil(size={"height": 28, "width": 56}, do_rescale=False, do_normalize=False)
    kept = theirs(Image.fromarray(rgb))["pixel_values"][0]
    np.testing.assert_array_equal(frame, np.asarray(kept).transpose(1, 2, 0))
    assert resize(rgb, (40, 60)) is rgb


def test_a_frame_does_not_wait_for_the_next(monkeypatch):
    resized = Semaphore(0)
    monkeypatch.setattr(preprocessing, "resize", lambda *given: (resize(*given), resized.release())[0])

    def camera():
        for seconds in range(3):
            yield float(seconds), natural(30, 40, seconds)
            assert resized.acquire(timeout=600)

    frames = preprocess(camera(), (16, 16)).frames
    np.testing.assert_array_equal(frames, [resize(natural(30, 40, seed), (16, 16)) for seed in range(3)])


def test_sizes_mix_and_keep_their_order():
    frames = [(float(i), natural(16 + i % 3, 16, seed=i)) for i in range(30)]
    out = np.empty((30, 16, 16, 3), np.uint8)
    batch = preprocess(frames, (16, 16), out)
    assert batch.frames is out
    np.testing.assert_array_equal(out, [resize(rgb, (16, 16)) for _, rgb in frames])


def test_gray_and_transparent_images_of_a_folder(tmp_path):
    rgb = natural(50, 70)
    Image.fromarray(rgb).convert("L").save(tmp_path / "0.png")
    transparent = Image.fromarray(rgb)
    transparent.putalpha(Image.fromarray(rgb[..., 0]))
    transparent.save(tmp_path / "1.png")
    frames = preprocess(sample(tmp_path, 2), (32, 32)).frames
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, do_rescale=False, do_normalize=False)
    for frame, name in zip(frames, ("0.png", "1.png"), strict=True):
        theirs = processor(Image.open(tmp_path / name).convert("RGB"))["pixel_values"][0]
        np.testing.assert_array_equal(frame, np.asarray(theirs).transpose(1, 2, 0))


def test_bad_frames_are_rejected():
    with pytest.raises(TangoError, match="float32"):
        resize(np.zeros((4, 4, 3), np.float32), (8, 8))
    with pytest.raises(TangoError, match="4, 4, 1"):
        resize(np.zeros((4, 4, 1), np.uint8), (8, 8))
    for size in ((0, 8), (8, 0)):
        with pytest.raises(TangoError, match=r"size is [08]×[08]"):
            resize(np.zeros((4, 4, 3), np.uint8), size)
    with pytest.raises(TangoError, match="no frames"):
        preprocess([], (8, 8))


def test_frames_of_a_file_are_resized_as_they_are_decoded(tmp_path, monkeypatch):
    """However many are sampled, few are in memory at their own size."""
    alive, most = [], []

    def count(frame, name):
        rgb = to_rgb(frame, name)
        alive.append(weakref.ref(rgb))
        most.append(sum(ref() is not None for ref in list(alive)))
        return rgb

    monkeypatch.setattr(file, "to_rgb", count)
    path = write(tmp_path / "clip.mp4", times=range(200))
    batch = preprocess(sample(path, 200), (12, 16))
    assert len(most) == 200
    assert max(most) <= preprocessing._AT_ONCE + 16 + 2
    monkeypatch.undo()
    np.testing.assert_array_equal(batch.frames, preprocess(list(sample(path, 200)), (12, 16)).frames)
    np.testing.assert_allclose(batch.seconds, np.arange(200) / 24, rtol=1e-6)
