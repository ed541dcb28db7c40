"""The processor's files of a checkpoint."""

from __future__ import annotations

import json

import pytest

from tango_export.families.processor import check_processor
from tango_plugins import TangoError

HALVES = (0.5,) * 3
RELEASED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": None,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}


def write(folder, name, data):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(data))


@pytest.mark.parametrize("data", [RELEASED, {}, {**RELEASED, "image_mean": None, "rescale_factor": 1 / 255}])
def test_a_released_processor_is_accepted(tmp_path, data):
    check_processor(tmp_path, HALVES, HALVES)  # no file
    write(tmp_path, "preprocessor_config.json", data)
    check_processor(tmp_path, HALVES, HALVES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        ("image_mean", 0.5),
        ("image_std", [0.5, 0.5]),
        ("image_std", [0.5, 0.5, "0.5"]),
        ("do_rescale", False),
        ("do_normalize", 0),
        ("resample", 2),
        ("resample", True),
        ("rescale_factor", 1.0),
        ("rescale_factor", float("nan")),
        ("rescale_factor", 10**400),
    ],
)
def test_other_pixels_are_rejected(tmp_path, key, value):
    write(tmp_path, "preprocessor_config.json", {**RELEASED, key: value})
    with pytest.raises(TangoError, match=f"preprocessor_config.json: {key} is "):
        check_processor(tmp_path, HALVES, HALVES)


def test_the_video_processor_comes_before_that_of_images(tmp_path):
    wrong = {**RELEASED, "resample": 0}
    write(tmp_path, "preprocessor_config.json", wrong)
    write(tmp_path, "video_processor/preprocessor_config.json", RELEASED)
    check_processor(tmp_path, HALVES, HALVES)
    write(tmp_path, "video_preprocessor_config.json", wrong)
    with pytest.raises(TangoError, match=r"video_preprocessor_config\.json: resample is 0"):
        check_processor(tmp_path, HALVES, HALVES)
    write(tmp_path, "processor_config.json", {"video_processor": RELEASED})
    check_processor(tmp_path, HALVES, HALVES)
    write(tmp_path, "processor_config.json", {"processor_class": "LlavaOnevisionProcessor"})
    with pytest.raises(TangoError, match=r"video_preprocessor_config\.json: resample is 0"):
        check_processor(tmp_path, HALVES, HALVES)


def test_an_export_looks_at_it(checkpoint, tmp_path):
    import shutil

    from tango_export.export import Request, export

    llava, siglip = checkpoint()
    folder = shutil.copytree(llava, tmp_path / "llava")
    write(folder, "video_preprocessor_config.json", {**RELEASED, "image_std": [1, 1, 1]})
    with pytest.raises(TangoError, match="image_std"):
        export(Request("llava-ov", str(folder), str(siglip), tmp_path / "bundle", dtype="fp16"))
    assert not (tmp_path / "bundle").exists()
