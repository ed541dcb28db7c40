"""released_models.json, which `tango plan` reads, holds what the export families read from the released checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest

from tango_export.families import FAMILIES, Model
from tango_plugins import op
from tango_runtime.sizing.models import RELEASED_MODELS, ReleasedModel, released_models
from tango_runtime.util.jsonschema import from_json
from tests.export import test_qwen_real_shapes as qwen
from tests.export import test_real_shapes as llava


@dataclass(frozen=True)
class Released:
    """A preset.

    Attributes:
        load: Opens a sparse checkpoint of its shapes, made in a new folder.
        vocabulary: Ids of the released tokenizer; the one beside the sparse checkpoint is smaller.
        rows: Rows of its embedding table, special ones included.
        parameters: All of them.
        tied: Whether the head is stored once, as the table.
    """

    load: Callable[[Path], Model]
    vocabulary: int
    rows: int
    parameters: int
    tied: bool


def of_llava(layout, size, vocabulary):
    shape = layout, size
    load = partial(llava.load, layout=layout, size=size, context=32768)
    return Released(load, vocabulary, llava.ROWS[shape] + 1, llava.PARAMETERS[shape], tied=size == "0.5b")


def of_qwen(size):
    shape = qwen.RELEASED[size]
    return Released(
        lambda folder: qwen.load(folder / "qwen", size, 128000), 151665, shape.vocab, qwen.PARAMETERS[size], shape.tied
    )


#: By the name of a preset's bundle. LLaVA-Video's tokenizer has no <video>.
RELEASED = {
    "llava-ov-0.5b": of_llava("llava-hf", "0.5b", 151648),
    "llava-ov-7b": of_llava("llava-hf", "7b", 151648),
    "llava-video-7b": of_llava("llava-video", "7b", 151647),
    "qwen2.5-vl-3b": of_qwen("3b"),
    "qwen2.5-vl-7b": of_qwen("7b"),
}


@pytest.fixture(scope="module")
def entries():
    text = files("tango_runtime.sizing").joinpath(RELEASED_MODELS).read_text(encoding="utf-8")
    return from_json(dict[str, ReleasedModel], json.loads(text), RELEASED_MODELS)


def test_every_preset_has_an_entry_and_a_checkpoint_to_compare_with(entries):
    presets = {preset.bundle: family.name for family in FAMILIES.values() for preset in family.presets.values()}
    assert {name: entry.family for name, entry in entries.items()} == presets
    assert set(RELEASED) == set(presets)


@pytest.mark.parametrize("name", RELEASED)
def test_an_entry_equals_what_the_family_reads(entries, name, tmp_path):
    released = RELEASED[name]
    model = released.load(tmp_path)
    assert entries[name] == ReleasedModel(
        family=entries[name].family,
        video=model.video,
        vision=model.vision,
        decoder=model.decoder,
        vocabulary=released.vocabulary,
        embedding_rows=released.rows,
        prune=op.attributes(model.params),
        row_ends=model.prompt.row_end is not None,
        video_text=model.prompt.video_text is not None,
    )


@pytest.mark.parametrize("name", RELEASED)
def test_an_entry_has_the_weights_of_the_checkpoint(name):
    model, released = released_models()[name], RELEASED[name]
    weights = model.tower.weights + sum(model.vision.projector) + model.decoder_layers.weights
    weights += model.embedding_rows * model.decoder.hidden_size + (0 if released.tied else model.head_weights)
    # the rest are biases, norms and positions
    assert weights == pytest.approx(released.parameters, rel=0.003)
