"""The gated activation with biases on the GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from tango_plugins import native_library
from tests.gpu.plugins.test_activation import DTYPES, SHAPES, TOLERANCES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2880, 3424)])
@pytest.mark.parametrize("scale", [1.0, 1 / 256])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_result_is_fp64_rounded_once(dtype, shape, scale, offset):
    rows, width = shape
    generator = torch.Generator("cuda").manual_seed(width)

    def random(size):
        return (torch.randn(offset + size, generator=generator, device="cuda") * 3).to(dtype)[offset:]

    gate, gate_bias, up, up_bias = random(rows * width), random(width), random(rows * width), random(width)
    poisoned = torch.full((offset + rows * width + 64,), -77.0, dtype=dtype, device="cuda")
    y = poisoned[offset : offset + rows * width]
    pointers = [tensor.data_ptr() for tensor in (gate, gate_bias, up, up_bias)]
    stream = torch.cuda.current_stream().cuda_stream
    function = native_library.load().tango_bias_swiglu_enqueue
    kind = DTYPES[dtype]
    assert function(kind, *pointers, rows, width, scale, kind, 0.0, y.data_ptr(), stream) == 0
    g, u = (x.view(shape).double() + bias.double() for x, bias in ((gate, gate_bias), (up, up_bias)))
    expected = silu(g) * u * scale
    # A sum of two in fp32 is off by its own rounding, relative to the larger of them.
    relative, absolute = TOLERANCES[dtype]
    sizes = [x.view(shape).double().abs() + bias.double().abs() for x, bias in ((gate, gate_bias), (up, up_bias))]
    slack = 1e-6 * (sizes[0] + 1) * sizes[1] * scale
    assert ((y.view(shape).double() - expected).abs() <= relative * expected.abs() + absolute + slack).all()
    assert (torch.cat((poisoned[:offset], poisoned[offset + rows * width :])) == -77.0).all()
