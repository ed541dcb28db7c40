"""The product that runs while engines are loaded."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tango_plugins import native_library
from tango_runtime.backends.cuda import products, tensorrt
from tango_runtime.bundle import Bundle
from tango_runtime.system import gpu as system
from tests.fakes.cuda import install
from tests.fakes.device_graphs import with_device_graphs
from tests.fakes.tensorrt_engines import build, open_backend

LIBRARY = Path("libtango.so")


@pytest.fixture
def host(monkeypatch):
    return install(monkeypatch)


def library(monkeypatch, status=0):
    """A CUDA library that notes the products of which it is asked."""
    asked = []

    def product(shape, tensors, stream):
        shape, tensors = shape._obj, tensors._obj
        asked.append((shape.rows, shape.inputs, shape.outputs, tensors.x, tensors.weight, tensors.y, stream))
        return status

    functions = dict.fromkeys(("tango_fp16_linear_enqueue", "tango_fp16_linear_gelu_enqueue"), product)
    loaded = SimpleNamespace(**functions, tango_last_error=lambda: b"linear: none of libcublasLt.so can be loaded")
    monkeypatch.setattr(native_library, "load", lambda path: {LIBRARY: loaded}[path])
    return asked


def test_both_products_run_in_memory_that_is_given_back(host, monkeypatch):
    asked, inside = library(monkeypatch), host.cudaStreamSynchronize

    def synchronize(stream):
        for rows, inputs, outputs, x, weight, y, _ in asked:
            for address, elements in ((x, rows * inputs), (weight, inputs * outputs), (y, rows * outputs)):
                host.inside(address, 2 * elements)
        return inside(stream)

    monkeypatch.setattr(host, "cudaStreamSynchronize", synchronize)
    products.start_products(LIBRARY)
    assert len(asked) == 2
    assert not host.blocks


def test_a_failure_is_left_to_the_product_that_needs_what_failed(host, monkeypatch, caplog):
    library(monkeypatch, status=3)
    with caplog.at_level(logging.DEBUG):
        products.start_products(LIBRARY)
    assert "no product was run in advance: linear: none of libcublasLt.so can be loaded" in caplog.text
    assert not host.blocks


@pytest.fixture(scope="module")
def fused(responsive_checkpoint, tmp_path_factory):
    """A bundle with device graphs, and engines of them."""
    _, bundle = responsive_checkpoint(dtype="fp32")
    folder = with_device_graphs(bundle, tmp_path_factory.mktemp("products") / "fp32", "fp32")
    build(folder, max_frames=8, max_tokens=600, context=2048)
    return folder


def opened(folder, host, monkeypatch, start):
    """Opens a bundle's engines with another function in the place of the product."""
    monkeypatch.setattr(system, "plugin", lambda: system.Plugin(LIBRARY, "1", "V2"))
    monkeypatch.setattr(tensorrt, "start_products", start)
    return open_backend(Bundle.load(folder), host, monkeypatch)


def test_it_runs_beside_the_loading_and_is_waited_for(host, fused, monkeypatch):
    ran = []
    opened(fused, host, monkeypatch, lambda path: ran.append((path, threading.current_thread())))
    ((path, thread),) = ran
    assert path == LIBRARY
    assert thread is not threading.main_thread()
    assert not thread.is_alive()


def test_what_is_wrong_with_it_is_told(host, fused, monkeypatch):
    def start(path):
        raise RuntimeError("not a failure of CUDA")

    with pytest.raises(RuntimeError, match="not a failure of CUDA"):
        opened(fused, host, monkeypatch, start)


def test_engines_without_plugins_run_none(host, tiny_bundle, tmp_path, monkeypatch):
    folder, ran = shutil.copytree(tiny_bundle, tmp_path / "bundle"), []
    build(folder, max_frames=8, max_tokens=100, context=600)
    opened(folder, host, monkeypatch, ran.append)
    assert ran == []
