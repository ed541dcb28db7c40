"""fp16 that stays finite on weights that overflow it, and a verdict that sees damage."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

from tango_runtime.cli.main import main
from tests.export.edits import Decoder, edit_json, embed, frames, logits, original, run

IDS = np.random.default_rng(4).integers(0, 300, 30)


@torch.no_grad()
def test_naive_fp16_attention_overflows_on_the_shared_checkpoint(checkpoint):
    stored = load_file(checkpoint()[0] / "model.safetensors")
    weights = {name.removeprefix("language_model.model."): weight for name, weight in stored.items()}
    x = weights["embed_tokens.weight"][IDS].float()
    x = torch.nn.functional.rms_norm(x, x.shape[-1:], weights["layers.0.input_layernorm.weight"].float()).half()
    query, key = (
        x @ weights[f"layers.0.self_attn.{n}_proj.weight"].T + weights[f"layers.0.self_attn.{n}_proj.bias"]
        for n in "qk"
    )
    scores = query[:, :16] @ key[:, :16].T * 16**-0.5
    assert not scores.isfinite().any()


@torch.no_grad()
def test_transformers_eager_fp16_gives_nan_on_the_shared_checkpoint(checkpoint):
    naive = original(checkpoint()[0], dtype=torch.float16, attn_implementation="eager")
    assert naive(input_ids=torch.from_numpy(IDS)[None]).logits.isnan().any()


def test_fp16_graphs_stay_finite(bundle):
    assert all(np.isfinite(output).all() for output in run(bundle(), "vision", frames=frames(2)))
    decoder = Decoder(bundle(), 31)
    assert np.isfinite(decoder.step(embed(bundle(), IDS))).all()
    assert all(np.isfinite(rows).all() for rows in decoder.cache.values())


@torch.no_grad()
def test_fp16_logits_are_those_of_fp32(checkpoint, bundle):
    expected = original(checkpoint()[0])(input_ids=torch.from_numpy(IDS)[None]).logits[0, -1].numpy()
    found = logits(bundle(), IDS)
    expected = expected[: len(found)]
    assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > 0.9999


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_sound_bundle_passes(bundle, capsys, precision):
    assert main(["validate", str(bundle(precision=precision))]) == 0
    table = capsys.readouterr().out
    assert "FAILED" not in table
    assert all(name in table for name in ("features", "salience", "embeddings", "logits at 51", "attributes", "tokens"))


DAMAGE = [
    ("vision", "projector.linear_2.weight", 1.05),
    ("vision", "salience.probe", -1),
    ("vision", "tower.encoder.layers.1.self_attn.qkv_proj.weight", -1),
    ("embed", "table", 1.05),
    ("decoder", "lm_head.weight", 1.05),
    ("decoder", "layers.0.self_attn.qkv_proj.weight", -1),
    ("decoder", "layers.0.mlp.down_proj.weight", -1),
    ("decoder", "rotary.inv_freq", 1.05),
    ("decoder", "norm.weight", 0.0),
    ("decoder", "norm.weight", float("nan")),
]


@pytest.mark.parametrize(("graph", "weight", "factor"), DAMAGE)
def test_a_damaged_bundle_fails(bundle, tmp_path, capsys, graph, weight, factor):
    broken = shutil.copytree(bundle(), tmp_path / "broken")
    scale(broken, graph, weight, factor)
    assert main(["validate", str(broken)]) == 1
    table = capsys.readouterr().out.splitlines()
    failed = [line.split()[0] for line in table if line.endswith("FAILED")]
    assert set(failed) == {graph}


def scale(folder, graph, weight, factor):
    """Multiplies one tensor of a data file."""
    proto = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.name == weight)
    where = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    data = np.memmap(folder / where["location"], dtype, "r+", int(where["offset"]), (int(np.prod(tensor.dims)),))
    data *= dtype.type(factor)
    data.flush()


def test_a_prune_node_of_other_parameters_fails(bundle, tmp_path, capsys):
    broken = shutil.copytree(bundle(), tmp_path / "broken")
    model = onnx.load(broken / "prune.onnx")
    next(a for a in model.graph.node[0].attribute if a.name == "retention_ratio").i = 1001
    onnx.save(model, broken / "prune.onnx")
    assert main(["validate", str(broken)]) == 1
    assert "prune attributes 0.000000 0.00000 FAILED" in " ".join(capsys.readouterr().out.split())


def test_a_prune_function_that_computes_something_else_fails(bundle, tmp_path, capsys):
    broken = shutil.copytree(bundle(), tmp_path / "broken")
    model = onnx.load(broken / "prune.onnx")
    largest = next(function for function in model.functions if function.name == "Largest")
    next(a for node in largest.node for a in node.attribute if a.name == "largest").i = 0
    onnx.save(model, broken / "prune.onnx")
    assert main(["validate", str(broken)]) == 1
    table = " ".join(capsys.readouterr().out.split())
    assert "prune tokens 0.000000 0.00000 FAILED" in table
    assert "prune attributes 1.000000 1.00000" in table


def test_export_ends_with_the_verdict(checkpoint, tmp_path, monkeypatch, capsys):
    llava, siglip = checkpoint()
    arguments = ["export", "--checkpoint", str(llava), "--salience-checkpoint", str(siglip), "--output"]
    assert main([*arguments, str(tmp_path / "sound")]) == 0
    assert "18 of 18 within the limits" in capsys.readouterr().out
    monkeypatch.setattr("tango_export.validate.MIN_COSINE", 1.1)
    assert main([*arguments, str(tmp_path / "out")]) == 1


def test_the_original_can_be_named(bundle, checkpoint, tmp_path, capsys):
    moved = [shutil.copytree(folder, tmp_path / folder.name) for folder in checkpoint()]
    named = ["--checkpoint", str(moved[0]), "--salience-checkpoint", str(moved[1])]
    assert main(["validate", str(bundle()), *named]) == 0
    assert main(["validate", str(bundle()), "--checkpoint", str(tmp_path / "away")]) == 2
    assert "away" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [{"width": 96, "heads": 6}, {"image": 132}])
def test_another_original_is_refused(bundle, checkpoint, capsys, shape):
    llava, siglip = checkpoint(**shape)
    assert main(["validate", str(bundle()), "--checkpoint", str(llava), "--salience-checkpoint", str(siglip)]) == 2
    assert f"was not made from {llava}" in capsys.readouterr().err


@pytest.mark.parametrize("graph", ["vision", "prune", "embed", "decoder"])
def test_a_graph_that_is_none_is_named(bundle, tmp_path, capsys, graph):
    broken = shutil.copytree(bundle(), tmp_path / "broken")
    file = broken / f"{graph}.onnx"
    file.write_bytes(b"x" * file.stat().st_size)
    assert main(["validate", str(broken)]) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert f"{graph}.onnx" in error
    assert "--verify" in hint


def test_a_graph_of_other_tensors_is_an_error(bundle, tmp_path, capsys):
    broken = shutil.copytree(bundle(), tmp_path / "broken")
    file = broken / "embed.onnx"
    file.write_bytes((broken / "prune.onnx").read_bytes())
    edit_json(broken / "bundle.json", lambda data: data["files"]["embed.onnx"].update(size=file.stat().st_size))
    assert main(["validate", str(broken)]) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert "error: ONNX Runtime cannot run the graphs: Required inputs" in error
    assert "--verify" in hint


def test_no_bundle(tmp_path, capsys):
    assert main(["validate", str(tmp_path / "away")]) == 2
    assert str(tmp_path / "away") in capsys.readouterr().err


def test_an_export_without_torch_says_what_was_left_out(checkpoint, tmp_path):
    llava, siglip = checkpoint()
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'onnxruntime')));"
        "from tango_runtime.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--checkpoint", llava, "--salience-checkpoint", siglip, "--output", tmp_path / "out"]
    command = [sys.executable, "-c", code, "export", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "left out: it needs torch and transformers and onnxruntime" in done.stderr.splitlines()[-1]
    assert "pip install 'tango-edge[validate]'" in done.stderr.splitlines()[-1]
    done = subprocess.run(
        [*command[:3], "validate", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'tango-edge[validate]'" in done.stderr.splitlines()[-1]
