"""`tango inspect`: the bundle, its graphs' precision, its engines and whether they fit."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import pytest

from tango_plugins import TangoError
from tango_runtime.bundle import Bundle, Quantization, describe, write_manifest
from tango_runtime.cli import inspect as inspect_command
from tango_runtime.cli.main import main
from tests.runtime.engines.test_engines import H200, ORIN, planned, put


@pytest.fixture
def inspect(bundle, tmp_path, capsys):
    """``inspect(*options)``: the bundle, and what is printed of it; ``.bundle`` may be changed."""
    folder = shutil.copytree(bundle(), tmp_path / "bundle")

    def printed(*options):
        assert main(["inspect", str(folder), *options]) == 0
        return capsys.readouterr().out

    printed.bundle = Bundle.load(folder)
    return printed


@pytest.fixture
def this_machine(monkeypatch):
    """The machine is an H200 with TensorRT 8.6."""
    monkeypatch.setattr(inspect_command, "_machine", lambda: (H200, ""))


def line_of(out, one):
    (line,) = [line for line in out.splitlines() if one.path.name in line]
    return line


def test_the_bundle(inspect, monkeypatch):
    monkeypatch.setattr(inspect_command, "_machine", None)  # there are no engines to be asked about
    out = inspect("--verify")
    told = "llava-ov, float16", "frames of 112x112, 16 tokens each", "vision", "decoder", "SHA", "more"
    assert all(text in out for text in told)
    assert ".engine" not in out


def test_precision_of_each_graph(inspect):
    manifest = inspect.bundle.manifest
    spec = replace(manifest.graphs["decoder"], quantization=Quantization("int8", 5, ("lm_head", "norm")))
    write_manifest(inspect.bundle.path, replace(manifest, graphs=manifest.graphs | {"decoder": spec}))
    out = inspect()
    assert all(text in out for text in ("int8", "5 clips", "2 excluded", "float16"))


def test_device_graphs_are_listed_and_counted(inspect):
    manifest = inspect.bundle.manifest
    portable = {name: replace(spec, device=None) for name, spec in manifest.graphs.items()}
    write_manifest(inspect.bundle.path, replace(manifest, graphs=portable))
    assert "and device" not in inspect()
    spec, file = manifest.graphs["prune"], inspect.bundle.path / "prune.device.onnx"
    file.write_bytes(bytes(7_200_000))
    graphs = portable | {"prune": replace(spec, device=replace(spec, file=file.name))}
    files = manifest.files | {file.name: describe(file)}
    write_manifest(inspect.bundle.path, replace(manifest, graphs=graphs, files=files))
    out = inspect()
    assert "and device" in out
    assert " 7.2" in out


def test_engines_and_whether_they_fit(inspect, this_machine):
    mine, other = planned(inspect.bundle), planned(inspect.bundle, ORIN)
    fits, foreign = put(mine["vision"], content=b"e" * 300_000), put(other["vision"], ORIN)
    cut, changed, unread = put(mine["embed"]), put(mine["decoder"]), put(mine["prune"])
    cut.path.write_bytes(b"")
    changed.path.write_bytes(b"ENGINE")
    unread.path.with_suffix(".json").write_text("{")
    out = inspect()
    assert line_of(out, fits) == f"engine   {fits.path.name}, 0.3 MB: fits"
    assert "was made with TensorRT 10.3.0, here is 8.6.0" in line_of(out, foreign)
    assert "has 0 bytes, its sidecar says 6" in line_of(out, cut)
    assert line_of(out, changed).endswith("fits")
    assert "is not JSON" in line_of(out, unread)
    assert "has changed" in line_of(inspect("--verify"), changed)


def test_an_engine_of_another_gpu_is_told_of(inspect, this_machine):
    one = put(planned(inspect.bundle)["embed"], gpu="NVIDIA H100")
    assert "fits; " in (line := line_of(inspect(), one))
    assert "NVIDIA H100" in line
    assert line.count(one.path.name) == 1


@pytest.mark.parametrize(("error", "told"), [(ImportError(), "TensorRT"), (TangoError("CUDA sees no GPU", ""), "GPU")])
def test_without_tensorrt_or_a_gpu_nobody_knows(inspect, monkeypatch, error, told):
    def refused(version):
        raise error

    monkeypatch.setitem(sys.modules, "tensorrt", type("module", (), {"__version__": "8.6.0"}))
    monkeypatch.setattr(inspect_command, "here", refused)
    one = put(planned(inspect.bundle)["embed"])
    line = line_of(inspect(), one)
    assert "made with TensorRT 8.6.0 on NVIDIA H200; whether it fits is not known" in line
    assert told in line
