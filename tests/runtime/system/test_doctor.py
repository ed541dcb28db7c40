"""What the doctor says of this machine and of machines that are not at hand."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import replace

import pytest

from tango_plugins import TangoError
from tango_runtime.bundle import Bundle
from tango_runtime.cli import main as cli
from tango_runtime.engines import BuildOptions, Machine, plan
from tango_runtime.system import doctor
from tango_runtime.system import gpu as machine
from tango_runtime.system.doctor import examine
from tango_runtime.system.gpu import Free, Gpu, Plugin

CPU = ("ort-cpu",)
H200 = Gpu("NVIDIA H200", "9.0", "13.0", 139 << 30, integrated=False)
without_gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="for machines without a GPU")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A machine with a GPU and everything installed; ``change(**)`` takes parts of it away."""
    module = type("module", (), {"__version__": "8.6.0", "__file__": "here"})
    module.get_available_providers = staticmethod(lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    state = {
        "gpu": H200,
        "plugin": Plugin(tmp_path / "libtango_tensorrt.so", "1", "V2", "0.1.0 sm_90a"),
        "modules": {"tensorrt": module, "onnxruntime": module},
        "versions": {"cuda-bindings": "12.9.0", "onnxruntime-gpu": "1.23.0"},
    }
    built = type("Info", (), {"library": tmp_path / "lib.so", "version": "0.1.0 sm_90a"})

    def gpu():
        if state["gpu"] is None:
            raise TangoError("CUDA sees no GPU", "check nvidia-smi")
        return state["gpu"]

    monkeypatch.setattr(machine, "gpu", gpu)
    monkeypatch.setattr(machine, "free", lambda gpu: Free(100 << 30, 50 << 30))
    monkeypatch.setattr(machine, "plugin", lambda: state["plugin"])
    monkeypatch.setattr(doctor, "info", lambda: built)
    monkeypatch.setattr(doctor, "_import", lambda name: (state["modules"].get(name), "not installed in this Python"))
    monkeypatch.setattr(doctor, "_version", lambda name: state["versions"].get(name))
    monkeypatch.setattr(doctor, "_others", lambda: iter(state.get("others", [])))
    return state


def findings(*arguments):
    return {found.name: found for found in examine(*arguments).findings}


@without_gpu
def test_this_machine_has_the_cpu_engine_and_says_what_it_lacks(capsys):
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "ready: ort-cpu" in told
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ready"] == ["ort-cpu"]
    assert [one["mend"] for one in found["findings"] if one["state"] != "ok"]
    assert all(one["mend"] for one in found["findings"] if one["state"] != "ok")


def test_a_cpu_without_vnni_is_named(elsewhere, monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: AMD EPYC 7763 64-Core Processor\nflags\t\t: fpu avx2\n\n" * 2)
    monkeypatch.setattr(doctor, "int8_saturates", lambda: True)
    assert "no VNNI: INT8 bundles run on exact kernels" in findings()["CPU"].text
    assert doctor._cpu(file).text.startswith("AMD EPYC 7763 64-Core Processor, no VNNI")
    elsewhere["modules"] = {}  # without ONNX Runtime there is no product to speak of
    assert doctor._cpu(file).text == "AMD EPYC 7763 64-Core Processor"


def test_a_cpu_whose_products_are_exact(elsewhere, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "int8_saturates", lambda: False)
    assert doctor._cpu(tmp_path / "none").text == platform.machine()


def test_everything_there(elsewhere):
    examined = examine()
    assert examined.ready == ("tensorrt", "ort-cuda", "ort-cpu")
    assert {found.state for found in examined.findings if found.name != "CUDA toolkit"} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "lacking", "mend", "ready"),
    [
        ({"gpu": None}, "GPU", "nvidia-smi", CPU),
        ({"modules": {}}, "TensorRT", "tango-edge[tensorrt]", ()),
        ({"versions": {}}, "cuda-bindings", "cuda-bindings==13.*", CPU),
        ({"gpu": replace(H200, cuda="11.4")}, "cuda-bindings", "update the driver", CPU),
        ({"gpu": replace(H200, cuda="12.4"), "versions": {"cuda-bindings": "13.0"}}, "cuda-bindings", "==12.*", CPU),
        (
            {"versions": {"cuda-bindings": "12.9", "onnxruntime": "1.20", "onnxruntime-gpu": "1.23"}},
            "ONNX Runtime",
            "pip uninstall -y onnxruntime onnxruntime-gpu",
            ("tensorrt",),
        ),
    ],
)
def test_each_lack_and_what_mends_it(elsewhere, changes, lacking, mend, ready):
    elsewhere.update(changes)
    found = findings()[lacking]
    assert found.state == "lacking"
    assert mend in found.mend
    assert examine().ready == ready


