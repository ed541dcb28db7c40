import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tango_plugins import PruneParams, TangoError
from tango_plugins.op import attributes, capacity, exact_count, node_attributes, params_from

RATIO = st.integers(0, 10_000).map(lambda parts: parts / 10_000)


@given(
    st.builds(
        PruneParams,
        retention_ratio=RATIO.filter(bool),
        context_ratio=RATIO,
        expansion=st.integers(10_000, 40_000).map(lambda parts: parts / 10_000),
        anchor_weight=RATIO,
        neighbors=st.integers(1, 64),
        segment_threshold=st.none() | RATIO,
        static_threshold=RATIO.map(lambda cosine: -cosine),
        sink_positions=st.none() | st.lists(st.integers(0, 168), unique=True).map(tuple),
        time_base=st.integers(2, 10**8),
        grid=st.sampled_from([(14, 14), (13, 13)]),
        merge_order=st.sampled_from(["anchor", "density"]),
        budget=st.sampled_from(["paper", "exact"]),
    )
)
def test_attributes_hold_every_parameter(params):
    found = attributes(params)
    back = params_from(json.loads(json.dumps(found)))
    assert attributes(back) == found
    assert (back.tau_segment, back.sinks) == (params.tau_segment, params.sinks)
    same = ("retention_ratio", "context_ratio", "expansion", "anchor_weight", "static_threshold", "neighbors")
    assert [getattr(back, name) for name in same] == [getattr(params, name) for name in same]


@pytest.mark.parametrize("params", [PruneParams(), PruneParams(0.25, grid=(13, 13)), PruneParams(sink_positions=())])
def test_a_node_always_has_sinks_and_a_segment_threshold(params):
    node = node_attributes(params)
    assert node["sink_positions"] == list(params.sinks)
    assert node["segment_threshold"] == round(10_000 * params.tau_segment)


def test_parameters_that_follow_a_rule_are_written_out_in_a_node_only():
    given = attributes(PruneParams())
    assert "segment_threshold" not in given
    assert "sink_positions" not in given
    assert params_from(given).at(0.25).tau_segment == 0.8
    node = node_attributes(PruneParams())
    assert node == attributes(PruneParams().resolved()) | {
        "precision": "fast",
        "plugin_namespace": "tango",
        "plugin_version": "1",
    }


def test_attributes_of_the_defaults():
    assert attributes(PruneParams().resolved()) == {
        "retention_ratio": 1000,
        "context_ratio": 4000,
        "expansion": 15000,
        "anchor_weight": 6000,
        "segment_threshold": 6500,
        "static_threshold": 8000,
        "neighbors": 7,
        "time_base": 10_000,
        "space_base": 1_000,
        "grid": [14, 14],
        "sink_positions": [28, 27, 41, 169, 11, 12],
        "merge_order": "anchor",
        "budget": "paper",
    }


def test_missing_attributes_take_defaults():
    assert params_from({}) == PruneParams()
    assert params_from({"retention_ratio": 2500}).tau_segment == 0.8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", 1000),
        ("retention_ratio", 0.1),
        ("neighbors", "7"),
        ("grid", 14),
        ("budget", "tight"),
        ("expansion", 9),
    ],
)
def test_a_wrong_attribute_is_rejected_by_name(name, value):
    with pytest.raises(TangoError, match=name):
        params_from({name: value})


@pytest.mark.parametrize(
    ("frames", "tokens", "ratio", "rows"),
    [
        (32, 196, 0.1, 6272 // 10 + 64),
        (1, 1, 0.1, 1),  # never more than there are
        (3, 10, 0.3333, 30 * 3333 // 10000 + 6),
        (32, 196, 1.0, 6272),
    ],
)
def test_capacity(frames, tokens, ratio, rows):
    assert capacity(frames, tokens, PruneParams(ratio)) == rows


@given(st.integers(1, 2000), st.integers(1, 2000), RATIO.filter(bool))
def test_capacity_holds_the_exact_count(frames, tokens, ratio):
    params = PruneParams(ratio, budget="exact")
    assert exact_count(frames, tokens, params) <= capacity(frames, tokens, params)
