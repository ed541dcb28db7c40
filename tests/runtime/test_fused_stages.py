"""The stages with fused graphs, with the GPU's memory emulated on the host and ONNX Runtime's CPU kernels."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from tango_runtime import VideoLLM
from tango_runtime.bundle import Bundle, describe, write_manifest
from tango_runtime.device import Stream
from tango_runtime.stages.cuda import CudaStages
from tango_runtime.stages.fused import FusedGraphs
from tests.runtime.host_cuda import install

QUESTION = "What happens in the video?"


@pytest.fixture(scope="module")
def fused(talkative, tmp_path_factory):
    """``fused("fp32")``: a bundle with fused graphs; ``tango-export --fused`` writes them in fp16 only."""
    from tango_export.export import DTYPES, find_preset, open_model
    from tango_export.fused import write_fused_graph

    @cache
    def made(dtype):
        llava, bundle = talkative(dtype=dtype)
        folder = shutil.copytree(bundle, tmp_path_factory.mktemp("fused") / dtype)
        manifest = Bundle.load(folder).manifest
        model = open_model(find_preset("llava-ov")[0], str(llava), str(llava.parent / "siglip"), DTYPES[dtype], 2048)
        graphs, files = dict(manifest.graphs), dict(manifest.files)
        for graph in model.graphs:
            if graph.name != "embed":
                spec = write_fused_graph(graph, folder, 2048)
                graphs[graph.name] = replace(graphs[graph.name], fused=spec)
                files[spec.file] = describe(folder / spec.file)
        write_manifest(folder, replace(manifest, graphs=graphs, files=files))
        return folder

    return made


@pytest.fixture
def make(fused, monkeypatch):
    """``make(dtype, **limits)``: a chain with the fused graphs, and one with the CPU's plain ones."""
    import onnxruntime

    install(monkeypatch)

    def made(dtype="fp32", **limits):
        plain, llm = VideoLLM(fused(dtype), "onnxruntime-cpu"), VideoLLM(fused(dtype), "onnxruntime-cpu")
        stream = Stream()
        graphs = FusedGraphs(onnxruntime, llm.bundle, stream, ("CPUExecutionProvider", "cpu"))
        for name, value in limits.items():
            setattr(graphs, name, value)
        llm._stages = CudaStages(llm.bundle, graphs, stream)
        return llm, plain

    return made


def close(found, wanted, tolerance=1e-4):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("limits", [{}, {"tokens_at_once": 16, "frames_at_once": 3}, {"tokens_at_once": 7}])
def test_sixty_four_tokens_are_the_plain_graphs(make, colours, limits, prune):
    llm, plain = make(**limits)
    options = {"frames": 8, "prune": prune, "max_new_tokens": 64}
    found, wanted = (each.generate(colours, QUESTION, **options) for each in (llm, plain))
    np.testing.assert_array_equal(found.indices, wanted.indices)
    assert found.ids == wanted.ids


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("fp16", 3e-2)])
def test_text_follows_text_and_is_rewound(make, dtype, tolerance):
    ids, heard = np.arange(20, 29), []
    for llm in make(dtype):
        stages, rows = llm._stages, []
        tokens = np.random.default_rng(0).standard_normal((30, llm.bundle.manifest.decoder.width))
        tokens = tokens.astype(llm.bundle.manifest.dtype)
        stages.prefill([stages.embed(ids), tokens, stages.embed(ids[:1])], 64)
        for question in (ids[:5], ids[3:4], ids[:5]):
            stages.rewind(40)
            rows.append(np.array(stages.extend(stages.embed(question))))
            rows += [np.array(stages.decode(token)) for token in (5, 9)]
        heard.append(np.stack(rows))
    close(*heard, tolerance)
    np.testing.assert_array_equal(heard[0][:3], heard[0][6:])


def test_a_prompt_of_one_token_and_one_that_fills_the_context(make):
    for count in (1, 2047):
        heard = []
        for llm in make():
            stages = llm._stages
            rows = [np.array(stages.prefill([stages.embed(np.arange(count) % 200)], 2048))]
            heard.append(np.stack([*rows, np.array(stages.decode(7))]))
        close(*heard)


def test_a_step_is_told_the_least_bound_that_holds_the_sequence(make, monkeypatch):
    used, bind = [], FusedGraphs._bind

    def spy(self, graph, tensors, replay, **entries):
        run = bind(self, graph, tensors, replay, **entries)
        told = [(int(t[0]), entries["gpu_graph_id"]) for t in tensors.values() if isinstance(t, np.ndarray)]
        return lambda: (used.extend(told), run())

    monkeypatch.setattr(FusedGraphs, "_bind", spy)
    heard = []
    for bounds in ([16, 64], []):
        llm, _ = make(bounds=bounds)
        stages = llm._stages
        stages.prefill([stages.embed(np.arange(14))], 100)
        rows = [np.array(stages.decode(token)) for token in range(4)]
        stages.rewind(14)
        heard.append([*rows, np.array(stages.decode(0)), np.array(stages.extend(stages.embed(np.arange(90))))])
        stages.decode(1)
    first, whole = (14, "-1"), (2048, "2048")
    assert used[:8] == [first, (16, "16"), (16, "16"), (64, "64"), (64, "64"), (16, "16"), (2048, "-1"), whole]
    assert used[8:] == [first, *5 * [whole], (2048, "-1"), whole]
    close(*map(np.stack, heard))


def test_bounds_end_below_the_capacity_and_nothing_waits(make):
    stages = make()[0]._stages
    assert stages._graphs.bounds == [1024]
    assert list(stages._steps) == [1024]  # the others when a sequence is so long
    assert not stages._graphs.waiting


def test_what_an_overflow_left_in_the_cache_is_forgotten(make, frames):
    llm, _ = make()
    wanted = llm.generate(frames, QUESTION, max_new_tokens=8).ids
    held = llm._stages._cache._all
    llm._stages._stream.upload(np.full(held.shape, np.nan), held)
    assert llm.generate(frames, QUESTION, max_new_tokens=8).ids == wanted


def test_a_bundle_without_fused_graphs_runs_its_plain_ones(spoken, monkeypatch, colours):
    import onnxruntime

    install(monkeypatch)
    llm = VideoLLM(spoken, "onnxruntime-cpu")
    wanted, stream = [llm.generate(colours, text, max_new_tokens=8).ids for text in (QUESTION, "Where?")], Stream()
    graphs = FusedGraphs(onnxruntime, llm.bundle, stream, ("CPUExecutionProvider", "cpu"))
    assert not graphs.in_place
    llm._stages = CudaStages(llm.bundle, graphs, stream)
    assert [llm.generate(colours, text, max_new_tokens=8).ids for text in (QUESTION, "Where?")] == wanted
