"""`tango inspect`: the bundle, the precision of its graphs, and which engines fit."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest

from tango_plugins import TangoError
from tango_runtime.bundle import Bundle, Quantization, describe, write_manifest
from tango_runtime.cli import inspect as inspect_command
from tango_runtime.cli.main import main
from tango_runtime.system import gpu as system
from tests.runtime.engines.test_engines import H200, ORIN, planned, put


@pytest.fixture
def inspect(bundle, tmp_path, capsys):
    """``inspect(*options)`` returns the output for ``inspect.bundle``, a bundle that may be edited."""
    folder = shutil.copytree(bundle(), tmp_path / "bundle")

    def printed(*options):
        assert main(["inspect", str(folder), *options]) == 0
        return capsys.readouterr().out

    printed.bundle = Bundle.load(folder)
    return printed


@pytest.fixture
def this_machine(monkeypatch):
    """The machine is an H200 with TensorRT 8.6."""
    monkeypatch.setattr(inspect_command, "_target", lambda: (H200, ""))


def line_of(out, one):
    (line,) = [line for line in out.splitlines() if one.path.name in line]
    return line


def test_facts_about_the_bundle(inspect, monkeypatch):
    monkeypatch.setattr(inspect_command, "_target", None)  # there are no engines to check
    out = inspect("--verify")
    facts = "llava-ov, float16", "frames of 112x112, 16 tokens each", "vision", "decoder", "SHA", "more"
    assert all(text in out for text in facts)
    assert ".engine" not in out


def test_precision_of_each_graph(inspect):
    manifest = inspect.bundle.manifest
    spec = replace(manifest.graphs["decoder"], quantization=Quantization("int8", 5, ("lm_head", "norm")))
    write_manifest(inspect.bundle.path, replace(manifest, graphs=manifest.graphs | {"decoder": spec}))
    out = inspect()
    assert all(text in out for text in ("int8", "5 clips", "2 excluded", "float16"))


def test_device_graphs_are_shown_and_counted(inspect):
    manifest = inspect.bundle.manifest
    portable = {name: replace(spec, device=None) for name, spec in manifest.graphs.items()}
    write_manifest(inspect.bundle.path, replace(manifest, graphs=portable))
    assert "and device" not in inspect()
    spec, file = manifest.graphs["prune"], inspect.bundle.path / "prune.device.onnx"
    file.write_bytes(onnx.ModelProto(doc_string=7_200_000 * "x").SerializeToString())
    graphs = portable | {"prune": replace(spec, device=replace(spec, file=file.name))}
    files = manifest.files | {file.name: describe(file)}
    write_manifest(inspect.bundle.path, replace(manifest, graphs=graphs, files=files))
    out = inspect()
    assert "and device" in out
    assert " 7.2" in out


def test_which_engines_fit(inspect, this_machine):
    mine, other = planned(inspect.bundle), planned(inspect.bundle, ORIN)
    fits, foreign = put(mine["vision"], content=b"e" * 300_000), put(other["vision"], ORIN)
    cut, changed, unread = put(mine["embed"]), put(mine["decoder"]), put(mine["prune"])
    cut.path.write_bytes(b"")
    changed.path.write_bytes(b"ENGINE")
    unread.path.with_suffix(".json").write_text("{")
    out = inspect()
    assert line_of(out, fits) == f"engine   {fits.path.name}, 0.3 MB: fits"
    assert "was built with TensorRT 10.3.0, this is 8.6.0" in line_of(out, foreign)
    assert "has 0 bytes, its sidecar says 6" in line_of(out, cut)
    assert line_of(out, changed).endswith("fits")
    assert "is not JSON" in line_of(out, unread)
    assert "has changed" in line_of(inspect("--verify"), changed)


def test_an_engine_of_another_gpu_is_mentioned(inspect, this_machine):
    one = put(planned(inspect.bundle)["embed"], gpu="NVIDIA H100")
    assert "fits; " in (line := line_of(inspect(), one))
    assert "NVIDIA H100" in line
    assert line.count(one.path.name) == 1


def test_without_tensorrt_it_cannot_tell_which_engines_fit(inspect, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    engine = put(planned(inspect.bundle)["embed"])
    line = line_of(inspect(), engine)
    assert "built with TensorRT 8.6.0 on NVIDIA H200; cannot tell whether it fits: TensorRT cannot be imported" in line


def test_without_a_gpu_it_cannot_tell_which_engines_fit(inspect, monkeypatch):
    def no_gpu():
        raise TangoError("CUDA sees no GPU", "")

    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.0"))
    monkeypatch.setattr(system, "gpu", no_gpu)
    engine = put(planned(inspect.bundle)["embed"])
    line = line_of(inspect(), engine)
    assert line.endswith("on NVIDIA H200; cannot tell whether it fits: CUDA sees no GPU")


@pytest.mark.parametrize(
    ("name", "shown"), [("[/x]", "[/x]"), ("[red]x", "[red]x"), (":smile:", ":smile:"), ("a\x1b[2J", r"a\x1b[2J")]
)
def test_a_strangers_names_are_shown_as_they_are(inspect, name, shown):
    manifest = inspect.bundle.manifest
    prune = manifest.graphs["prune"]
    inputs = (replace(prune.inputs[0], name=name), *prune.inputs[1:])
    changed = replace(manifest, family=name, graphs=manifest.graphs | {"prune": replace(prune, inputs=inputs)})
    write_manifest(inspect.bundle.path, changed)
    out = inspect()
    assert f": {shown}, float16" in out
    assert out.count(shown) == 2
