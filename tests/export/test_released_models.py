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

#: Bundle name of a preset → size of the sparse checkpoint in test_real_shapes.py that has its shapes.
SIZES = {"llava-ov-0.5b": "0.5b", "llava-ov-7b": "7b"}
LAYOUT = "llava-hf"
MAX_CONTEXT = 32768
#: Ids of the released tokenizer; the one beside the sparse checkpoints is smaller.
VOCABULARY = 151648


@pytest.fixture(scope="module")
def entries():
    text = files("tango_runtime.sizing").joinpath(RELEASED_MODELS).read_text(encoding="utf-8")
    return from_json(dict[str, ReleasedModel], json.loads(text), RELEASED_MODELS)


def test_every_preset_has_an_entry_and_a_checkpoint_to_compare_with(entries):
    presets = {preset.bundle: family.name for family in FAMILIES.values() for preset in family.presets.values()}
    assert {name: entry.family for name, entry in entries.items()} == presets
    assert set(SIZES) == set(presets)


@pytest.mark.parametrize("name", SIZES)
def test_an_entry_equals_what_the_family_reads(entries, name, tmp_path):
    model = load(tmp_path, LAYOUT, SIZES[name], MAX_CONTEXT)
    assert entries[name] == ReleasedModel(
        family=entries[name].family,
        video=model.video,
        vision=model.vision,
        decoder=model.decoder,
        vocabulary=VOCABULARY,
        embedding_rows=ROWS[LAYOUT, SIZES[name]] + len(model.prompt.after_video),
        prune=op.attributes(model.params),
    )


@pytest.mark.parametrize("name", SIZES)
def test_an_entry_has_the_weights_of_the_checkpoint(name):
    model, tied = released_models()[name], SIZES[name] == "0.5b"  # a tied head is stored once
    weights = model.tower.weights + sum(model.vision.projector) + model.decoder_layers.weights
    weights += model.embedding_rows * model.decoder.hidden_size + (0 if tied else model.head_weights)
    # the rest are biases, norms and positions
    assert weights == pytest.approx(PARAMETERS[LAYOUT, SIZES[name]], rel=0.003)