def test_tensorrt_in_another_interpreter(elsewhere):
    del elsewhere["modules"]["tensorrt"]
    elsewhere["others"] = [("/usr/bin/python3", "8.6.2")]
    found = findings()["TensorRT"]
    assert "8.6.2 in /usr/bin/python3" in found.text
    assert "--system-site-packages" in found.mend


def test_a_plugin_for_another_tensorrt(elsewhere):
    elsewhere["plugin"] = replace(elsewhere["plugin"], api="V3")
    found = findings()["TensorRT plugin"]
    assert found.state == "beware"
    assert "--tensorrt-include" in found.mend


def test_a_library_for_another_gpu(elsewhere):
    elsewhere["gpu"] = replace(H200, compute_capability="8.7")
    assert "not for this GPU, sm_87" in findings()["CUDA library"].text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64", "JetPack 6.1 or 6.2"),
        ("# R35 (release), REVISION: 4.1, GCID: 1", "JetPack 5.1.2"),
        ("# R36 (release), REVISION: 9.0, GCID: 1", "JetPack 6.2.2 or later"),
        ("# R34 (release), REVISION: 1.0", "unknown JetPack"),
        ("", "unknown JetPack"),
    ],
)
def test_jetpack(tmp_path, text, told):
    file = tmp_path / "nv_tegra_release"
    file.write_text(text)
    (found,) = doctor._jetpack(file)
    assert found.text.startswith(told)


def test_driver_version(tmp_path):
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27\nGCC version: 12\n")
    assert doctor._driver_version(file) == "580.82.07"


def test_engines_of_a_bundle(elsewhere, bundle, tmp_path):
    from tests.runtime.engines.test_engines import put

    loaded = Bundle.load(shutil.copytree(bundle(), tmp_path / "bundle"))
    assert examine(loaded.path).ready == ("ort-cuda", "ort-cpu")
    this = Machine("8.6.0", "9.0", "NVIDIA H200", "1")
    for one in plan(loaded, this, BuildOptions(max_frames=9)):
        put(one, this)
    found = findings(loaded.path)
    assert "1 to 9 frames" in found["vision engine"].text
    assert examine(loaded.path, verify=True).ready[0] == "tensorrt"
    elsewhere["gpu"] = replace(H200, compute_capability="8.7", name="Orin")
    found = findings(loaded.path)["decoder engine"]
    assert found.state == "lacking"
    assert "9.0" in found.text
    assert "tango build" in found.mend


def test_engines_of_a_graph_that_is_gone(elsewhere, bundle, tmp_path):
    from tests.runtime.engines.test_engines import put

    loaded = Bundle.load(shutil.copytree(bundle(), tmp_path / "bundle"))
    this = Machine("8.6.0", "9.0", "NVIDIA H200", "1")
    one = put(plan(loaded, this, BuildOptions(), ["vision"])[0], this)
    manifest = loaded.path / "bundle.json"
    digest = loaded.manifest.files["vision.onnx"].sha256
    manifest.write_text(manifest.read_text().replace(digest, "0" * 64))
    assert str(one.path) in findings(loaded.path)["engines/"].mend


def test_a_bundle_that_is_not_there(elsewhere, tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "none")]) == 1
    assert "there is no bundle" in capsys.readouterr().out
