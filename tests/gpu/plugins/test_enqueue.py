"""What hosts rely on: CUDA graphs, the same bits every time, no allocations, and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tango_plugins import PruneParams, TangoError
from tango_plugins.device_array import DeviceArray
from tango_plugins.pruner import CudaPruner
from tests.gpu.plugins.device import Device
from tests.plugins.videos import video

GRID = (8, 8)


def clip(seed, dtype=np.float16):
    return video(12, GRID, 128, seed=seed, cuts=(4, 7), moving=0.6, dtype=dtype)


def bits(device):
    torch.cuda.synchronize()
    return {name: tensor.cpu().numpy().tobytes() for name, tensor in device.outputs.items()}


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_a_graph_replays_what_enqueue_does(precision):
    device = Device(*clip(0), PruneParams(grid=GRID), precision)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        device.run()
    for seed in (1, 2):
        for tensor, array in zip(device.inputs, clip(seed), strict=True):
            tensor.copy_(torch.from_numpy(array))
        graph.replay()
        replayed = bits(device)
        assert replayed == bits(Device(*clip(seed), PruneParams(grid=GRID), precision).run())


def test_ten_thousand_enqueues_repeat_themselves_and_take_no_memory():
    clips = [clip(seed) for seed in range(10)]
    device = Device(*clips[0], PruneParams(grid=GRID))
    stacks = [torch.from_numpy(np.stack(arrays)).cuda() for arrays in zip(*clips, strict=True)]
    wanted, free = {}, None
    for round_ in range(1000):
        for i in range(10):
            for tensor, stack in zip(device.inputs, stacks, strict=True):
                tensor.copy_(stack[i])
            device.run()
            if round_ in (0, 1, 500, 999):
                assert wanted.setdefault(i, bits(device)) == bits(device)
        if round_ == 1:
            free = torch.cuda.mem_get_info()[0]
    assert torch.cuda.mem_get_info()[0] == free


def test_a_tensor_becomes_a_device_array():
    tensor = torch.zeros(3, 4, dtype=torch.float16, device="cuda")
    assert DeviceArray.of(tensor) == DeviceArray(tensor.data_ptr(), (3, 4), "float16")
    with pytest.raises(TangoError, match="not contiguous"):
        DeviceArray.of(tensor.T, "tensor")


def test_a_wrong_shape_is_rejected_by_name():
    device = Device(*clip(0), PruneParams(grid=GRID))
    device.inputs[1] = device.inputs[1][:, :-1].contiguous()
    with pytest.raises(TangoError, match=r"salience is float32 \[12, 63\]"):
        device.run()


def test_a_small_workspace_is_rejected():
    device = Device(*clip(0), PruneParams(grid=GRID))
    device.workspace = device.workspace[:-256]
    with pytest.raises(TangoError, match="workspace has"):
        device.run()


def test_the_workspace_of_the_7b_model_fits_into_256_mb():
    for precision in ("fast", "exact"):
        assert CudaPruner(PruneParams(), 32, 3584, precision=precision).workspace_bytes <= 256e6
