"""released_models.json, which `tango plan` reads, holds what the export families read from the released checkpoints."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from tango_export.families import FAMILIES
from tango_plugins import op
from tango_runtime.sizing.models import RELEASED_MODELS, ReleasedModel, released_models
from tango_runtime.util.jsonschema import from_json
from tests.export.test_real_shapes import PARAMETERS, ROWS, load

#: Bundle name of a preset → layout and size of the sparse checkpoint in test_real_shapes.py that has its shapes.
SHAPES = {
    "llava-ov-0.5b": ("llava-hf", "0.5b"),
    "llava-ov-7b": ("llava-hf", "7b"),
    "llava-video-7b": ("llava-video", "7b"),
}
MAX_CONTEXT = 32768
#: Ids of the released tokenizers; those beside the sparse checkpoints are smaller. LLaVA-Video's has no <video>.
VOCABULARY = {"llava-ov-0.5b": 151648, "llava-ov-7b": 151648, "llava-video-7b": 151647}


@pytest.fixture(scope="module")
def entries():
    text = files("tango_runtime.sizing").joinpath(RELEASED_MODELS).read_text(encoding="utf-8")
    return from_json(dict[str, ReleasedModel], json.loads(text), RELEASED_MODELS)


def test_every_preset_has_an_entry_and_a_checkpoint_to_compare_with(entries):
    presets = {preset.bundle: family.name for family in FAMILIES.values() for preset in family.presets.values()}
    assert {name: entry.family for name, entry in entries.items()} == presets
    assert set(SHAPES) == set(presets)


@pytest.mark.parametrize("name", SHAPES)
def test_an_entry_equals_what_the_family_reads(entries, name, tmp_path):
    model = load(tmp_path, *SHAPES[name], MAX_CONTEXT)
    assert entries[name] == ReleasedModel(
        family=entries[name].family,
        video=model.video,
        vision=model.vision,
        decoder=model.decoder,
        vocabulary=VOCABULARY[name],
        embedding_rows=ROWS[SHAPES[name]] + 1,  # the newline's
        prune=op.attributes(model.params),
        row_ends=model.prompt.row_end is not None,
        video_text=model.prompt.video_text is not None,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_an_entry_has_the_weights_of_the_checkpoint(name):
    model, tied = released_models()[name], SHAPES[name][1] == "0.5b"  # a tied head is stored once
    weights = model.tower.weights + sum(model.vision.projector) + model.decoder_layers.weights
    weights += model.embedding_rows * model.decoder.hidden_size + (0 if tied else model.head_weights)
    # the rest are biases, norms and positions
    assert weights == pytest.approx(PARAMETERS[SHAPES[name]], rel=0.003)
