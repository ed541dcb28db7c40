"""benchmarks/bench_precision.py on small bundles: measurements, output, requirements."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_precision
from benchmarks.bench_precision import Outputs, compare, main
from tango_calibration.quantization import calibrate
from tango_runtime.backends.base import HostEvent
from tango_runtime.backends.cuda import tensorrt
from tango_runtime.backends.cuda.backend import CudaBackend
from tango_runtime.bundle import MANIFEST, Bundle
from tests.fakes import cuda as host_cuda
from tests.fakes import tensorrt_engines as host_tensorrt

QUICK = ["--frames", "8", "--clips", "6", "--repeats", "2", "--warm-up", "1", "--decode-tokens", "3"]
ON_CPU = ["--backend", "ort-cpu", *QUICK]


@pytest.fixture(scope="module")
def quantized(bundle, tmp_path_factory):
    """The small bundle with 8-bit vision and a 4-bit decoder."""
    folder = tmp_path_factory.mktemp("quantized") / "int8-int4"
    request = calibrate.CalibrationRequest(
        bundle(), folder, "synthetic", decoder="int4", videos=4, frames=8, max_new_tokens=2
    )
    calibrate.calibrate(request)
    return folder


@pytest.fixture
def edited(bundle, tmp_path):
    """``edited(edit)``: a copy of the small bundle, its bundle.json changed by ``edit``."""

    def made(edit):
        folder = shutil.copytree(bundle(), tmp_path / "edited")
        data = json.loads((folder / MANIFEST).read_text())
        edit(data)
        (folder / MANIFEST).write_text(json.dumps(data))
        return folder

    return made


@pytest.fixture
def rejected(capsys):
    """``rejected(*bundles, more=[])``: the error of bundles or options that are rejected."""

    def error(*bundles, more=()):
        with pytest.raises(SystemExit, match="2"):
            main([*map(str, bundles), *ON_CPU, *more])
        return capsys.readouterr().err

    return error


@pytest.mark.slow
def test_one_run_measures_all_bundles(bundle, quantized, edited, tmp_path, capsys):
    tensorrt_only = edited(lambda data: data["graphs"]["vision"].update(runtimes=["tensorrt"]))
    file = tmp_path / "results" / "out.json"
    bundles = [bundle(), quantized, tensorrt_only, bundle()]
    assert main([*map(str, bundles), *ON_CPU, "--json", str(file)]) == 0
    first, other, not_run, again = json.loads(file.read_text())["records"]
    assert {"vision", "prune", "prefill", "decode"} <= set(first["milliseconds"])
    assert all(record["milliseconds"]["vision"]["count"] == 2 for record in (first, other))
    assert other["precision"] == {"vision": "int8", "embed": "float16", "decoder": "int4"}
    sizes = [sum(f.stat().st_size for f in folder.glob("decoder.*")) for folder in bundles[:2]]
    assert [record["graph_bytes"]["decoder"] for record in (first, other)] == sizes
    stored = [(folder / "decoder.onnx.data").stat().st_size for folder in bundles[:2]]
    assert stored[1] < 0.5 * stored[0]
    assert sizes[1] < sizes[0]
    found, same = other["against_first"], again["against_first"]
    assert 0 < found["kept"] < 1  # 8-bit vision changes tokens at the margin
    assert (same["kept"], same["kept_min"], same["salient"]) == (1, 1, 1)
    assert same["first_tokens"] == same["answers"] == same["questions"] > same["clips"] == 6
    assert "milliseconds" not in not_run
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("| bundle", f"| {bundle().name}", "| int8-int4", "| edited")) for line in printed) == 10
    assert any("| not run: ONNX Runtime runs the vision graph" in line for line in printed)
    assert any("int4 " in line for line in printed)


def test_agreement():
    kept = [np.array([1, 2, 3, 4]), np.array([5, 6])]
    first = Outputs(kept, kept, [[7, 8], [9], []])
    other = Outputs([np.array([2, 3, 4, 9]), np.array([5, 6])], kept, [[7, 1], [9], [9]])
    assert compare(first, other) == {
        "kept": 0.875,
        "kept_min": 0.75,
        "salient": 1.0,
        "clips": 2,
        "first_tokens": 2,
        "answers": 1,
        "questions": 3,
    }


def test_sizes_of_tensorrt_engines(bundle, quantized, tmp_path, monkeypatch, capsys):
    folder, file = shutil.copytree(bundle(), tmp_path / "bundle"), tmp_path / "out.json"
    engines = host_tensorrt.build(folder, max_frames=8, form="portable")
    module = host_tensorrt.HostTensorRT(Bundle.load(folder), host_cuda.install(monkeypatch))
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    for user in (bench_precision, tensorrt):
        monkeypatch.setattr(user, "current_target", lambda version: host_tensorrt.MACHINE)
    monkeypatch.setattr(CudaBackend, "record_event", lambda backend: HostEvent())  # the emulated CUDA has no events
    assert main([str(folder), str(quantized), "--backend", "tensorrt", "--json", str(file), *QUICK]) == 0
    found, unbuilt = json.loads(file.read_text())["records"]
    assert found["engine_bytes"] == {graph: engine.stat().st_size for graph, engine in engines.items()}
    assert set(found["engine_bytes"]) == {"vision", "embed", "decoder"}
    assert "has no engine for vision" in unbuilt["not_run"]["error"]
    assert ", engine " in capsys.readouterr().out


def test_invalid_arguments(bundle, edited, rejected):
    assert "--clips 0" in rejected(bundle(), more=["--clips", "0"])
    assert "at least 8 frames" in rejected(bundle(), more=["--frames", "4"])
    assert "--repeats is 0" in rejected(bundle(), more=["--repeats", "0"])
    assert "differ in video" in rejected(bundle(), edited(lambda data: data["video"].update(frames=3)))


def test_the_first_bundle_must_run(bundle, edited, rejected):
    tensorrt_only = edited(lambda data: data["graphs"]["vision"].update(runtimes=["tensorrt"]))
    assert "error: ONNX Runtime runs the vision graph" in rejected(tensorrt_only, bundle())


def test_it_needs_neither_torch_nor_onnx():
    missing = ("torch", "onnx", "onnxruntime", "transformers", "matplotlib")
    program = f"""
import sys
sys.modules |= dict.fromkeys({missing})
from benchmarks.bench_precision import main
main(["nowhere", "--backend", "tensorrt"])
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, "there is no bundle at nowhere" in done.stderr) == (2, True), done.stderr
