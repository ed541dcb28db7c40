import pytest

from tango_plugins import PruneParams, TangoError, op


def test_the_authors_segment_thresholds():
    assert [PruneParams(r).tau_segment for r in (0.05, 0.1, 0.15)] == [0.65, 0.65, 0.8]
    assert PruneParams(0.05).at(0.2).tau_segment == 0.8
    assert PruneParams(0.05, segment_threshold=0.7).tau_segment == 0.7


def test_the_operator_keeps_more_where_the_decoder_drops_some():
    """LLaVA-Video as Tango's authors evaluate it: half of the rows from layer 18 of 28 on."""
    params = PruneParams(grid=(13, 13), decoder_share=(18 + 10 * 0.5) / 28)
    found = [params.at(ratio).resolved() for ratio in (0.1, 0.15, 0.2, 0.9)]
    assert [each.retention_ratio for each in found] == [0.1217, 0.1826, 0.2435, 1.0]
    assert [each.segment_threshold for each in found] == [0.65, 0.8, 0.8, 0.8]
    assert all(each.resolved() == each for each in found)
    assert op.exact_count(64, 169, params) == op.exact_count(64, 169, found[0]) == 1317
    assert op.capacity(64, 169, params) == op.capacity(64, 169, found[0])
    assert op.attributes(params)["retention_ratio"] == 1000
    assert op.node_attributes(params)["retention_ratio"] == 1217


def test_sinks_belong_to_their_grid():
    assert PruneParams().sinks == (28, 27, 41, 169, 11, 12)
    assert PruneParams(grid=(13, 13)).sinks == ()
    assert PruneParams(sink_positions=()).sinks == ()


def test_a_ratio_is_what_its_ten_thousandths_give():
    assert PruneParams(0.1 + 1e-12).retention_ratio == 1000 / 10_000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("retention_ratio", 0),
        ("retention_ratio", 0.12345),
        ("retention_ratio", float("nan")),
        ("context_ratio", 1.1),
        ("expansion", 0.9),
        ("anchor_weight", -0.1),
        ("neighbors", 0),
        ("segment_threshold", 1.5),
        ("static_threshold", -2),
        ("sink_positions", (196,)),
        ("time_base", 1.5),
        ("space_base", 1),
        ("grid", (14,)),
        ("merge_order", "random"),
        ("budget", "loose"),
        ("decoder_share", 0),
        ("decoder_share", 1.1),
    ],
)
def test_a_value_out_of_range_is_rejected_by_name(name, value):
    with pytest.raises(TangoError, match=name):
        PruneParams(**{name: value})


def test_another_grid_keeps_all_other_parameters():
    params = PruneParams(0.2, segment_threshold=0.65, sink_positions=(26, 157, 11))
    moved = params.on((13, 13))
    assert moved.grid == (13, 13)
    assert moved.on(params.grid) == params
    assert moved.tau_segment == 0.65


def test_another_grid_must_contain_the_sinks():
    with pytest.raises(TangoError, match="sink_positions is 169"):
        PruneParams().resolved().on((13, 13))
    assert PruneParams().on((13, 13)).sinks == ()  # the paper's setting belongs to the 14×14 grid
