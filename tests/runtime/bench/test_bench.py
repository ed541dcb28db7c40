"""`tango bench`: what it measures, what it writes, and cases that cannot be measured."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.backends.cuda import device
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.backends.cuda.device import Stream
from tango_runtime.backends.cuda.ort_runner import OrtRunner
from tango_runtime.backends.ort_cpu import OrtCpuBackend
from tango_runtime.bench import conditions, measure, sampling
from tango_runtime.bench.measure import Bench, Case, Setting, cold_start, make_clip, spread
from tango_runtime.bundle import Bundle, Quantization, write_manifest
from tango_runtime.cli import bench as bench_command
from tango_runtime.cli.main import main
from tango_runtime.sizing import memory
from tango_runtime.video.preprocess import resize
from tests.fakes.cuda import Status, install
from tests.runtime.video.clips import write

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


# Measurements


def test_both_cases_stage_by_stage(run, tiny_bundle):
    code, out, err, found = run()
    assert code == 0
    pruned, unpruned = found["cases"]
    stages = ["video", "vision", "prune", "prefill", "first token", "decode", "answer", "second question"]
    stages.append("first token, new length")
    assert list(pruned["milliseconds"]["tango"]) == stages
    assert list(unpruned["milliseconds"]["tango"]) == [stage for stage in stages if stage != "prune"]
    assert (unpruned["kept"], unpruned["prompt_tokens"]) == (64, 64 + 31)
    assert (pruned["kept"], pruned["prompt_tokens"]) == (7, 7 + 31)
    assert pruned["milliseconds"]["tango"]["decode"]["count"] == 2 * 3
    assert "pruned, 112x112: kept 7 of 64 tokens (exact budget), prompt of 38 positions" in out
    assert "unpruned, 112x112: kept 64 of 64 tokens, prompt" in out
    assert "decode, per token" in out
    assert out.count("MB on the host") == 2
    assert "GPU" not in out
    assert found["metrics"]["milliseconds"] in err
    assert found["bundle"]["name"] == tiny_bundle.name
    assert found["conditions"]["backend"].startswith("ONNX Runtime")


def test_the_parts_add_up(tiny_bundle):
    found = Bench(Bundle.load(tiny_bundle), CPU, QUICK).measure(PRUNED, ignore).milliseconds
    for i in range(2):
        stages = sum(found[stage][i] for stage in ("video", "vision", "prune", "prefill"))
        assert stages < found["first token"][i]
        assert found["answer"][i] == pytest.approx(found["first token"][i] + sum(found["decode"][3 * i : 3 * i + 3]))


def test_new_lengths_come_from_shorter_prompts(tiny_bundle, monkeypatch):
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


def test_a_second_question_prefills_its_own_tokens_only(tiny_bundle, monkeypatch):
    passes, extend = [], OrtCpuBackend.extend

    def record(self, cache, pieces, thinning=None):
        passes.append(sum(map(len, pieces)))
        return extend(self, cache, pieces, thinning)

    monkeypatch.setattr(OrtCpuBackend, "extend", record)
    found = Bench(Bundle.load(tiny_bundle), CPU, QUICK).measure(PRUNED, ignore)
    prefills = [tokens for tokens in passes if tokens > 1]  # the others are decode steps
    answers, first, second, new = prefills[:3], prefills[3], prefills[4:7], prefills[7:]
    assert (answers, first, new) == ([38] * 3, 38, [37, 36, 35])
    assert all(20 < tokens < 31 for tokens in second)  # the question, and the template after it
    assert len(found.milliseconds["second question"]) == QUICK.repeats


def test_an_answer_is_as_long_as_requested_whatever_its_tokens(tiny_bundle):
    bundle = Bundle.load(tiny_bundle)
    prompt = replace(bundle.manifest.prompt, stop=tuple(range(bundle.manifest.prompt.vocabulary)))
    stopping = replace(bundle, manifest=replace(bundle.manifest, prompt=prompt))
    assert len(Bench(stopping, CPU, QUICK).measure(PRUNED, ignore).milliseconds["decode"]) == 6


def test_a_tenth_is_kept_even_if_nothing_moves(tiny_bundle, monkeypatch):
    monkeypatch.setattr(measure, "make_clip", lambda case, frames, seed: np.full((frames, 112, 112, 3), 99, np.uint8))
    found = Bench(Bundle.load(tiny_bundle), CPU, replace(QUICK, frames=32)).measure(PRUNED, ignore)
    assert (found.total, found.kept) == (512, 52)  # and not each of 16 still tokens once


def test_folders_of_the_machine_are_not_written(run, tiny_bundle):
    _, _, _, found = run("--only-pruned")
    assert found["bundle"]["source"]["checkpoint"] == "llava"
    assert str(tiny_bundle.parent) not in json.dumps(found)


def test_precisions_are_those_of_the_manifest_whatever_the_folder_is_called(run, tiny_bundle, tmp_path):
    folder = shutil.copytree(tiny_bundle, tmp_path / "fp8")
    manifest = Bundle.load(folder).manifest
    decoder = replace(manifest.graphs["decoder"], quantization=Quantization("int8", 0, ()))
    write_manifest(folder, replace(manifest, graphs=manifest.graphs | {"decoder": decoder}))
    _, _, _, found = run("--only-pruned", folder=folder)
    assert found["bundle"]["precision"] == {"vision": manifest.dtype, "decoder": "int8"}


def test_only_frames_of_another_size_are_resized(run, monkeypatch):
    seen = set()

    def record(frame, size):
        resized = resize(frame, size)
        seen.add((frame.shape, resized is frame))
        return resized

    monkeypatch.setattr("tango_runtime.video.preprocess.resize", record)
    _, _, _, found = run("--only-pruned", "--source-size", "112x112", "640x360")
    assert [case["name"] for case in found["cases"]] == ["pruned, 112x112", "pruned, 640x360"]
    assert seen == {((112, 112, 3), True), ((360, 640, 3), False)}


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


def test_cold_starts_are_reported(run, monkeypatch):
    times = {"import": 1.0, "load": 2.0, "first token": 3.0, "total": 6.0, "host_memory": 1}
    monkeypatch.setattr("tango_runtime.cli.bench.cold_start", lambda *arguments: times)
    _, _, err, found = run("--cold-start", "--only-pruned")
    assert found["cold_starts"] == [times] * 3
    assert "import 1, load 2, first token 3, total 6" in err


# On a GPU


@pytest.fixture
def host(monkeypatch):
    """CUDA, emulated, with events."""
    found = install(monkeypatch)
    found.cudaDeviceGetPCIBusId = lambda length, which: (Status.cudaSuccess, b"0000:01:00.0\0\0")
    for module in (measure, conditions):
        monkeypatch.setattr(module, "cudart", device.cudart)

    def select(bundle, engine, nvdec):
        import onnxruntime

        stream = Stream()
        return CudaBackend(bundle, OrtRunner(onnxruntime, bundle, stream, ("CPUExecutionProvider", "cpu")), stream)

    monkeypatch.setattr(measure, "select", select)
    return found


def test_a_gpu_has_an_upload_and_memory(host, tiny_bundle):
    made = Bench(Bundle.load(tiny_bundle), "ort-cuda", QUICK)
    held = []
    for case in (PRUNED, replace(PRUNED, prune=False)):
        found = made.measure(case, ignore)
        held.append(host.held())
        assert found.device_memory == held[-1]
        assert list(found.milliseconds)[:3] == ["video", "upload", "vision"]
    assert 4 * 112 * 112 * 3 < held[0] <= held[1]


def test_gpu_memory_is_released_even_after_a_failed_case(host, tiny_bundle):
    made = Bench(Bundle.load(tiny_bundle), "ort-cuda", replace(QUICK, frames=128))
    with pytest.raises(TangoError, match="exceed the context of 2048"):
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


def test_the_state_of_the_gpu(host, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI.format(pid=os.getpid()))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = conditions.gpu_state()
    assert (found["driver"], found["sm_mhz"], found["power_limit_watts"]) == ("550.54", 1980, None)
    assert found["processes"] == ["7, other, [N/A]"]
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert "nvidia-smi failed" in conditions.gpu_state()["missing"]


# Errors


def test_a_case_beyond_the_context_is_reported_and_the_rest_is_measured(run):
    code, _, err, found = run("--frames", 128)
    pruned, unpruned = found["cases"]
    assert code == 0
    assert pruned["total"] == 2048
    assert unpruned["milliseconds"] == {}
    assert "exceed the context of 2048" in unpruned["not_measured"]["tango"]["error"]
    assert "tango, unpruned, 112x112: not measured: a prompt of" in err


@pytest.mark.parametrize("prune", [True, False])
def test_the_room_is_that_of_pairs_of_frames(qwen_bundle, prune):
    bundle = Bundle.load(qwen_bundle())
    video, params = bundle.manifest.video, bundle.manifest.params
    tokens = (memory.typical_video_tokens if prune else memory.all_video_tokens)(video, params, 8)
    left = bundle.manifest.decoder.context - tokens - memory.TYPICAL_TEXT_TOKENS - 1
    fits = Setting(8, decode_tokens=left, frame_size=video.size)
    case = Case(prune, *video.size)
    measure.require_room(bundle, fits, case)
    with pytest.raises(TangoError, match="exceed the context"):
        measure.require_room(bundle, replace(fits, decode_tokens=left + 1), case)


def test_nothing_is_written_if_nothing_can_be_measured(run):
    code, out, err, found = run("--frames", 128, "--no-prune")
    assert (code, out, found) == (2, "", None)
    assert "error: a prompt of" in err


def test_answers_that_the_context_cannot_hold_are_refused_before_a_backend_is_loaded(run, monkeypatch):
    monkeypatch.setattr(bench_command, "Bench", None)
    code, out, err, found = run("--only-pruned", "--decode-tokens", 2040)
    assert (code, out, found) == (2, "", None)
    assert "and an answer of 2041 exceed the context of 2048" in err
    assert "--decode-tokens" in err


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--repeats", 0], "argument --repeats: '0' is not a positive integer"),
        (["--warm-up", 0], "argument --warm-up: '0' is not a positive integer"),
        (["--decode-tokens", 0], "argument --decode-tokens: '0' is not a positive integer"),
        (["--frames", 0], "argument --frames: '0' is not a positive integer"),
        (["--seed", -1], "argument --seed: '-1' is not a non-negative integer"),
        (["--retention-ratio", 2], "argument --retention-ratio: '2' is not a number above 0 and at most 1"),
        (["--source-size", "1080p"], "'1080p' is not WIDTHxHEIGHT"),
        (["--source-size", "0x1080"], "'0x1080' has a side outside 1 to 8192 pixels"),
        (["--json", "none/out.json"], "there is no folder"),
        (["--json", "."], ". is a folder"),
        (["--only-pruned", "--no-prune"], "--no-prune and --only-pruned are mutually exclusive"),
    ],
)
def test_an_invalid_option_is_named_before_measuring(run, options, error, monkeypatch):
    monkeypatch.setattr("tango_runtime.cli.bench.Bench", None)
    code, out, err, _ = run(*options)
    assert (code, out) == (2, "")
    assert error in err
    assert "hint: " in err


def test_a_video_file(run, tmp_path):
    path = write(tmp_path / "clip.mp4")
    code, out, err, found = run("--video", path, "--only-pruned", "--sampling", "keyframes")
    assert code == 0
    (case,) = found["cases"]
    assert list(case["milliseconds"]["tango"])[:3] == ["open", "video", "vision"]
    assert (found["setting"]["video"], found["setting"]["sampling"]) == ("clip.mp4", "keyframes")
    assert "pruned, 64x48: kept" in out
    assert "sampling alone, to RGB frames on the host" in err
    assert found["sampling_alone"]["tango"]["count"] == 2
    assert set(found["sampling_alone"]) == {"tango", "decord2", "torchcodec"}


def test_a_reader_that_is_not_there_or_fails(tmp_path, monkeypatch):
    def absent(*_):
        raise ImportError

    def broken(*_):
        raise RuntimeError("no such codec\nmore")

    monkeypatch.setattr(sampling, "_decord", absent)
    monkeypatch.setattr(sampling, "_torchcodec", broken)
    found = sampling.compare_sampling(write(tmp_path / "clip.mp4"), 4, 3)
    assert len(found["tango"]) == 3
    assert (found["decord2"], found["torchcodec"]) == ("not installed", "failed: no such codec")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--video", "clip.mp4", "--source-size", "64x48"], "--video was given with --source-size"),
        (["--sampling", "keyframes"], "only video files have keyframes"),
        (["--video", "nowhere.mp4"], "nowhere.mp4 does not exist"),
    ],
)
def test_options_of_a_video_that_do_not_go_together(run, options, said):
    code, _, err, found = run(*options)
    assert (code, found) == (2, None)
    assert said in err
