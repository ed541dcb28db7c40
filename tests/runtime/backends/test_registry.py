"""Which engine a bundle is loaded in, and what is said of those that were passed over."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from tango_plugins import TangoError
from tango_runtime import VideoLLM
from tango_runtime.backends import registry
from tango_runtime.backends.registry import BACKENDS, select
from tango_runtime.bundle import Bundle


@pytest.fixture
def machine(monkeypatch):
    """``machine("ort-cuda")``: one that has these engines and no other."""

    def having(*engines):
        def opened(bundle, engine, threads, nvdec):
            if engine not in engines:
                raise TangoError(f"{engine} is missing", f"install {engine}")
            return SimpleNamespace(description=engine, fallback_reason="")

        monkeypatch.setattr(registry, "_open", opened)

    return having


@pytest.mark.parametrize("first", range(len(BACKENDS)))
def test_auto_takes_the_first_there_is_and_says_why_none_before(machine, first):
    machine(*list(BACKENDS)[first:])
    found = select(None)
    assert found.description == list(BACKENDS)[first]
    assert found.fallback_reason == "; ".join(f"no {name}: {name} is missing" for name in list(BACKENDS)[:first])


def test_an_engine_asked_for_by_name_is_taken_or_refused(machine):
    machine("ort-cpu", "tensorrt")
    assert select(None, "ort-cpu").fallback_reason == ""
    with pytest.raises(TangoError, match="ort-cuda is missing"):
        select(None, "ort-cuda")
    with pytest.raises(TangoError, match="there is no backend 'tpu'"):
        select(None, "tpu")


def test_a_backend_without_a_gpu_decodes_no_videos_there(tiny_bundle, monkeypatch):
    with pytest.raises(TangoError, match="ort-cpu has no GPU that decodes videos"):
        VideoLLM(tiny_bundle, "ort-cpu", nvdec=True)
    opened = []
    module = SimpleNamespace(open_backend=lambda bundle, threads, **options: opened.append(options))
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: module)
    for nvdec in (True, False):
        select(None, "ort-cuda", nvdec=nvdec)
    assert opened == [{"nvdec": True}, {}]


def test_where_nothing_runs_every_reason_is_told(machine):
    machine()
    with pytest.raises(TangoError) as refused:
        select(SimpleNamespace(path="folder"))
    assert all(f"no {name}: {name} is missing" in refused.value.message for name in BACKENDS)
    assert refused.value.hint == "install ort-cpu"


def test_what_this_machine_lacks_is_named(tiny_bundle, monkeypatch):
    bundle = Bundle.load(tiny_bundle)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(TangoError, match="TensorRT cannot be imported"):
        select(bundle, "tensorrt")
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(
        __version__="1.20", get_available_providers=lambda: ["CPUExecutionProvider"]
    ))  # fmt: skip
    with pytest.raises(TangoError, match=r"ONNX Runtime 1\.20 is the one without CUDA"):
        select(bundle, "ort-cuda")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for engine in list(BACKENDS)[1:]:
        with pytest.raises(TangoError, match="ONNX Runtime is not installed"):
            select(bundle, engine)


def test_a_machine_without_cuda_bindings_or_gpu_is_told(monkeypatch):
    from tango_runtime.backends.cuda import device

    device.cudart.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(TangoError, match="cuda-bindings is not installed"):
        device.cudart()
    no_gpu = SimpleNamespace(cudaGetDeviceCount=lambda: (Status(100), None))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=no_gpu))
    with pytest.raises(TangoError, match="no NVIDIA GPU can be used: cudaErrorNoDevice"):
        device.cudart()
    device.cudart.cache_clear()


class Status(int):
    name = "cudaErrorNoDevice"


def test_the_command_says_which_and_why(tiny_bundle, frames, tmp_path, capfd, monkeypatch):
    from PIL import Image

    from tango_runtime.cli.main import main

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    assert main(["run", str(tiny_bundle), str(tmp_path), "What?", "--max-new-tokens", "1"]) == 0
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("backend: "))
    assert line.startswith("backend: ONNX Runtime ")
    if "CPU" in line:
        assert "(no tensorrt: TensorRT cannot be imported" in line
    assert VideoLLM(tiny_bundle, "ort-cpu").fallback_reason == ""
