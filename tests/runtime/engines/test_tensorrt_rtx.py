"""The graphs in a builder of TensorRT 11's API that needs no GPU: TensorRT-RTX builds engines ahead of time.

It is not TensorRT 10 or 11. It holds the worker and the graphs to what these versions share: a strongly typed network,
their parser, their names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import onnx
import pytest

from tango_calibration.quantization.calibrate import CalibrationRequest, calibrate
from tango_export.graph.operators import FUNCTIONS
from tango_plugins import op
from tango_runtime.bundle import Bundle
from tango_runtime.engines import BuildOptions, Target, plan_engines
from tango_runtime.engines.worker import Job

pytest.importorskip(
    "tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: pip install 'tango-edge[test]' on Linux x86-64"
)

NEWEST = Target("11.0.0", "9.0", "TensorRT-RTX", plugin="1")


def run_worker(bundle, graph, output, form="portable", plugins=None, **options):
    """Builds a graph's engine as `tango build` does; returns the last message of the worker, and its log."""
    (planned,) = plan_engines(bundle, NEWEST, BuildOptions(form=form, **options), [graph])
    assert "STRONGLY_TYPED" in planned.spec.flags
    inputs, cache = bundle.manifest.graphs[graph].inputs, output.with_suffix(".cache")
    model, parent = str(bundle.engine_graph(graph, form)), os.getpid()
    job = Job(planned.spec, model, inputs, str(plugins) if plugins else None, str(output), str(cache), parent)
    paths = [str(Path(__file__).parents[2] / "fakes" / "tensorrt_rtx"), *sys.path]
    linked = link_rtx(output.parent) if plugins else os.environ.get("LD_LIBRARY_PATH", "")
    done = subprocess.run(
        [sys.executable, "-m", "tango_runtime.engines.worker"],
        input=json.dumps(asdict(job)),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LD_LIBRARY_PATH": linked},
        capture_output=True,
        text=True,
        check=False,
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def link_rtx(folder):
    """A folder where the parser finds the library by the name that it opens for a plugin, and the package has not."""
    (library,) = Path(import_module("tensorrt_rtx_libs").__file__).parent.glob("libtensorrt_rtx.so.*")
    link = folder / "libtensorrt_rtx.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library)
    return str(folder)


@pytest.mark.parametrize(
    ("graph", "precision"), [("vision", "fp16"), ("embed", "fp16"), ("decoder", "fp16"), ("decoder", "fp32")]
)
def test_a_strongly_typed_engine_is_built(bundle, tmp_path, graph, precision):
    engine = tmp_path / "engine"
    message, log = run_worker(Bundle.load(bundle(precision=precision)), graph, engine)
    assert "peak_host" in message, log
    assert engine.stat().st_size > 0


@pytest.mark.parametrize("graph", ["vision", "decoder_low", "decoder_high"])
def test_engines_of_llava_video_with_inner_pruning_are_built(responsive_checkpoint, tmp_path, graph):
    _, folder = responsive_checkpoint("llava-video", image=126, layers=4, inner=(2, 0.5), dtype="fp16")
    message, log = run_worker(Bundle.load(folder), graph, tmp_path / "engine")
    assert "peak_host" in message, log
    assert (tmp_path / "engine").stat().st_size > 0


@pytest.mark.nvcc
@pytest.mark.parametrize("graph", ["vision", "embed", "decoder"])
def test_an_engine_of_a_device_graph_has_plugins_and_no_weights(bundle, tmp_path, v3_plugins, graph):
    loaded, engine = Bundle.load(shutil.copytree(bundle(), tmp_path / "bundle")), tmp_path / "engine"
    weights = loaded.path / loaded.manifest.graphs[graph].data
    data = weights.read_bytes()
    weights.unlink()  # a build does not even open them
    message, log = run_worker(loaded, graph, engine, "device", v3_plugins)
    assert "peak_host" in message, log
    content = engine.read_bytes()
    model = onnx.load(loaded.engine_graph(graph, "device")).graph
    operators = {node.op_type for node in model.node if node.domain}
    assert {name for name in FUNCTIONS if name.encode() in content} == operators
    assert graph == "embed" or operators
    for name, weight in loaded.manifest.graphs[graph].device_weights.items():
        if weight.end - weight.offset > 256:
            assert data[weight.offset : weight.end] not in content, name
    products = sum(node.op_type == "MatMul" for node in model.node)
    assert content.count(b"accumulation_type") <= products  # those of stored matrices are plugins


def test_without_the_plugins_no_function_takes_their_place(bundle, tmp_path):
    message, log = run_worker(Bundle.load(bundle()), "decoder", tmp_path / "engine", "device")
    assert "RMSNorm" in message["error"], log


@pytest.fixture(scope="module")
def v3_plugins(tensorrt_version, emulated_plugins):
    if tensorrt_version < (10, 0):
        pytest.skip("these headers are of TensorRT 8: its plugins are not those of 10")
    return emulated_plugins


@pytest.mark.parametrize(
    ("graph", "options"),
    [
        ("vision", {"frame": (112, 224)}),  # whole windows
        ("vision", {"frame": (140, 252), "max_frames": 8}),  # windows cut on both sides, any number of steps
        ("embed", {}),
        ("decoder", {}),
    ],
)
def test_an_engine_of_qwen_is_built_for_one_frame_size(qwen_bundle, tmp_path, graph, options):
    engine = tmp_path / "engine"
    message, log = run_worker(Bundle.load(qwen_bundle(precision="fp16")), graph, engine, **options)
    assert "peak_host" in message, log
    assert engine.stat().st_size > 0


def quantized(folder, output, **precisions):
    """A bundle for TensorRT whose graphs have other precisions."""
    sizes = {"videos": 4, "frames": 8, "max_new_tokens": 2, "cache": output.parent / "cache"}
    calibrate(CalibrationRequest(folder, output, "synthetic", runtime="tensorrt", **precisions, **sizes))
    return Bundle.load(output)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_engines_of_quantized_graphs_are_built(responsive_checkpoint, tmp_path, precision):
    _, folder = responsive_checkpoint(dtype="fp16")
    bundle = quantized(folder, tmp_path / "less", vision=precision, decoder=precision)
    for graph in ("vision", "decoder"):
        assert bundle.manifest.graphs[graph].quantization.precision == precision
        message, log = run_worker(bundle, graph, tmp_path / graph)
        assert "peak_host" in message, log


def test_an_engine_of_qwens_quantized_tower_is_built(responsive_qwen, tmp_path):
    _, folder = responsive_qwen(dtype="fp16")
    bundle = quantized(folder, tmp_path / "less", vision="int8")
    assert bundle.manifest.graphs["vision"].quantization.precision == "int8"
    message, log = run_worker(bundle, "vision", tmp_path / "engine", frame=(112, 224))
    assert "peak_host" in message, log


@pytest.mark.nvcc
def test_prune_onnx_is_built_through_its_plugin(bundle, tmp_path, v3_plugins):
    engine, script = tmp_path / "engine", Path(__file__).with_name("rtx_prune.py")
    model = Bundle.load(bundle()).engine_graph("prune")
    done = subprocess.run(
        [sys.executable, script, model, v3_plugins, engine],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "LD_LIBRARY_PATH": link_rtx(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert op.NAME.encode() in engine.read_bytes()


def test_a_graph_that_the_parser_cannot_read_is_named(bundle, tmp_path):
    loaded = Bundle.load(shutil.copytree(bundle(), tmp_path / "bundle"))
    loaded.engine_graph("embed").write_bytes(b"no graph")
    message, log = run_worker(loaded, "embed", tmp_path / "engine")
    assert "embed.onnx" in message["error"], log
    assert not (tmp_path / "engine").exists()
