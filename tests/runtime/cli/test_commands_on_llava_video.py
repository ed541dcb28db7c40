"""Every command on a LLaVA-Video bundle."""

from __future__ import annotations

import json
import re

import pytest

from tango_calibration.evaluation.results import read
from tango_plugins import op
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main
from tango_runtime.engines import BuildOptions, Target, plan_engines
from tango_runtime.sizing import memory

SHAPE = {"image": 126, "outliers": False}  # 9×9 patches, 4×4 tokens


@pytest.fixture(scope="module")
def folder(bundle):
    return str(bundle("llava-video", **SHAPE))


def out_of(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr()


def test_run_says_how_many_row_ends_there_are(folder, clip, tmp_path, capsys):
    written = tmp_path / "kept.html"
    options = ["--frames", "4", "--max-new-tokens", "2", "--report", str(written)]
    told = out_of(capsys, "run", folder, str(clip), "What?", *options).err
    assert " / 64 video tokens (" in told
    assert " row ends\n" in told
    assert " row ends and " in written.read_text()
    told = out_of(capsys, "run", folder, str(clip), "What?", *options, "--no-prune").err
    assert "kept 64 / 64 video tokens (100.0%), 16 row ends" in told


def test_inspect(folder, capsys):
    assert "llava-video, float16" in out_of(capsys, "inspect", folder, "--verify").out


def test_bench(folder, capsys):
    options = ["--frames", "4", "--repeats", "1", "--warm-up", "1", "--decode-tokens", "1", "--json", "-"]
    cases = {case["prune"]: case for case in json.loads(out_of(capsys, "bench", folder, *options).out)["cases"]}
    assert cases[False]["kept"] == 64
    assert 0 < cases[True]["kept"] < 64
    assert cases[False]["prompt_tokens"] > 64 + 16


def test_evaluate(folder, tmp_path, capsys):
    options = ["--videos", "2", "--questions", "2", "--frames", "8", "--method", "all", "none", "random", "tango"]
    out_of(capsys, "evaluate", folder, *options, "--max-new-tokens", "2", "--output", str(tmp_path / "results"))
    records = read(tmp_path / "results" / "results.json")
    counts = {(record.trial.method, record.kept, record.total) for record in records}
    assert counts >= {("all", 128, 128), ("none", 0, 128)}


def test_calibrate(folder, clip, tmp_path, capsys):
    options = ["--clips", "synthetic", "--videos", "4", "--frames", "8", "--vision", "int8", "--decoder", "int8"]
    out_of(capsys, "calibrate", folder, *options, "--output", str(tmp_path / "int8"))
    assert " row ends\n" in out_of(capsys, "run", str(tmp_path / "int8"), str(clip), "What?", "--frames", "4").err
    assert Bundle.load(tmp_path / "int8").manifest.prompt == Bundle.load(folder).manifest.prompt


def test_plan_counts_row_ends_and_the_times_of_frames(capsys):
    arguments = ["plan", "--model", "llava-video-7b", "--device", "h200", "--json", "-"]
    pruned = json.loads(out_of(capsys, *arguments).out)["workload"]
    assert (pruned["tokens"], pruned["kept"]) == (64 * 169, 1082 + 64 * 13)
    assert pruned["prompt"] == pruned["kept"] + 45 + 64 * 8 + memory.TYPICAL_TEXT_TOKENS
    whole = json.loads(out_of(capsys, *arguments, "--no-prune").out)["workload"]
    assert whole["kept"] == 64 * 13 * 14


def test_engines_are_planned_for_row_ends_and_the_times_of_frames(folder):
    loaded = Bundle.load(folder)
    (decoder,) = plan_engines(loaded, Target("8.6.0", "9.0", "H200"), BuildOptions(), ["decoder"])
    most = decoder.spec.profiles[0]["positions"][2][0]
    kept = op.capacity(64, 16, loaded.manifest.params)
    assert most == -(-(kept + min(kept, 64 * 4) + 45 + 64 * 8 + memory.MAX_TEXT_TOKENS) // 64) * 64


@pytest.fixture(scope="module")
def half(responsive_checkpoint):
    """A bundle whose upper half of layers sees half of the video."""
    return str(responsive_checkpoint("llava-video", image=126, layers=4, inner=(2, 0.5), dtype="fp16")[1])


def test_commands_say_what_upper_layers_see(half, clip, tmp_path, capsys):
    written = tmp_path / "kept.html"
    told = out_of(capsys, "run", half, str(clip), "What?", "--max-new-tokens", "2", "--report", str(written)).err
    rows, thinned = (int(number) for number in re.search(r"decoder: (\d+) of these (\d+) positions", told).groups())
    assert rows == round(thinned / 2)
    assert " in upper layers" in written.read_text()
    assert "0.5 of the video from layer 2 on" in out_of(capsys, "inspect", half).out
    assert "upper layers" not in out_of(capsys, "run", half, str(clip), "What?", "--no-prune").err


def test_plan_counts_what_upper_layers_see(half, capsys):
    arguments = ["plan", "--model", half, "--device", "h200"]
    assert "of them in the decoder's upper layers; context" in out_of(capsys, *arguments).out
    planned = json.loads(out_of(capsys, *arguments, "--json", "-").out)
    assert planned["workload"]["thinned"] == round(planned["workload"]["kept"] / 2)
    params = Bundle.load(half).manifest.params
    assert planned["workload"]["kept"] == op.exact_count(4, 16, params) + min(op.exact_count(4, 16, params), 16)
    whole = json.loads(out_of(capsys, *arguments, "--no-prune", "--json", "-").out)
    assert "thinned" not in whole["workload"] or whole["workload"]["thinned"] is None


def test_evaluate_and_bench_a_decoder_that_drops_tokens(half, tmp_path, capsys):
    options = ["--videos", "2", "--questions", "2", "--frames", "8", "--method", "all", "none", "tango"]
    out_of(capsys, "evaluate", half, *options, "--max-new-tokens", "2", "--output", str(tmp_path / "results"))
    assert {record.kept for record in read(tmp_path / "results" / "results.json")} >= {0, 128}
    options = ["--frames", "4", "--repeats", "1", "--warm-up", "1", "--decode-tokens", "1", "--json", "-"]
    assert len(json.loads(out_of(capsys, "bench", half, *options).out)["cases"]) == 2
