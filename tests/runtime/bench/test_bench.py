"""`tango bench`: what it measures, what it writes, and what it does where a case cannot be measured."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.backends.cuda import device
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.backends.cuda.device import Stream
from tango_runtime.backends.cuda.ort_runner import OrtRunner
from tango_runtime.bench import conditions, measure
from tango_runtime.bench.measure import Bench, Case, Setting, cold_start, make_clip, spread
from tango_runtime.bundle import Bundle
from tango_runtime.cli.main import main
from tango_runtime.video.preprocess import resize
from tests.fakes.cuda import Status, install

CPU = "ort-cpu"
QUICK = Setting(decode_tokens=3, warm_up=1, repeats=2)
PRUNED = Case(True, 112, 112)


def ignore(done):
    pass


@pytest.fixture
def run(tiny_bundle, tmp_path, capsys):
    """``run(*options)``: exit code, standard output, standard error and what was written, of a quick `tango bench`."""

    def call(*options, folder=tiny_bundle):
        file = tmp_path / "out.json"
        quick = ["--warm-up", "1", "--repeats", "2", "--decode-tokens", "3", "--backend", CPU, "--json", str(file)]
        code = main(["bench", str(folder), *quick, *map(str, options)])
        assert not list(tmp_path.glob(".*"))
        return code, *capsys.readouterr(), json.loads(file.read_text()) if file.exists() else None

    return call


# What it measures


def test_both_cases_stage_by_stage(run, tiny_bundle):
    code, out, err, found = run()
    assert code == 0
    pruned, unpruned = found["cases"]
    stages = ["video", "vision", "prune", "prefill", "first token", "decode", "answer", "first token, new length"]
    assert list(pruned["milliseconds"]["tango"]) == stages
    assert list(unpruned["milliseconds"]["tango"]) == [stage for stage in stages if stage != "prune"]
    assert (unpruned["kept"], unpruned["prompt_tokens"]) == (64, 64 + 31)
    assert (pruned["kept"], pruned["prompt_tokens"]) == (7, 7 + 31)
    assert pruned["milliseconds"]["tango"]["decode"]["count"] == 2 * 3
    assert "pruned, 112x112: kept 7 of 64 tokens (exact budget), prompt of 38 positions" in out
    assert "unpruned, 112x112: kept 64 of 64 tokens, prompt" in out
    assert "decode, a token" in out
    assert out.count("MB on the host") == 2
    assert "GPU" not in out
    assert found["metrics"]["milliseconds"] in err
    assert found["bundle"]["name"] == tiny_bundle.name
    assert found["conditions"]["engine"].startswith("ONNX Runtime")


def test_the_parts_make_the_whole(tiny_bundle):
    found = Bench(Bundle.load(tiny_bundle), CPU, QUICK).measure(PRUNED, ignore).milliseconds
    for i in range(2):
        stages = sum(found[stage][i] for stage in ("video", "vision", "prune", "prefill"))
        assert stages < found["first token"][i]
        assert found["answer"][i] == pytest.approx(found["first token"][i] + sum(found["decode"][3 * i : 3 * i + 3]))


def test_prompts_get_shorter_where_lengths_are_to_be_new(tiny_bundle, monkeypatch):
    asked, generate = [], VideoLLM.generate

    def noting(self, source, question, **options):
        answer = generate(self, source, question, **options)
        asked.append(answer.prompt_tokens)
        return answer

    monkeypatch.setattr(VideoLLM, "generate", noting)
    bench = Bench(Bundle.load(tiny_bundle), CPU, QUICK)
    found = bench.measure(PRUNED, ignore)
    assert asked == [38, 38, 38, 37, 36, 35]
    assert found.prompt_tokens == 38
    assert len(found.milliseconds["first token, new length"]) == 3
    asked.clear()
    bench.measure(replace(PRUNED, width=64), ignore)
    assert asked == [38, 38, 38, 34, 33, 32]


def test_an_answer_is_as_long_as_asked_whatever_it_says(tiny_bundle):
    bundle = Bundle.load(tiny_bundle)
    prompt = replace(bundle.manifest.prompt, stop=tuple(range(bundle.manifest.prompt.vocabulary)))
    stopping = replace(bundle, manifest=replace(bundle.manifest, prompt=prompt))
    assert len(Bench(stopping, CPU, QUICK).measure(PRUNED, ignore).milliseconds["decode"]) == 6


def test_a_tenth_is_kept_though_nothing_moves(tiny_bundle, monkeypatch):
    monkeypatch.setattr(measure, "make_clip", lambda case, frames, seed: np.full((frames, 112, 112, 3), 99, np.uint8))
    found = Bench(Bundle.load(tiny_bundle), CPU, replace(QUICK, frames=32)).measure(PRUNED, ignore)
    assert (found.total, found.kept) == (512, 52)  # and not each of 16 still tokens once


def test_where_the_files_lie_is_not_written(run, tiny_bundle):
    _, _, _, found = run("--only", "pruned")
    assert found["bundle"]["source"]["checkpoint"] == "llava"
    assert str(tiny_bundle.parent) not in json.dumps(found)


def test_frames_of_another_size_are_resized_and_others_are_not(run):
    _, _, _, found = run("--only", "pruned", "--source-size", "112x112", "640x360")
    small, large = (case["milliseconds"]["tango"]["video"]["min"] for case in found["cases"])
    assert large > 2 * small
    frame = make_clip(PRUNED, 1, 0)[0]
    assert resize(frame, 112) is frame


def test_the_clip_moves_cuts_and_depends_on_its_seed():
    clip = make_clip(Case(True, 64, 36), 8, 0)
    assert clip.shape == (8, 36, 64, 3)
    np.testing.assert_array_equal(clip, make_clip(Case(True, 64, 36), 8, 0))
    assert (clip != make_clip(Case(True, 64, 36), 8, 1)).any()
    changed = [np.abs(np.diff(clip.astype(int), axis=0))[i].mean() for i in range(7)]
    assert np.argmax(changed) == 3
    blocks = [np.argwhere((frame == (230, 60, 40)).all(-1))[0].tolist() for frame in clip]
    assert blocks == sorted(blocks)
    assert blocks[0] != blocks[-1]


def test_spread():
    found = spread([1.0, 2.0, 3.0, 4.0, 10.0])
    assert (found["p50"], found["min"], found["max"], found["mean"], found["count"]) == (3, 1, 10, 4, 5)
    assert found["p10"] < found["p50"] < found["p90"] < found["p99"] < 10


def test_a_cold_start_is_a_process_of_its_own(tiny_bundle):
    found = cold_start(tiny_bundle, CPU, QUICK, PRUNED)
    assert found["total"] == pytest.approx(found["import"] + found["load"] + found["first token"])
    assert min(found.values()) > 0
    with pytest.raises(TangoError, match="there is no bundle at"):
        cold_start(tiny_bundle / "none", CPU, QUICK, PRUNED)


def test_cold_starts_are_told(run, monkeypatch):
    told = {"import": 1.0, "load": 2.0, "first token": 3.0, "total": 6.0, "host_memory": 1}
    monkeypatch.setattr("tango_runtime.cli.bench.cold_start", lambda *arguments: told)
    _, _, err, found = run("--cold-start", "--only", "pruned")
    assert found["cold_starts"] == [told] * 3
    assert "import 1, load 2, first token 3, total 6" in err


# On a GPU


@pytest.fixture
def host(monkeypatch):
    """CUDA, emulated, with events."""
    found = install(monkeypatch)
    found.cudaDeviceGetPCIBusId = lambda length, which: (Status.cudaSuccess, b"0000:01:00.0\0\0")
    for module in (measure, conditions):
        monkeypatch.setattr(module, "cudart", device.cudart)

    def select(bundle, engine):
        import onnxruntime

        stream = Stream()
        return CudaBackend(bundle, OrtRunner(onnxruntime, bundle, stream, ("CPUExecutionProvider", "cpu")), stream)

    monkeypatch.setattr(measure, "select", select)
    return found


def test_a_gpu_tells_the_upload_apart_and_its_memory(host, tiny_bundle):
    made = Bench(Bundle.load(tiny_bundle), "ort-cuda", QUICK)
    held = []
    for case in (PRUNED, replace(PRUNED, prune=False)):
        found = made.measure(case, ignore)
        held.append(host.held())
        assert found.device_memory == held[-1]
        assert list(found.milliseconds)[:3] == ["video", "upload", "vision"]
    assert 4 * 112 * 112 * 3 < held[0] <= held[1]


def test_a_gpu_is_given_back_with_the_bench_even_where_the_last_case_was_refused(host, tiny_bundle):
    made = Bench(Bundle.load(tiny_bundle), "ort-cuda", replace(QUICK, frames=128))
    with pytest.raises(TangoError, match="the bundle's context is 2048"):
        made.measure(replace(PRUNED, prune=False), ignore)
    assert host.held()
    del made
    assert not host.held()


SMI = """#!/bin/sh
case "$*" in
  *compute-apps*) echo "{pid}, python, 900"; echo "7, /usr/bin/other, [N/A]" ;;
  *"-i 0000:01:00.0"*) echo "550.54, P0, 1980, 1980, 2619, 123.4, [N/A], 41, 3, 900, Disabled" ;;
