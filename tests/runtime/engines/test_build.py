"""Builds with a fake TensorRT: processes, locks, files. tests/gpu/runtime has builds with the real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tango_plugins import PruneParams, TangoError, op
from tango_runtime.bundle import Bundle
from tango_runtime.cli import main as cli
from tango_runtime.engines import BuildOptions, Target, find, plan_engines, read_sidecar
from tango_runtime.engines.build import build, default_timing_cache, is_built, require_memory
from tango_runtime.engines.functions import without_functions
from tango_runtime.engines.worker import Phases, keep_float, plugin_fields
from tango_runtime.system import gpu as machine
from tango_runtime.system.gpu import Free, Gpu

FAKE = Path(__file__).parents[2] / "fakes" / "tensorrt_module"
HERE = Target("8.6.0", "9.0", "NVIDIA H200")


@pytest.fixture(scope="module")
def exported(bundle):
    return bundle()


@pytest.fixture
def loaded(exported, tmp_path, monkeypatch):
    """A copy of a bundle; the building processes import the fake."""
    monkeypatch.setenv("PYTHONPATH", str(FAKE), prepend=os.pathsep)
    return Bundle.load(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture
def trt(monkeypatch):
    """The fake, in this process."""
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    import tensorrt

    yield tensorrt
    sys.modules.pop("tensorrt")


@pytest.fixture
def h200(monkeypatch, trt):
    """A machine with the fake and a GPU."""
    found = Gpu("NVIDIA H200", "9.0", "13.0", 139 << 30, integrated=False)
    monkeypatch.setattr(machine, "gpu", lambda: found)
    monkeypatch.setattr(machine, "free", lambda gpu: Free(100 << 30, 100 << 30))
    monkeypatch.setattr(machine, "plugin", lambda: None)


def planned(bundle, graph="vision", **options):
    return plan_engines(bundle, HERE, BuildOptions(**options), [graph])[0]


def files(bundle):
    return sorted(path.name for path in (bundle.path / "engines").iterdir())


def until(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def builds(bundle):
    file = bundle.path / "builds"
    return file.read_text().split() if file.is_file() else []


def test_an_engine_and_its_sidecar(loaded):
    one = planned(loaded, "decoder", workspace=7)
    stages = []
    assert build(loaded, one, HERE, on_status=lambda stage, fraction: stages.append(stage))
    assert files(loaded) == sorted([one.path.name, f"{one.path.stem}.json", default_timing_cache(loaded, HERE).name])
    engine = json.loads(one.path.read_text())
    assert engine["flags"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]  # and not TF32
    assert engine["profiles"] == json.loads(json.dumps([dict(profile) for profile in one.profiles]))
    assert engine["WORKSPACE"] == 7 << 20
    assert stages == ["loading TensorRT", "reading the graph", "choosing kernels", "writing"]
    assert read_sidecar(one.path.with_suffix(".json")).peak_host > 1e6
    assert find(loaded, "decoder", HERE, verify=True).path == one.path


def test_an_engine_of_a_device_graph(loaded, tmp_path):
    plugins = tmp_path / "plugins.so"
    here = replace(HERE, plugin="1")
    (one,) = plan_engines(loaded, here, BuildOptions(), ["decoder"])
    with pytest.raises(TangoError, match=r"TensorRT cannot load the plugins of .*plugins\.so"):
        build(loaded, one, here, plugin=plugins)
    plugins.touch()
    assert build(loaded, one, here, plugin=plugins)
    engine = json.loads(one.path.read_text())
    graph = loaded.engine_graph("decoder", "device").read_bytes()
    assert engine["bytes"] == len(without_functions(graph)) < len(graph)
    assert engine["profiles"] == json.loads(json.dumps(one.profiles))
    sidecar = read_sidecar(one.path.with_suffix(".json"))
    assert (sidecar.spec.form, list(sidecar.spec.files)) == ("device", ["decoder.device.onnx"])
    assert find(loaded, "decoder", here, verify=True).plugins


def test_a_device_graph_that_is_no_onnx_file_is_named(loaded, tmp_path):
    here = replace(HERE, plugin="1")
    (one,) = plan_engines(loaded, here, BuildOptions(), ["embed"])
    loaded.engine_graph("embed", "device").write_bytes(b"no graph")
    with pytest.raises(TangoError, match=r"embed\.device\.onnx is no ONNX file"):
        build(loaded, one, here)


def test_what_is_built_is_not_built_again(loaded):
    one = planned(loaded)
    assert [build(loaded, one, HERE), build(loaded, one, HERE), build(loaded, one, HERE, rebuild=True)] == [
        True,
        False,
        True,
    ]
    one.path.write_bytes(b"cut")
    assert build(loaded, one, HERE)
    assert builds(loaded) == ["vision.tensorrt"] * 3


def test_the_timing_cache_collects_the_times_of_every_build(loaded, tmp_path):
    cache = tmp_path / "timing.cache"
    for graph in ("vision", "embed"):
        build(loaded, planned(loaded, graph), HERE, timing_cache=cache)
    assert cache.read_bytes().split() == [b"embed", b"vision.tensorrt"]


@pytest.mark.parametrize(
    ("behavior", "message", "hint"),
    [
        ("fail", "no implementation for node MatMul_7", "tango doctor"),
        ("die", "killed", "--max-frames"),
        ("empty", "wrote nothing", ""),
    ],
)
def test_a_failed_build_leaves_nothing_and_names_the_reason(loaded, behavior, message, hint):
    (loaded.path / "behavior").write_text(behavior)
    with pytest.raises(TangoError, match=message) as error:
        build(loaded, planned(loaded), HERE)
    assert hint in error.value.hint
    assert [name for name in files(loaded) if not name.startswith("timing")] == []
    (loaded.path / "behavior").unlink()
    assert build(loaded, planned(loaded), HERE)


def test_a_failed_rebuild_leaves_the_engine_that_was_there(loaded):
    one = planned(loaded)
    build(loaded, one, HERE)
    (loaded.path / "behavior").write_text("fail")
    with pytest.raises(TangoError):
        build(loaded, one, HERE, rebuild=True)
    assert is_built(one)


def test_a_graph_that_tensorrt_cannot_read_is_named(loaded):
    (loaded.engine_graph("vision")).write_bytes(b"")
    with pytest.raises(TangoError, match=r"cannot read .*vision.tensorrt.onnx: no such operator"):
        build(loaded, planned(loaded), HERE)


def test_two_builds_of_one_engine_build_it_once(loaded):
    (loaded.path / "behavior").write_text("wait")
    one, built, waiting = planned(loaded), [], []

    def note(stage, fraction):
        if stage == "waiting for another build of it":
            waiting.append(stage)

    def work():
        built.append(build(loaded, one, HERE, on_status=note))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(waiting) == 2)
    (loaded.path / "go").touch()
    for thread in threads:
        thread.join()
    assert sorted(built) == [False, False, True]
    assert builds(loaded) == ["vision.tensorrt"]
    assert is_built(one)


def test_builds_of_two_engines_run_concurrently(loaded):
    (loaded.path / "behavior").write_text("wait")
    building = set()

    def work(graph):
        def note(stage, fraction):
            if stage == "choosing kernels":
                building.add(graph)

        build(loaded, planned(loaded, graph), HERE, on_status=note)

    threads = [threading.Thread(target=work, args=(graph,)) for graph in ("vision", "embed")]
    for thread in threads:
        thread.start()
    until(lambda: building == {"vision", "embed"})
    (loaded.path / "go").touch()
    for thread in threads:
        thread.join()
    assert sorted(builds(loaded)) == ["embed", "vision.tensorrt"]
    assert default_timing_cache(loaded, HERE).read_bytes().split() == [b"embed", b"vision.tensorrt"]


SCRIPT = """
import sys
from tango_runtime.engines.build import build
from tango_runtime.bundle import Bundle
from tango_runtime.engines import BuildOptions, Target, plan_engines
bundle, here = Bundle.load(sys.argv[1]), Target("8.6.0", "9.0", "NVIDIA H200")
build(bundle, plan_engines(bundle, here, BuildOptions(), ["vision"])[0], here)
"""


def hanging_build(loaded):
    """A process that builds and hangs, and the process id of its child."""
    (loaded.path / "behavior").write_text("hang")
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT, str(loaded.path)], stderr=subprocess.DEVNULL)
    began = loaded.path / "began"
    until(lambda: began.is_file() and began.read_text())
    return parent, int(began.read_text())


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("signals", [signal.SIGINT, signal.SIGKILL])
def test_ending_a_build_ends_its_process_and_leaves_nothing_broken(loaded, signals):
    parent, child = hanging_build(loaded)
    assert alive(child)
    parent.send_signal(signals)
    parent.wait()
    until(lambda: not alive(child))
    if signals == signal.SIGINT:
        assert files(loaded) == []
    (loaded.path / "behavior").unlink()
    assert build(loaded, planned(loaded), HERE)  # the leftovers of a killed build do not matter
    assert not [name for name in files(loaded) if name.endswith(".partial")]


def test_a_killed_worker_is_reported(loaded):
    (loaded.path / "behavior").write_text("hang")
    began = loaded.path / "began"

    def kill():
        until(lambda: began.is_file() and began.read_text())
        os.kill(int(began.read_text()), signal.SIGKILL)

    threading.Thread(target=kill).start()
    with pytest.raises(TangoError, match="killed"):
        build(loaded, planned(loaded), HERE)
    assert files(loaded) == []


@pytest.mark.parametrize(("left", "named"), [(Free(1, 1 << 40), "GPU memory"), (Free(1 << 40, 1), "host memory")])
def test_too_little_memory_is_rejected_before_the_build(loaded, left, named):
    with pytest.raises(TangoError, match=named) as error:
        require_memory(planned(loaded), left)
    assert "--max-frames" in error.value.hint
    require_memory(planned(loaded), Free(1 << 40, 1 << 40))


# The command.


def test_build_command(loaded, h200, capsys):
    assert cli.main(["build", str(loaded.path), "--max-frames", "4"]) == 0
    output = capsys.readouterr().err
    assert "no prune engine, no device graphs" in output
    assert sorted(builds(loaded)) == ["decoder", "embed", "vision.tensorrt"]
    assert cli.main(["build", str(loaded.path), "--max-frames", "4"]) == 0
    assert "already exists" in capsys.readouterr().err
    assert len(builds(loaded)) == 3


def test_dry_run_prints_keys_profiles_and_memory_and_builds_nothing(loaded, h200, capsys):
    assert cli.main(["build", str(loaded.path), "--graphs", "decoder", "--context", "300", "--dry-run"]) == 0
    output = capsys.readouterr().out
    one = planned(loaded, "decoder", context=300)
    for expected in (one.key, "OBEY_PRECISION_CONSTRAINTS", "past_key.0", "300", "MB", "not built"):
        assert expected in output
    assert not (loaded.path / "engines").exists()


def test_prune_without_its_plugin_is_rejected(loaded, h200, capsys):
    assert cli.main(["build", str(loaded.path), "--graphs", "prune"]) == 2
    assert "tango plugin build" in capsys.readouterr().err


def test_insufficient_memory_is_rejected_unless_the_check_is_off(loaded, h200, monkeypatch, capsys):
    monkeypatch.setattr(machine, "free", lambda gpu: Free(1 << 20, 1 << 40))
    command = ["build", str(loaded.path), "--graphs", "embed"]
    assert cli.main(command) == 2
    assert "--no-memory-check" in capsys.readouterr().err
    assert cli.main([*command, "--no-memory-check"]) == 0


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="for machines without a GPU")
def test_without_tensorrt_or_gpu_the_doctor_is_named(loaded, capsys):
    assert cli.main(["build", str(loaded.path)]) == 2
    assert "tango doctor" in capsys.readouterr().err


# The worker's use of TensorRT's objects.


def test_plugin_fields_hold_the_attributes(trt):
    class Field:
        def __init__(self, name, data, kind):
            self.name, self.data, self.kind = name, data, kind

    trt.PluginField, trt.PluginFieldCollection = Field, list
    attributes = op.node_attributes(PruneParams(sink_positions=()))
    _, fields = plugin_fields(trt, attributes)
    found = {field.name: field for field in fields}
    assert set(found) == {name for name in attributes if not name.startswith("plugin_")}
    assert found["retention_ratio"].data.tolist() == [1000]
    assert found["sink_positions"].data.size == 0
    assert found["budget"].data.tobytes() == b"paper"
    assert found["budget"].kind == trt.PluginFieldType.CHAR


def test_what_the_graph_keeps_in_fp32_stays_there(trt):
    """x fp16 → matmul → cast to fp32 → softmax → cast to fp16 → matmul; and a mask selected from fp32 constants."""
    kinds, types = trt.LayerType, trt.DataType
    network, tensors = trt.Network(), {}

    def add(kind, inputs, output, dtype=types.FLOAT, **attributes):  # a weakly typed network reports FLOAT for most
        tensors[output] = trt.Tensor(output, dtype)
        layer = trt.Layer(kind, [tensors[name] for name in inputs], [tensors[output]])
        vars(layer).update(attributes)
        network.layers.append(layer)
        return layer

    import numpy as np

    tensors["x"] = trt.Tensor("x", types.HALF)
    tensors["n"] = trt.Tensor("n", types.INT32)
    network.inputs = [tensors["x"], tensors["n"]]
    add(kinds.CONSTANT, [], "w", weights=np.zeros(2, np.float16))
    half = [add(kinds.MATRIX_MULTIPLY, ["x", "w"], "scores")]
    add(kinds.CAST, ["scores"], "wide", to_type=types.FLOAT)
    add(kinds.CONSTANT, [], "zero", weights=np.zeros(1, np.float32))
    add(kinds.CONSTANT, [], "low", weights=np.zeros(1, np.float32))
    whole = add(kinds.ELEMENTWISE, ["n", "n"], "allowed", types.BOOL)
    moved = add(kinds.SELECT, ["allowed", "zero", "low"], "mask")
    single = [
        add(kinds.ELEMENTWISE, ["wide", "mask"], "masked"),
        add(kinds.SOFTMAX, ["masked"], "weights"),
    ]
    add(kinds.CAST, ["weights"], "narrow", to_type=types.HALF)
    half.append(add(kinds.MATRIX_MULTIPLY, ["narrow", "w"], "y"))
    add(kinds.QUANTIZE, ["wide"], "whole", types.INT8)
    add(kinds.DEQUANTIZE, ["whole"], "again")
    half.append(add(kinds.MATRIX_MULTIPLY, ["again", "again"], "product"))  # meant for int8
    single.append(add(kinds.ELEMENTWISE, ["product", "zero"], "sum"))
    assert keep_float(trt, network) == len(single) + 1
    assert (moved.precision, moved.set) == (None, {0: types.FLOAT})  # it has an output type, but no precision
    assert all(layer.precision == types.FLOAT and layer.set == {0: types.FLOAT} for layer in single)
    assert all(layer.precision is None and layer.set == {} for layer in [*half, whole])


def test_progress_of_nested_phases():
    phases = Phases()
    phases.start("building", None, 4)
    assert phases.step("building", 0) == 1 / 4
    phases.start("timing", "building", 2)
    assert phases.step("timing", 0) == (1 + 1 / 2) / 4
    phases.finish("timing")
    assert phases.step("building", 1) == 1 / 2
    assert phases.step("building", 9) == 1


def test_a_job_survives_its_serialization(loaded):
    from dataclasses import asdict

    from tango_runtime.engines.worker import Job
    from tango_runtime.util.jsonschema import from_json

    spec = replace(planned(loaded).spec, plugin=None)
    job = Job(spec, "m", loaded.manifest.graphs["vision"].inputs, None, "o", "t", 1)
    assert from_json(Job, json.loads(json.dumps(asdict(job))), "the job") == job
