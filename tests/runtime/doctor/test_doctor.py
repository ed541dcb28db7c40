"""`tango doctor` on this machine and on simulated ones."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import replace

import pytest

from tango_plugins import TangoError
from tango_plugins.build import Info
from tango_runtime.bundle import Bundle, Quantization
from tango_runtime.cli.main import main
from tango_runtime.doctor import diagnose, machine, packages
from tango_runtime.doctor.bundle import check_bundle
from tango_runtime.engines import BuildOptions, Target, plan_engines
from tango_runtime.system import cublaslt
from tango_runtime.system import gpu as system
from tango_runtime.system.gpu import Free, Gpu, Plugin
from tango_runtime.system.kernels import Kernels

CPU = ("ort-cpu",)
H200 = Gpu("NVIDIA H200", "9.0", "13.0", 139 << 30, integrated=False)
without_gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="for machines without a GPU")


@pytest.fixture
def gpu_machine(monkeypatch, tmp_path):
    """Simulates a machine with a GPU and everything installed; edit the returned state to remove parts."""
    module = type("module", (), {"__version__": "8.6.0", "__file__": "here"})
    module.get_available_providers = staticmethod(lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    found = Info(tmp_path, tmp_path / "lib.so", "0.1.0 sm_90a", None, origin="prebuilt", code="sm_90a")
    state = {
        "gpu": H200,
        "library": found,
        "cublaslt": lambda library: 13,
        "plugin": Plugin(tmp_path / "libtango_tensorrt.so", "1", "V2"),
        "modules": {"tensorrt": module, "onnxruntime": module},
        "versions": {"cuda-bindings": "12.9.0", "onnxruntime-gpu": "1.23.0"},
    }

    def gpu():
        if state["gpu"] is None:
            raise TangoError("CUDA sees no GPU", "check nvidia-smi")
        return state["gpu"]

    monkeypatch.setattr(system, "gpu", gpu)
    monkeypatch.setattr(system, "free", lambda gpu: Free(100 << 30, 50 << 30))
    monkeypatch.setattr(system, "plugin", lambda: state["plugin"])
    monkeypatch.setattr(packages, "info", lambda: state["library"])
    monkeypatch.setattr(cublaslt, "cublaslt_version", lambda library: state["cublaslt"](library))
    monkeypatch.setattr(machine, "check_jetson", lambda: [])
    monkeypatch.setattr(packages, "jetson_linux", lambda: state.get("l4t"))
    monkeypatch.setattr(
        packages, "try_import", lambda name: (state["modules"].get(name), "not installed in this Python")
    )
    monkeypatch.setattr(packages, "installed_version", lambda name: state["versions"].get(name))
    monkeypatch.setattr(packages, "_other_interpreters", lambda: iter(state.get("others", [])))
    return state


def checks(*arguments):
    """The checks by name."""
    return {check.name: check for check in diagnose(*arguments).checks}


@without_gpu
def test_this_machine_runs_on_the_cpu_and_everything_missing_has_a_fix(capsys, tmp_path):
    assert main(["doctor", "--json", str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    assert "ready: ort-cpu" in text
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["ready"] == ["ort-cpu"]
    missing = [check["name"] for check in data["checks"] if check["status"] == "missing"]
    assert {"GPU", "TensorRT"} <= set(missing)
    assert all(check["fix"] for check in data["checks"] if check["status"] != "ok")
    assert all(name in text for name in missing)
    assert text.count("→") == len([check for check in data["checks"] if check["status"] == "warning"]) + 1


def test_without_a_gpu_one_line_names_all_that_only_a_gpu_needs(gpu_machine, capsys):
    gpu_machine.update({"gpu": None, "versions": {}, "library": replace(gpu_machine["library"], library=None)})
    del gpu_machine["modules"]["tensorrt"]
    assert main(["doctor"]) == 0
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert len(missing) == 1
    assert missing[0].endswith("CUDA sees no GPU; also missing for a GPU: TensorRT, cuda-bindings, CUDA library")
    del gpu_machine["modules"]["onnxruntime"]  # which a CPU needs, too
    assert main(["doctor"]) == 1
    assert "missing ONNX Runtime" in capsys.readouterr().out


def test_a_cpu_without_vnni_is_named(gpu_machine, monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: AMD EPYC 7763 64-Core Processor\nflags\t\t: fpu avx2\n\n" * 2)
    monkeypatch.setattr(machine, "int8_saturates", lambda: True)
    assert "no VNNI: INT8 bundles run on exact kernels" in checks()["CPU"].text
    assert machine._cpu(file).text.startswith("AMD EPYC 7763 64-Core Processor, no VNNI")
    gpu_machine["modules"] = {}  # without ONNX Runtime there is no product to speak of
    assert machine._cpu(file).text == "AMD EPYC 7763 64-Core Processor"


def test_a_cpu_whose_products_are_exact(gpu_machine, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "int8_saturates", lambda: False)
    assert machine._cpu(tmp_path / "none").text == platform.machine()


def test_json_on_standard_output_replaces_the_text(gpu_machine, capsys):
    assert main(["doctor", "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ready"] == ["tensorrt", "ort-cuda", "ort-cpu"]
    gpu = next(check for check in data["checks"] if check["name"] == "GPU")
    assert gpu == {
        "name": "GPU",
        "status": "ok",
        "text": "NVIDIA H200, compute capability 9.0, 149.3 GB",
        "fix": "",
        "backends": [],
    }


def test_a_complete_machine_runs_every_backend(gpu_machine):
    diagnosis = diagnose()
    assert diagnosis.ready == ("tensorrt", "ort-cuda", "ort-cpu")
    assert {check.status for check in diagnosis.checks if check.name != "CUDA toolkit"} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "missing", "fix", "ready"),
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
def test_what_is_missing_and_its_fix(gpu_machine, changes, missing, fix, ready):
    gpu_machine.update(changes)
    check = checks()[missing]
    assert check.status == "missing"
    assert fix in check.fix
    assert diagnose().ready == ready


def test_tensorrt_in_another_interpreter(gpu_machine):
    del gpu_machine["modules"]["tensorrt"]
    gpu_machine["others"] = [("/usr/bin/python3", "8.6.2", "3.10")]
    found = checks()["TensorRT"]
    assert "8.6.2 in /usr/bin/python3" in found.text
    assert "--system-site-packages" in found.fix


def test_a_plugin_for_another_tensorrt(gpu_machine):
    gpu_machine["plugin"] = replace(gpu_machine["plugin"], api="V3")
    found = checks()["TensorRT plugins"]
    assert found.status == "warning"
    assert "--tensorrt-include" in found.fix


def test_without_cublaslt_it_says_what_does_not_run(gpu_machine):
    assert checks()["cuBLASLt"].text == "libcublasLt.so.13"

    def fail(library):
        raise TangoError("version: none can be loaded", "pip install nvidia-cublas")

    gpu_machine["cublaslt"] = fail
    found = checks()["cuBLASLt"]
    assert (found.status, found.text) == ("warning", "no device graphs in fp16 or FP8: version: none can be loaded")
    assert found.fix == "pip install nvidia-cublas"


def test_which_library_is_in_use_and_why_another_is_not(gpu_machine):
    reasons = ("built on this machine: it has no code for this GPU",)
    gpu_machine["library"] = replace(gpu_machine["library"], passed_over=reasons)
    found = checks()["CUDA library"]
    assert found.status == "ok"
    assert found.text.endswith(f"sm_90a; prebuilt; not used: {reasons[0]}")
    gpu_machine["library"] = replace(gpu_machine["library"], library=None)
    found = checks()["CUDA library"]
    assert (found.status, found.text, found.fix) == ("missing", reasons[0], "tango plugin build")


def test_tensorrt_of_a_python_that_is_too_old(gpu_machine):
    del gpu_machine["modules"]["tensorrt"]
    gpu_machine["others"] = [("/usr/bin/python3", "8.5.2", "3.8")]
    found = checks()["TensorRT"]
    assert "whose Python 3.8 is too old" in found.text
    assert "from C++" in found.fix


def test_on_a_jetson_what_is_missing_is_not_in_the_index(gpu_machine):
    gpu_machine["l4t"] = (36, 5, 0)
    gpu_machine["modules"]["onnxruntime"].get_available_providers = staticmethod(lambda: ["CPUExecutionProvider"])
    assert "tango build BUNDLE" in checks()["ONNX Runtime CUDA"].fix
    gpu_machine.update({"l4t": (35, 4, 1), "modules": {}})
    found = checks()["TensorRT"]
    assert "the JetPack's is for Python 3.8" in found.text
    assert "from C++" in found.fix


def test_a_tensorrt_without_kernels_for_orin(gpu_machine):
    gpu_machine["modules"]["tensorrt"].__version__ = "10.13.3.9"
    assert checks()["TensorRT"].status == "ok"
    gpu_machine["gpu"] = replace(H200, compute_capability="8.7", name="Orin")
    found = checks()["TensorRT"]
    assert (found.status, found.backends) == ("missing", ("tensorrt",))
    assert "no kernels for sm_87" in found.text
    gpu_machine["modules"]["tensorrt"].__version__ = "10.16.1.11"
    assert checks()["TensorRT"].status == "ok"


@pytest.mark.parametrize(("capability", "served"), [("8.7", False), ("11.0", False), ("12.1", True), ("9.0", True)])
def test_an_onnxruntime_without_kernels_for_this_gpu(gpu_machine, monkeypatch, capability, served):
    kernels = Kernels(frozenset({89, 90, 120, 121}), frozenset())  # those of PyPI's 1.31.1 for aarch64
    monkeypatch.setattr(packages, "kernels_of", lambda library: kernels)
    gpu_machine["gpu"] = replace(H200, compute_capability=capability)
    found = checks()
    assert ("ONNX Runtime CUDA" not in found) == served
    assert ("ort-cuda" in diagnose().ready) == served
    if not served:
        assert "sm_89, sm_90, sm_120, sm_121" in found["ONNX Runtime CUDA"].text
        assert "tango build" in found["ONNX Runtime CUDA"].fix


def test_driver_version(tmp_path):
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27\nGCC version: 12\n")
    assert machine._driver_version(file) == "580.82.07"


def test_engines_of_a_bundle(gpu_machine, bundle, tmp_path):
    from tests.runtime.engines.test_engines import put

    loaded = Bundle.load(shutil.copytree(bundle(), tmp_path / "bundle"))
    assert diagnose(loaded.path).ready == ("ort-cuda", "ort-cpu")
    gpu_machine["gpu"] = None
    assert "engines" not in checks(loaded.path)  # which a CPU does not need
    gpu_machine["gpu"] = H200
    this = Target("8.6.0", "9.0", "NVIDIA H200", "1")
    for one in plan_engines(loaded, this, BuildOptions(max_frames=9)):
        put(one, this)
    found = checks(loaded.path)
    assert "1 to 9 frames" in found["vision engine"].text
    assert diagnose(loaded.path, verify=True).ready[0] == "tensorrt"
    gpu_machine["gpu"] = replace(H200, compute_capability="8.7", name="Orin")
    found = checks(loaded.path)["decoder engine"]
    assert found.status == "missing"
    assert "9.0" in found.text
    assert "tango build" in found.fix
    gpu_machine["gpu"] = None
    assert "none can run here without a GPU" in checks(loaded.path)["engines"].text


def test_engines_of_a_changed_graph_are_listed_for_removal(gpu_machine, bundle, tmp_path):
    from tests.runtime.engines.test_engines import put

    loaded = Bundle.load(shutil.copytree(bundle(), tmp_path / "bundle"))
    this = Target("8.6.0", "9.0", "NVIDIA H200", "1")
    one = put(plan_engines(loaded, this, BuildOptions(), ["vision"])[0], this)
    manifest = loaded.path / "bundle.json"
    digest = loaded.manifest.files[loaded.engine_graph("vision", "device").name].sha256
    manifest.write_text(manifest.read_text().replace(digest, "0" * 64))
    assert str(one.path) in checks(loaded.path)["engines/"].fix


@pytest.mark.parametrize("capability", ["8.7", "8.9"])
def test_a_bundle_in_fp8_needs_a_gpu_that_has_it(gpu_machine, bundle, capability):
    gpu_machine["gpu"] = replace(H200, compute_capability=capability)
    loaded = Bundle.load(bundle())
    vision = replace(loaded.manifest.graphs["vision"], quantization=Quantization("fp8", 4, ()))
    graphs = {**loaded.manifest.graphs, "vision": vision}
    found = check_bundle(
        replace(loaded, manifest=replace(loaded.manifest, graphs=graphs)), machine.check_machine(), verify=False
    )
    precision = {check.name: check for check in found}.get("precision")
    assert (precision is None) == (capability == "8.9")
    if precision is not None:
        assert precision.text.endswith("fp8 needs a GPU of compute capability 8.9 or later, and this one has 8.7")
        assert set(precision.backends) == {"tensorrt", "ort-cuda"}


def test_a_missing_bundle(gpu_machine, tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: there is no bundle at {tmp_path / 'none'}" in err
