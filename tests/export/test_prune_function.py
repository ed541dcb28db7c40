"""The function of prune.onnx on ONNX Runtime's CPU provider against the reference."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings

from tango_export.graph.files import write_prune
from tango_export.graph.prune_function import prune_functions
from tango_plugins import PruneParams, op
from tango_plugins.reference import MAX_WINDOW, prune
from tango_runtime.bundle import TensorSpec
from tests.plugins import golden
from tests.plugins.videos import cases, video


@cache
def session(params, dtype):
    """prune.onnx, for features of any number of frames, positions and components."""
    with TemporaryDirectory() as folder:
        write_prune(params, TensorSpec("features", dtype, ("F", "L", "D")), Path(folder))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(f"{folder}/prune.onnx", options, providers=["CPUExecutionProvider"])


def check(X, A, t, params):
    """Runs prune.onnx, and compares with the reference, whose result it returns."""
    feeds = dict(zip(op.INPUTS, (X, A, t), strict=True))
    tokens, indices, count = session(params, X.dtype.name).run(list(op.OUTPUTS), feeds)
    expected = prune(X, A, t, params)
    assert indices.tolist() == expected.indices.tolist()
    assert (indices.dtype, count.dtype, count.shape) == (np.int32, np.int32, ())
    assert count == expected.count
    assert_rounded_alike(tokens, expected.tokens)
    return expected


def assert_rounded_alike(found, expected):
    """Equal up to the last place: ONNX Runtime rounds fp64 to fp16 by way of fp32, and sums in another order."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if found.dtype == np.float64:
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    else:
        np.testing.assert_array_max_ulp(found, expected, maxulp=1)


@pytest.mark.parametrize("clip", golden.VIDEOS)
@pytest.mark.parametrize("setting", golden.PARAMS)
def test_it_gives_the_golden_results(clip, setting):
    with np.load(golden.PATH) as file:
        inputs = (file[f"{clip}/{name}"] for name in op.INPUTS)
        expected = check(*inputs, golden.PARAMS[setting])
        assert expected.indices.tolist() == file[f"{clip}/{setting}/indices"].tolist()


@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_it_keeps_what_the_reference_keeps_of_any_video(case):
    (X, A, t), params = case
    check(X, A, t, params)


@pytest.mark.parametrize("frames", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("moving", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("merge_order", "budget"), [("anchor", "paper"), ("density", "exact")])
def test_videos_of_one_to_thirty_two_frames(frames, moving, merge_order, budget):
    chosen = {"merge_order": merge_order, "budget": budget}
    params = PruneParams(0.15, grid=(5, 6), sink_positions=(0, 13), time_base=500, space_base=20, **chosen)
    check(*video(frames, (5, 6), 32, seed=frames, cuts=(5, 20), moving=moving, dtype=np.float16), params)


@pytest.mark.parametrize("thresholds", [(-1, 1), (-1, -1), (1, 0.8)], ids=["dynamic", "static", "single frames"])
@pytest.mark.parametrize("budget", ["paper", "exact"])
def test_segments_that_are_all_of_one_kind(thresholds, budget):
    segment, static = thresholds
    params = PruneParams(0.25, grid=(4, 4), segment_threshold=segment, static_threshold=static, budget=budget)
    expected = check(*video(9, (4, 4), 24, moving=0.5), params)
    assert len(expected.segments) == (9 if segment == 1 else 1)


def test_the_released_model_s_grid_and_sinks():
    check(*video(6, (14, 14), 56, cuts=(3,), dtype=np.float16), PruneParams())


@pytest.mark.parametrize("width", [1, 2, 5, 6, 13])
def test_widths_whose_sections_are_odd_or_empty(width):
    check(*video(4, (3, 3), width), PruneParams(0.3333, grid=(3, 3)))


@pytest.mark.parametrize("frames", [1, 7])
def test_a_grid_of_one_position(frames):
    check(*video(frames, (1, 1), 8), PruneParams(grid=(1, 1)))


@pytest.mark.parametrize("budget", ["paper", "exact"])
@pytest.mark.parametrize("fill", [0.0, 1.0, 6e4])
def test_equal_tokens_and_black_frames(fill, budget):
    X = np.full((3, 6, 12), fill, np.float16)
    check(X, np.zeros((3, 6), np.float32), np.arange(3, dtype=np.float32), PruneParams(0.5, grid=(2, 3), budget=budget))


@pytest.mark.parametrize("seed", [9, 32, 36, 54])
def test_tokens_that_are_each_other_s_nearest_are_equally_dense(seed):
    # With k = 1 their densities are of one distance. An Exp that rounds by place keeps other tokens of these videos.
    check(*video(1, (1, 15), 8, seed=seed), PruneParams(0.6, context_ratio=1, grid=(1, 15), neighbors=1))


def test_windows_are_as_long_as_the_references():
    frames = MAX_WINDOW + 6
    X, A = np.ones((frames, 1, 2), np.float32), np.ones((frames, 1), np.float32)
    expected = check(X, A, np.arange(frames, dtype=np.float32), PruneParams(grid=(1, 1), retention_ratio=0.0005))
    assert (expected.segments[:, 1] - expected.segments[:, 0]).max() == MAX_WINDOW


def test_the_file_is_the_same_each_time_and_has_only_what_was_chosen(tmp_path):
    features = TensorSpec("features", "float16", ("F", 196, 896))
    files = []
    for name, params in (("a", PruneParams()), ("b", PruneParams()), ("c", PruneParams(budget="exact"))):
        (tmp_path / name).mkdir()
        write_prune(params, features, tmp_path / name)
        files.append(tmp_path / name / "prune.onnx")
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    functions = onnx.load(files[2]).functions
    assert len({(f.domain, f.name) for f in functions}) == len(functions)


def test_every_function_is_called_and_none_calls_itself():
    calls = {f.name: called(f.node) for f in prune_functions(PruneParams())}
    assert set().union(*calls.values()) == calls.keys() - {op.NAME}
    while calls:
        leaves = [name for name, callees in calls.items() if not callees & calls.keys()]
        assert leaves, f"these call each other: {set(calls)}"
        for name in leaves:
            del calls[name]


def called(nodes):
    """The names of the functions that some nodes call, those in their loops and branches included."""
    inner = [called(a.g.node) for node in nodes for a in node.attribute if a.HasField("g")]
    return {node.op_type for node in nodes if node.domain == op.DOMAIN}.union(*inner)
