"""What ONNX Runtime is not asked to run."""

from __future__ import annotations

from dataclasses import replace

import onnxruntime
import pytest

from tango_plugins import TangoError
from tango_runtime.backends.ort_cpu import check_runtime
from tango_runtime.bundle import Bundle, Quantization


@pytest.fixture
def quantized(tiny_bundle):
    """``quantized(precision)``: a bundle whose decoder says that it was quantized."""

    def made(precision):
        bundle = Bundle.load(tiny_bundle)
        decoder = replace(bundle.manifest.graphs["decoder"], quantization=Quantization(precision, 4, ()))
        graphs = bundle.manifest.graphs | {"decoder": decoder}
        return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))

    return made


@pytest.mark.parametrize("version", ["1.19.2", "1.22.1"])
def test_int4_is_refused_on_versions_that_compute_it_wrongly(quantized, monkeypatch, version):
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(TangoError, match=f"ONNX Runtime {version} does not compute the decoder graph") as caught:
        check_runtime(quantized("int4"), "decoder")
    assert caught.value.hint == "pip install 'onnxruntime>=1.23'"
    check_runtime(quantized("int8"), "decoder")


@pytest.mark.parametrize("version", ["1.23.0", "1.31.1", "2.0.0"])
def test_int4_runs_on_later_ones(quantized, monkeypatch, version):
    monkeypatch.setattr(onnxruntime, "__version__", version)
    check_runtime(quantized("int4"), "decoder")
