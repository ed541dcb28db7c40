"""Engines that cannot be used, builds that end early, builds side by side: refused or whole, never half."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tango_plugins import TangoError
from tango_runtime import VideoLLM, engines
from tango_runtime.backends.registry import select


@pytest.fixture(params=["portable", "device"])
def copy(request, built, tmp_path):
    """A bundle with engines of either form that may be spoilt."""
    return shutil.copytree(built("fp16", request.param), tmp_path / "bundle")


def engine_of(folder, graph="decoder"):
    (found,) = (folder / "engines").glob(f"{graph}-*.engine")
    return found


def edit(folder, **values):
    """Changes the spec in the decoder's sidecar."""
    file = engine_of(folder).with_suffix(".json")
    sidecar = json.loads(file.read_text())
    sidecar["spec"] |= values
    file.write_text(json.dumps(sidecar))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tensorrt": "7.2.1"}, "was built with TensorRT 7.2.1, this is"),
        ({"compute_capability": "5.3"}, "was built for compute capability 5.3, this GPU has"),
        ({"files": {}}, "was built from another graph"),
        ({"plugin": "0"}, "was built with the plugins' interface 0, installed is interface"),
    ],
)
def test_an_engine_for_another_machine_is_refused_before_it_is_loaded(copy, values, message):
    edit(copy, **values)
    engine_of(copy).write_bytes(b"this would not load" + b"\0" * 100)
    with pytest.raises(TangoError, match=message) as refused:
        VideoLLM(copy, "tensorrt")
    assert "tango build" in refused.value.hint


@pytest.mark.parametrize("spoil", ["cut", "garbage"])
def test_a_corrupt_engine_is_refused(copy, spoil):
    engine = engine_of(copy)
    data = engine.read_bytes()
    engine.write_bytes(data[: len(data) // 2] if spoil == "cut" else bytes(len(data)))
    with pytest.raises(TangoError) as refused:
        VideoLLM(copy, "tensorrt")
    assert str(engine) in refused.value.message
    assert "tango build" in refused.value.hint


def test_auto_takes_the_engines_and_says_why_not(copy):
    llm = VideoLLM(copy)
    assert llm.backend.startswith("TensorRT")
    assert llm.fallback_reason == ""
    engine_of(copy).with_suffix(".json").unlink()
    other = select(llm.bundle)
    assert not other.description.startswith("TensorRT")
    assert "has no engine for decoder" in other.fallback_reason


@pytest.fixture
def fresh(folder, tmp_path):
    """A bundle without engines, whose graphs have both forms."""
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    return shutil.copytree(folder("fp16"), tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))


def building(bundle):
    """`tango build` in a process of its own: of device graphs, where the plugins are built."""
    options = ["--graphs", "vision", "embed", "decoder", "--builder-optimization-level", "1"]
    return [sys.executable, "-m", "tango_runtime.cli.main", "build", str(bundle), *options]


def test_a_killed_build_leaves_nothing_half_written(fresh):
    bundle, command = fresh, building(fresh)
    for graph, how in (("vision", signal.SIGINT), ("decoder", signal.SIGKILL)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list((bundle / "engines").glob(f".{graph}-*.partial")):
            time.sleep(0.01)
        process.send_signal(how)
        process.wait()
        for engine in (bundle / "engines").glob("*.engine"):
            file = engine.with_suffix(".json")
            assert not file.exists() or engines.read_sidecar(file).size == engine.stat().st_size
    subprocess.run(command, check=True)
    assert VideoLLM(bundle, "tensorrt").backend.startswith("TensorRT")


def test_two_builds_at_once_make_whole_engines(fresh):
    bundle, command = fresh, building(fresh)
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        error = process.communicate()[1]
        assert process.returncode == 0, error
    assert VideoLLM(bundle, "tensorrt").backend.startswith("TensorRT")
    assert len(list((bundle / "engines").glob("*.engine"))) == 3


def test_a_full_gpu_is_refused_and_the_next_answer_comes(load, video):
    from tango_runtime.backends.cuda.device import Buffer, cudart

    llm = load("fp16")
    wanted = llm.generate(video(1, 8), "What?", frames=4, max_new_tokens=4).ids
    free = cudart().cudaMemGetInfo()[1]
    held = Buffer(free - (64 << 20))
    with pytest.raises(TangoError):
        VideoLLM(llm.bundle.path, "tensorrt" if "TensorRT" in llm.backend else "ort-cuda")._backend._pool.take(
            "more", (128 << 20,), "uint8"
        )
    held.free()
    assert llm.generate(video(1, 8), "What?", frames=4, max_new_tokens=4).ids == wanted
