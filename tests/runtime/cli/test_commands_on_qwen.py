"""Every command on a Qwen2.5-VL bundle."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tango_calibration.evaluation.results import read
from tango_plugins import TangoError, op
from tango_runtime import VideoLLM
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main
from tango_runtime.engines import BuildOptions, Target, plan_engines
from tango_runtime.sizing import memory
from tango_runtime.sizing.devices import find_device
from tango_runtime.sizing.estimate import SizingOptions, estimate
from tango_runtime.sizing.models import find_model

#: The clip of the tests is 640×360: with so many pixels a frame is 84×140, 3×5 tokens.
PIXELS = str(18 * 28 * 28)


@pytest.fixture(scope="module")
def folder(qwen_bundle):
    return str(qwen_bundle(outliers=False))


def out_of(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr()


def test_run_takes_a_size_or_a_number_of_pixels(folder, clip, capsys):
    options = ["--frames", "6", "--max-new-tokens", "2", "--no-prune"]
    for size, tokens in ((["--frame", "84x112"], 3 * 3 * 4), (["--max-pixels", PIXELS], 3 * 3 * 5)):
        told = out_of(capsys, "run", folder, str(clip), "What?", *options, *size).err
        assert f"kept {tokens} / {tokens} video tokens (100.0%)" in told
    assert main(["run", folder, str(clip), "What?", "--frame", "90x112"]) == 2
    assert "hint: the nearest is 84x112" in capsys.readouterr().err
    assert main(["run", folder, str(clip), "What?", "--frame", "big"]) == 2
    assert "'big' is not a height and a width, as in 336x588" in capsys.readouterr().err


def test_a_report_shows_the_first_frame_of_each_pair(folder, clip, tmp_path, capsys):
    page, picture = tmp_path / "kept.html", tmp_path / "kept.png"
    options = ["--frames", "5", "--frame", "84x140", "--max-new-tokens", "2", "--report", str(page)]
    out_of(capsys, "run", folder, str(clip), "What?", *options, "--picture", str(picture))
    text = page.read_text()
    assert len(re.findall(r'src="data:image/jpeg', text)) == 3  # of five frames
    grid = json.loads(re.search(r'"grid": (\[[^]]*\])', text)[1])
    assert grid == [3, 5]
    width, height = Image.open(picture).size
    assert (width, height > 200) == (1600, True)


def test_a_report_has_the_times_of_the_frames_that_it_shows(folder):
    llm = VideoLLM(folder, "ort-cpu")
    frames = np.random.default_rng(0).integers(0, 255, (9, 84, 140, 3), dtype=np.uint8)
    answer = llm.generate(frames, "What?", frames=5, frame_size=(84, 140), fps=0.5, max_new_tokens=1)
    report = llm.report(answer, "noise")
    assert report.seconds.tolist() == [0.0, 8.0, 16.0]
    np.testing.assert_array_equal(report.frames, frames[[0, 4, 8]])
    assert (report.grid, report.salience.shape) == ((3, 5), (3, 15))


def test_chat(folder, clip, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\nAnd then?\n"))
    options = ["--frames", "4", "--frame", "84x112", "--max-new-tokens", "2", "--no-prune"]
    assert "kept 24 / 24 video tokens" in out_of(capsys, "chat", folder, str(clip), *options).err


def test_inspect(folder, capsys):
    told = out_of(capsys, "inspect", folder, "--verify").out
    assert "32 frames of up to 602112 pixels in multiples of 28, by default 1008x560: 720 tokens every 2" in told
    assert "rotary int64 [3, N]" in told


def test_bench(folder, capsys):
    options = ["--frames", "4", "--frame", "84x112", "--source-size", "128x96", "--json", "-"]
    options += ["--repeats", "1", "--warm-up", "1", "--decode-tokens", "1", "--cold-start"]
    found = json.loads(out_of(capsys, "bench", folder, *options).out)
    cases = {case["prune"]: case for case in found["cases"]}
    assert cases[False]["kept"] == cases[False]["total"] == cases[True]["total"] == 24
    assert 0 < cases[True]["kept"] < 24
    assert found["setting"]["frame_size"] == [84, 112]
    assert len(found["cold_starts"]) == 3


def test_evaluate(folder, tmp_path, capsys):
    options = ["--videos", "2", "--questions", "2", "--frames", "8", "--method", "all", "none", "random", "tango"]
    options += ["--max-pixels", PIXELS, "--max-new-tokens", "2", "--output", str(tmp_path / "results")]
    out_of(capsys, "evaluate", folder, *options)
    results = tmp_path / "results" / "results.json"
    counts = {(record.trial.method, record.kept, record.total) for record in read(results)}
    assert counts >= {("all", 4 * 16, 4 * 16), ("none", 0, 4 * 16)}  # clips are square: 4×4 tokens a pair
    conditions = json.loads(results.read_text())["conditions"]
    assert conditions["frame size"] == f"by aspect ratio, at most {PIXELS} pixels"


def test_evaluate_gives_the_pipelines_answers(folder, tmp_path, capsys):
    """A folder of one video, at the size that it has within the budget."""
    frames = tmp_path / "videos" / "noise"
    frames.mkdir(parents=True)
    for i, frame in enumerate(np.random.default_rng(0).integers(0, 255, (8, 60, 90, 3), dtype=np.uint8)):
        Image.fromarray(frame).save(frames / f"{i}.png")
    line = {"video": "noise", "question": "What happens?", "answer": "nothing"}
    (tmp_path / "videos" / "questions.jsonl").write_text(json.dumps(line))
    options = ["--data", str(tmp_path / "videos"), "--frames", "8", "--method", "tango", "--retention-ratio", "0.2"]
    options += ["--max-pixels", PIXELS, "--max-new-tokens", "6", "--output", str(tmp_path / "results")]
    out_of(capsys, "evaluate", folder, *options)
    found = {record.trial.method: record.answer for record in read(tmp_path / "results" / "results.json")}
    llm, asked = VideoLLM(folder, "ort-cpu"), {"frames": 8, "max_pixels": int(PIXELS), "max_new_tokens": 6}
    assert found["all"] == llm.generate(frames, line["question"], prune=False, **asked).text.strip()
    assert found["tango"] == llm.generate(frames, line["question"], retention_ratio=0.2, **asked).text.strip()


@pytest.mark.parametrize(("vision", "decoder"), [("int8", "int4"), ("fp16", "int8")])
def test_calibrate(responsive_qwen, clip, tmp_path, capsys, vision, decoder):
    folder = str(responsive_qwen(dtype="fp16")[1])
    options = ["--clips", "synthetic", "--videos", "4", "--frames", "8", "--vision", vision, "--decoder", decoder]
    out_of(capsys, "calibrate", folder, *options, "--output", str(tmp_path / "less"))
    before, after = (Bundle.load(path).manifest for path in (folder, tmp_path / "less"))
    assert (after.video, after.decoder, after.prompt) == (before.video, before.decoder, before.prompt)
    for graph, precision in (("vision", vision), ("decoder", decoder)):
        quantized = after.graphs[graph].quantization
        assert (quantized.precision if quantized else "fp16") == precision
    assert "video tokens" in out_of(capsys, "run", str(tmp_path / "less"), str(clip), "What?", "--frames", "3").err


# Plans


def test_plan_counts_operations_of_the_tower():
    """3.63 TFLOP of linear layers and 0.17 of global attention for 720 tokens, 1.3 TFLOP for 252."""
    model = find_model("qwen2.5-vl-3b")
    for size, linear, whole in (((560, 1008), 3.63e12, 0.17e12), ((336, 588), 1.27e12, 0.021e12)):
        found = model.at_size(size)
        patches = found.vision.patches
        windows = 28 * 4 * patches * 64 * 1280
        assert 2 * patches * found.tower.weights == pytest.approx(linear, rel=0.01)
        assert found.vision_attention - windows == pytest.approx(whole, rel=0.03)


def test_plan_takes_a_frame_size(capsys):
    arguments = ["plan", "--model", "qwen2.5-vl-7b", "--device", "h200", "--json", "-"]
    found = {size: json.loads(out_of(capsys, *arguments, "--frame", size).out) for size in ("560x1008", "336x588")}
    large, small = found["560x1008"], found["336x588"]
    assert (large["workload"]["tokens"], small["workload"]["tokens"]) == (16 * 720, 16 * 252)
    assert (large["workload"]["kept"], small["workload"]["kept"]) == (1152, 404)
    assert json.loads(out_of(capsys, *arguments).out)["workload"] == large["workload"]
    assert small["estimated_seconds"]["vision"] < 0.5 * large["estimated_seconds"]["vision"]
    assert "32 frames of 588x336, 4032 video tokens" in out_of(capsys, *arguments[:-2], "--frame", "336x588").out


def test_activations_of_a_plan_do_not_grow_with_the_frames():
    """The tower is given as many pairs at once as fit 2 GiB, at least one."""
    model, device = find_model("qwen2.5-vl-3b"), find_device("h200")
    for size, steps in (((560, 1008), 1), ((336, 588), 13)):
        resized = model.at_size(size)
        one, many = (
            memory.activation_bytes("vision", resized, memory.MaxShapes(frames, 64, 64), 2) for frames in (2, 512)
        )
        assert many == steps * one <= memory.VISION_BYTES < (steps + 1) * one
    with pytest.raises(TangoError, match="it must be from 1 to 512"):
        estimate(model, device, SizingOptions(frames=514))


def test_engines_are_planned_for_one_frame_size(folder):
    loaded, target = Bundle.load(folder), Target("8.6.0", "9.0", "H200", "1")
    options = BuildOptions(max_frames=8, frame=(84, 112))
    vision, prune, decoder = plan_engines(loaded, target, options, ["vision", "prune", "decoder"])
    shape = (2, 84, 112, 3)
    assert vision.spec.profiles == ({"frames": ((1, *shape), (4, *shape), (4, *shape))},)
    features = prune.spec.profiles[0]["features"]
    assert features == ((1, 12, 64), (4, 12, 64), (4, 12, 64))
    assert prune.spec.attributes["grid"] == [3, 4]
    most = decoder.spec.profiles[0]["rotary"][2]
    assert most == (3, -(-(op.capacity(4, 12, loaded.manifest.params.on((3, 4))) + 128) // 64) * 64)
    (default,) = plan_engines(loaded, target, BuildOptions(), ["vision"])
    assert default.spec.profiles[0]["frames"][2][1:] == (2, 560, 1008, 3)
    assert default.key != vision.key
    with pytest.raises(TangoError, match="not made of multiples of 28"):
        plan_engines(loaded, target, BuildOptions(frame=(84, 100)), ["vision"])


def test_engines_of_fixed_frames_have_no_size_to_choose(bundle):
    loaded, target = Bundle.load(bundle()), Target("8.6.0", "9.0", "H200", "1")
    with pytest.raises(TangoError, match="frames must be 112x112, as the bundle takes them"):
        plan_engines(loaded, target, BuildOptions(frame=(84, 112)), ["vision"])
