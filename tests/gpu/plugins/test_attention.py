"""Attention of a prefill on the GPU, against fp64."""

from __future__ import annotations

import pytest
import torch

from tests.plugins.attentions import Pass, Shape, check, close

#: Heads of the released decoders, and values of head_dim between those that have kernels.
SMALL, LARGE = (14, 2, 64), (28, 4, 128)
CASES = [
    *(
        (T, heads, begin)
        for heads in (SMALL, LARGE)
        for T, begin in ((1, 0), (659, 0), (2, 657), (64, 700), (1500, 37))
    ),
    *((T, (4, 2, width), begin) for width in (16, 48, 80, 112, 192, 256) for T, begin in ((33, 0), (70, 201))),
    (200, (96, 96, 32), 5),
    (300, (64, 1, 128), 1),
    # Many rows, as Hopper's warpgroups take them: tiles that end with the tokens, one token later and one earlier, and
    # heads without groups.
    *((T, heads, begin) for heads in (SMALL, LARGE) for T, begin in ((1000, 0), (1025, 129), (1152, 0), (2181, 500))),
    *((T, (12, 12, width), begin) for width in (64, 128) for T, begin in ((1151, 0), (1024, 127), (1537, 1))),
]


@pytest.mark.parametrize(("tokens", "heads", "begin"), CASES)
def test_attention_equals_fp64(tokens, heads, begin):
    check(Pass(Shape(tokens, *heads, begin + tokens + 100), begin, seed=tokens))


@pytest.mark.parametrize("heads", [SMALL, LARGE])
@pytest.mark.parametrize(("tokens", "begin"), [(1, 0), (659, 0), (64, 700), (1100, 300)])
def test_tokens_with_positions_of_their_own(heads, tokens, begin):
    check(Pass(Shape(tokens, *heads, begin + tokens + 100), begin, positioned=True))


@pytest.mark.parametrize("heads", [SMALL, LARGE])
def test_all_tokens_of_a_video(heads):
    check(Pass(Shape(4096, *heads, 6400), 2207))


@pytest.mark.parametrize(("tokens", "heads"), [(300, SMALL), (1100, SMALL), (1100, LARGE)])
def test_scores_far_apart(tokens, heads):
    """As with outliers: one key takes all of the weight, and the others underflow."""
    check(Pass(Shape(tokens, *heads, tokens + 100), 50, scale=4.0))


@pytest.mark.parametrize(("tokens", "heads"), [(30, SMALL), (1100, SMALL), (1100, LARGE)])
def test_the_last_position_of_the_cache(tokens, heads):
    check(Pass(Shape(tokens, *heads, tokens + 482), 482))


@pytest.mark.parametrize(("tokens", "heads"), [(64, LARGE), (659, LARGE), (1500, SMALL)])
def test_the_same_bits_every_time(tokens, heads):
    found = Pass(Shape(tokens, *heads, tokens + 141), 40)
    assert found.enqueue() == 0
    first = found.tensors["attn_out"].clone()
    for _ in range(200):
        found.tensors["attn_out"].fill_(torch.nan)
        assert found.enqueue() == 0
        assert torch.equal(found.tensors["attn_out"].view(torch.int16), first.view(torch.int16))


@pytest.mark.parametrize(("tokens", "heads"), [(20, SMALL), (1100, SMALL), (1100, LARGE)])
def test_a_graph_replays_it_at_another_position(tokens, heads):
    shape = Shape(tokens, *heads, tokens + 280)
    found, graph = Pass(shape, 100), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.stream = torch.cuda.current_stream().cuda_stream
        assert found.enqueue() == 0
    for begin in (100, 3, 280):
        moved = Pass(shape, begin, seed=begin)
        for name, tensor in moved.tensors.items():
            found.tensors[name].copy_(tensor)
        graph.replay()
        close(found.tensors["attn_out"], moved.expected()[0], 3e-3)


@pytest.mark.parametrize("tokens", [40, 1100])
def test_an_overflow_is_visible(tokens):
    found = Pass(Shape(tokens, *SMALL, tokens + 60))
    found.tensors["qkv"][7, :64] = torch.inf
    assert found.enqueue() == 0
    attn_out = found.tensors["attn_out"]
    assert attn_out[7].isnan().any()
    assert attn_out[:7].isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 0}, "tokens is 0: it must be from 1 to 100"),
        ({"tokens": 101}, "tokens is 101: it must be from 1 to 100"),
        ({"kv_heads": 0}, "kv_heads is 0: it must be from 1"),
        ({"heads": 3}, "heads % kv_heads is 1: it must be from 0 to 0"),
        ({"head_dim": 72}, "head_dim % 16 is 8"),
        ({"head_dim": 272}, "head_dim is 272: it must be from 16 to 256"),
    ],
)
def test_a_wrong_shape_is_rejected_by_name(change, words):
    found = Pass(Shape(10, 4, 2, 64, 100))
    found.shape = Shape(**vars(found.shape) | change)
    assert found.enqueue() != 0
    assert words in found.library.tango_last_error().decode()


def test_a_misaligned_pointer_is_rejected_by_name():
    found = Pass(Shape(10, 4, 2, 64, 100))
    assert found.enqueue(bias=found.tensors["bias"][1:]) != 0
    assert "bias is at" in found.library.tango_last_error().decode()
