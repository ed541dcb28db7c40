"""The checklist of docs/contributing/add-a-model-family.md: each test is a line of it, and runs for every family."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tango_export.export import Request, export
from tango_export.families import FAMILIES
from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.cli.main import main
from tests.export.test_released_models import RELEASED

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/contributing/add-a-model-family.md"

#: The fixture that makes a small checkpoint of each family, and the layout that it is given.
SMALL = {
    "llava-ov": ("checkpoint", "llava-hf"),
    "llava-video": ("checkpoint", "llava-video"),
    "qwen2.5-vl": ("qwen_checkpoint", "hub"),
}

each = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def small(request: pytest.FixtureRequest) -> Callable[[str], list[Path]]:
    """``small("llava-ov")``: a checkpoint of the family and, where it has one, the source of its salience."""

    def made(name: str) -> list[Path]:
        maker, layout = SMALL[name]
        found = request.getfixturevalue(maker)(layout, outliers=False)
        return [found] if isinstance(found, Path) else list(found)

    return made


def exported(model: str, folders: list[Path], to: Path, **options: str) -> Path:
    salience = str(folders[-1]) if FAMILIES[model].presets[model].salience else None
    return export(Request(model, str(folders[0]), salience, to, **options))


def test_the_page_has_these_lines_and_no_others() -> None:
    lines = re.findall(r"^- \[ \] (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    tests = [each for name, each in vars(sys.modules[__name__]).items() if name.startswith("test_family")]
    assert lines == [test.__doc__ for test in tests]
    assert set(SMALL) == set(FAMILIES)


@each
def test_family_is_named(name):
    """Its own name is one of its presets, and the README or a page of docs/guide/families describes each."""
    presets = FAMILIES[name].presets
    assert name in presets
    pages = [ROOT / "README.md", *(ROOT / "docs/guide/families").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for preset in presets.values():
        assert preset.bundle in text


@each
def test_family_can_be_planned_for(name, capsys):
    """`tango plan` knows the dimensions of every preset, from its released shapes."""
    for preset in FAMILIES[name].presets.values():
        assert preset.bundle in RELEASED
        assert main(["plan", "--model", preset.bundle, "--device", "h200"]) in (0, 1)


@each
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_family_validates(name, small, tmp_path, dtype):
    """A small checkpoint validates in fp16 and in fp32."""
    assert main(["validate", str(exported(name, small(name), tmp_path / "bundle", dtype=dtype))]) == 0


@each
def test_family_answers(name, small, tmp_path):
    """It answers a question, from all tokens and from some."""
    llm = VideoLLM(exported(name, small(name), tmp_path / "bundle", dtype="fp32"), "ort-cpu")
    clip = np.random.default_rng(0).integers(0, 255, (4, 40, 60, 3), dtype=np.uint8)
    whole, pruned = (llm.generate(clip, "What?", frames=4, prune=each, max_new_tokens=3) for each in (False, True))
    assert 0 < pruned.kept < whole.kept == whole.total
    assert pruned.prompt_tokens < whole.prompt_tokens


@each
def test_family_knows_its_tensors(name, small, tmp_path):
    """A tensor that it does not know is rejected by name."""
    original, *source = small(name)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in original.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, "model.another_module.weight": torch.zeros(3)}, copy / "model.safetensors")
    with pytest.raises(TangoError, match=r"model\.another_module\.weight"):
        exported(name, [copy, *source], tmp_path / "bundle")


@each
def test_family_refuses_others(name, small, tmp_path):
    """The checkpoints of the other families are rejected."""
    for other in set(FAMILIES) - {name}:
        with pytest.raises(TangoError):
            exported(name, small(other), tmp_path / "bundle")
