"""Qwen2.5-VL's graphs against a model in NumPy: any frame size, any grid, fp32 and fp16."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from examples.make_qwen_checkpoint import Shape
from tango_export.export import Request, export
from tango_export.graph import PORTABLE, Definition, build
from tango_export.models import qwen_vision
from tango_runtime.bundle import Bundle
from tests.export.edits import assert_close, embed, run
from tests.export.test_graphs import NUMBERS, constants, proto
from tests.fakes.qwen25vl import Qwen25VL, positions

#: Steps, height and width: whole windows, windows cut on either side, rows, columns, and one token.
FRAMES = [
    (1, 28, 28),
    (2, 28, 308),
    (1, 308, 28),
    (3, 112, 112),
    (2, 140, 196),
    (1, 168, 280),
    (2, 252, 84),
    (1, 224, 336),
    (1, 560, 1008),
]


def steps(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 2, height, width, 3), dtype=np.uint8)


def checkerboard(height, width, edge=56):
    """Squares of black and white, which are said to break the tower in fp16 (ollama/ollama#18070)."""
    row, column = np.indices((height, width)) // edge
    frame = np.repeat((255 * ((row + column) % 2)).astype(np.uint8)[..., None], 3, -1)
    return np.stack((frame, frame))[None]


FP16_FRAMES = [steps(1, 140, 196), checkerboard(168, 224), np.full((1, 2, 56, 84, 3), 255, np.uint8)]


def rounded(graph, frames):
    """What a graph gives where every tensor has its own type, as on a GPU: ONNX Runtime's CPU provider keeps fp32."""
    return ReferenceEvaluator(onnx.load(graph)).run(None, {"frames": frames})


@pytest.fixture(scope="module")
def model(qwen_checkpoint):
    return Qwen25VL(qwen_checkpoint(outliers=False))


@pytest.mark.parametrize("shape", FRAMES, ids=str)
def test_features_and_salience_are_numpys(qwen_bundle, model, shape):
    frames = steps(*shape)
    features, salience = run(qwen_bundle(precision="fp32", outliers=False), "vision", frames=frames)
    wanted, shares = model.vision(frames.reshape(-1, *frames.shape[2:]))
    assert_close(features, wanted, 1e-5)
    assert_close(salience, shares, 1e-5)
    np.testing.assert_allclose(salience.sum(-1), 1, rtol=1e-5)


def test_steps_do_not_see_each_other(qwen_bundle):
    frames = steps(3, 84, 112)
    together = run(qwen_bundle(precision="fp32"), "vision", frames=frames)
    for i in range(3):
        one = run(qwen_bundle(precision="fp32"), "vision", frames=frames[i : i + 1])
        for whole, alone in zip(together, one, strict=True):
            assert_close(alone[0], whole[i], 1e-5)


def test_a_window_hides_what_is_outside(qwen_bundle):
    """A tower whose layers all have windows, but the last, is not what whole layers give; and where the frame is one
    window, it is."""
    windows, whole = (qwen_bundle(precision="fp32", whole_layers=layers) for layers in ((3,), (0, 1, 2, 3)))
    for size, same in (((112, 112), True), ((112, 140), False), ((140, 112), False)):
        (found, _), (wanted, _) = (run(folder, "vision", frames=steps(1, *size)) for folder in (windows, whole))
        assert (np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()) == same


@pytest.mark.parametrize("frames", FP16_FRAMES, ids=lambda frames: str(frames.shape[2:4]))
@pytest.mark.parametrize("outliers", [True, False])
def test_fp16_holds_the_tower(qwen_bundle, qwen_checkpoint, frames, outliers):
    """With outliers the last MLP but one adds 2e5 to a channel, which fp16 does not hold."""
    features, salience = rounded(qwen_bundle(outliers=outliers) / "vision.onnx", frames)
    wanted, shares = Qwen25VL(qwen_checkpoint(outliers=outliers)).vision(frames.reshape(-1, *frames.shape[2:]))
    assert_close(features.astype(np.float32), wanted, 2e-2)
    assert_close(salience, shares, 5e-2)


def test_a_tower_without_wide_layers_overflows(qwen_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(qwen_vision, "_WIDE", 2.0)
    naive = export(Request("qwen2.5-vl", str(qwen_checkpoint()), output=tmp_path / "naive"))
    with np.errstate(all="ignore"):
        assert not np.isfinite(rounded(naive / "vision.onnx", FP16_FRAMES[0])[0]).all()


def test_which_layers_are_wide():
    """From layer 15 of 32 on the MLP is fp32 from its product on, and the residual stream is fp32 throughout."""
    c = qwen_vision.QwenVisionConfig(32, 64, 4, 80, 48, 14, 2, 2, 112, (7, 15, 23, 31))
    graph = build(Definition("vision", lambda g: qwen_vision.vision(g, c), {}), PORTABLE, "float16")
    casts = {node.name for node in graph.nodes if node.op_type == "Cast"}
    wide = [i for i in range(32) if f"tower.blocks.{i}.mlp.down_proj.weight.fp32" in casts]
    assert wide == list(range(15, 32))
    assert not any(name.startswith("tower.blocks") and name.endswith(("norm1.fp32", "norm2.fp32")) for name in casts)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grid", [(1, 1, 1), (4, 5, 7), (8, 9, 3)], ids=str)
def test_a_pruned_prompt_and_steps_are_numpys(qwen_bundle, qwen_checkpoint, tied, grid):
    options = {"tied": tied, "outliers": False}
    folder, reference = qwen_bundle(precision="fp32", **options), Qwen25VL(qwen_checkpoint(**options))
    before, after = 7, 5
    rng = np.random.default_rng(0)
    total = before + int(np.prod(grid)) + after
    kept = before + np.sort(rng.choice(int(np.prod(grid)), max(1, int(np.prod(grid)) // 5), replace=False))
    keep = np.concatenate((np.arange(before), kept, np.arange(total - after, total)))
    pos = positions(before, grid, after, 3.0)
    x = rng.normal(size=(len(keep), 64)).astype(np.float32)
    wanted, cache = reference.logits(x.astype(np.float64), pos[:, keep])
    held = DecoderOnThreeAxes(folder, len(keep) + 4)
    vocabulary = Bundle.load(folder).manifest.prompt.vocabulary
    assert_close(held.step(x, pos[:, keep]), wanted[:vocabulary], 1e-5)
    for i in range(3):
        place = np.full((3, 1), pos.max() + 1 + i)
        row = embed(folder, np.array([20 + i]))
        wanted, cache = reference.logits(row.astype(np.float64), place, cache)
        assert_close(held.step(row, place), wanted[:vocabulary], 1e-5)


class DecoderOnThreeAxes:
    """The decoder graph and its cache of fixed capacity, which holds garbage where it is not filled."""

    def __init__(self, bundle, capacity):
        self.bundle, self.length = bundle, 0
        self.cache = {
            t.name: np.full((t.shape[0], capacity, t.shape[2]), 1e3, t.dtype)
            for t in Bundle.load(bundle).manifest.graphs["decoder"].inputs[3:]
        }

    def step(self, embeddings, rotary):
        end = self.length + len(embeddings)
        feeds = {"embeddings": embeddings, "positions": np.arange(self.length, end), "rotary": rotary}
        logits, *rows = run(self.bundle, "decoder", **feeds, **self.cache)
        for cached, new in zip(self.cache.values(), rows, strict=True):
            cached[:, self.length : end] = new
        self.length = end
        return logits


# What TensorRT's parser wants


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("graph", ["vision", "embed", "decoder"])
def test_tensorrt_8_finds_numbers_where_it_wants_them(qwen_bundle, graph, precision):
    folder = qwen_bundle(precision=precision)
    known, nodes = constants(folder, graph), proto(folder, graph).graph.node
    for node in nodes:
        assert node.op_type not in ("Constant", "Mod")
        assert not known.keys() >= set(node.input), f"{node.name} could be computed now"
        assert all(node.input[i] in known for i in NUMBERS.get(node.op_type, ())), node.name


def test_no_tensor_of_the_tower_has_more_axes_than_tensorrt_takes(qwen_bundle):
    inferred = onnx.shape_inference.infer_shapes(proto(qwen_bundle(), "vision"), strict_mode=True).graph
    axes = [len(value.type.tensor_type.shape.dim) for value in (*inferred.value_info, *inferred.input)]
    assert 5 <= max(axes) <= 8
    assert {o.domain: o.version for o in proto(qwen_bundle(), "vision").opset_import} == {"": 17}


def test_uint8_is_read_by_a_cast_alone(qwen_bundle):
    readers = [node.op_type for node in proto(qwen_bundle(), "vision").graph.node if "frames" in node.input]
    assert readers == ["Cast"]


def test_no_cast_is_idle(qwen_bundle):
    for graph in ("vision", "embed", "decoder"):
        inferred = onnx.shape_inference.infer_shapes(proto(qwen_bundle(precision="fp32"), graph)).graph
        types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input)}
        casts = [n for n in inferred.node if n.op_type == "Cast" and n.output[0] != "logits"]
        assert not [n.name for n in casts if types.get(n.input[0]) == n.attribute[0].i]


def test_shapes_are_the_checkpoints():
    assert Shape().whole_layers == (1, 3)  # windows in the others, and the last without: what the tests above rely on
