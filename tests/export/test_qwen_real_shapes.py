"""The released Qwen2.5-VL checkpoints in full size: names, shapes and counts, in sparse files that take no disk."""

from __future__ import annotations

import json
import math

import pytest

from examples.make_qwen_checkpoint import PREFIXES, RELEASED, config, make_qwen_tokenizer, tensor_shapes
from tango_export.families import FAMILIES
from tango_export.graph import PORTABLE, build
from tests.export.sparse import write_shards

#: The released files, two bytes an element: their number of tensors, and what their sizes add up to.
TENSORS = {"3b": 824, "7b": 729}
PARAMETERS = {"3b": 3_754_622_976, "7b": 8_292_166_656}
TOWER = {"3b": 668_684_288, "7b": 676_550_144}
SHARDS = {"3b": 2, "7b": 5}


def stored_shapes(size):
    shape, prefixes = RELEASED[size], PREFIXES["hub"]
    shapes = tensor_shapes(shape, shape.vocab)
    prefix = {name: next(p for p in prefixes if name.startswith(p)) for name in shapes}
    return {prefixes[prefix[name]] + name.removeprefix(prefix[name]): each for name, each in shapes.items()}


def load(folder, size, context=8192):
    folder.mkdir()
    write_shards(folder, stored_shapes(size), "BF16", SHARDS[size])
    tokenizer = make_qwen_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    released = config(RELEASED[size], RELEASED[size].vocab, tokenizer)
    (folder / "config.json").write_text(json.dumps(released))
    return FAMILIES["qwen2.5-vl"].load({"checkpoint": folder}, context)


@pytest.mark.parametrize("size", RELEASED)
def test_released_checkpoints_are_accepted(tmp_path, size):
    shapes = stored_shapes(size)
    assert len(shapes) == TENSORS[size]
    assert sum(map(math.prod, shapes.values())) == PARAMETERS[size]
    assert sum(math.prod(s) for name, s in shapes.items() if name.startswith("visual.")) == TOWER[size]
    model = load(tmp_path / "qwen", size)
    wanted = (36, 2048, 2, 128) if size == "3b" else (28, 3584, 4, 128)
    decoder = model.decoder
    assert (decoder.layers, decoder.hidden_size, decoder.kv_heads, decoder.head_dim) == wanted
    assert (decoder.rotary.sections, decoder.rotary.positions) == ((16, 24, 24), 128000)
    assert (model.video.size, model.video.tokens_per_frame, model.params.grid) == ((560, 1008), 720, (20, 36))
    assert (model.vision.patches, model.vision.global_layers, model.vision.window) == (2880, 4, 64)
    # fp16, but for norms, angles and the biases of wide layers; a tied head is written twice
    graphs = {d.name: build(d, PORTABLE, "float16") for d in model.definitions}
    written = sum(weight.bytes for graph in graphs.values() for weight in graph.weights) / 2
    rows = RELEASED[size].vocab * decoder.hidden_size
    assert written == pytest.approx(PARAMETERS[size] + (rows if size == "3b" else 0), rel=1e-3)
    wide = [node.name for node in graphs["vision"].nodes if node.name.endswith("down_proj.weight.fp32")]
    assert wide == [f"tower.blocks.{i}.mlp.down_proj.weight.fp32" for i in range(15, 32)]