esac
"""


def test_the_gpu_as_it_is_found(host, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI.format(pid=os.getpid()))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = conditions.gpu_state()
    assert (found["driver"], found["sm_mhz"], found["power_limit_watts"]) == ("550.54", 1980, None)
    assert found["processes"] == ["7, other, [N/A]"]
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert "nvidia-smi cannot be asked" in conditions.gpu_state()["missing"]


# Where it cannot


def test_what_the_context_cannot_hold_is_told_and_the_rest_is_measured(run):
    code, _, err, found = run("--frames", 128)
    pruned, unpruned = found["cases"]
    assert code == 0
    assert pruned["total"] == 2048
    assert unpruned["milliseconds"] == {}
    assert "the bundle's context is 2048" in unpruned["not_measured"]["tango"]["error"]
    assert "tango, unpruned, 112x112: not measured: the prompt takes" in err


def test_nothing_is_written_where_nothing_can_be_measured(run):
    code, out, err, found = run("--frames", 128, "--only", "unpruned")
    assert (code, out, found) == (2, "", None)
    assert "error: the prompt takes" in err


def test_a_context_that_ends_too_early_is_refused(tiny_bundle):
    made = Bench(Bundle.load(tiny_bundle), CPU, replace(QUICK, frames=125, decode_tokens=30))
    with pytest.raises(TangoError, match="the context ends 17 tokens behind a prompt of 2031"):
        made.measure(replace(PRUNED, prune=False), ignore)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--repeats", 0], "--repeats is 0"),
        (["--warm-up", 0], "--warm-up is 0"),
        (["--decode-tokens", 0], "--decode-tokens is 0"),
        (["--frames", 0], "--frames is 0"),
        (["--seed", -1], "--seed is -1"),
        (["--retention-ratio", 2], "retention_ratio is 2"),
        (["--source-size", "1080p"], "'1080p' is not WIDTHxHEIGHT"),
        (["--source-size", "0x1080"], "'0x1080' has a side out of 1 to 8192 pixels"),
        (["--json", "none/out.json"], "there is no folder"),
        (["--json", "."], ". is a folder"),
        (["--only", "both"], "invalid choice: 'both'"),
    ],
)
def test_a_bad_option_is_named_before_the_work(run, options, error, monkeypatch):
    monkeypatch.setattr("tango_runtime.cli.bench.Bench", None)
    code, out, err, _ = run(*options)
    assert (code, out) == (2, "")
    assert error in err
    assert "hint: " in err
