"""Runs the CUDA operator on NumPy arrays, whole or step by step."""

from __future__ import annotations

import numpy as np
import torch

from tango_plugins.pruner import CudaPruner
from tango_plugins.reference import Pruned

ROTATE, SEGMENT, CANDIDATES, SELECT, CONTEXT, DENSITY, DELTA, ANCHORS, OWNERS, MERGE = range(10)

#: Rotated features are stored times this (kRotatedScale).
SCALE = 4096.0
UNKEPT, SELECTED, ADDED, UNMERGED, MERGED = range(5)


class Device:
    """A pruner for one video, with its inputs, poisoned outputs and workspace."""

    def __init__(self, X, A, t, params, precision="fast"):
        F, _, D = X.shape
        self.pruner = CudaPruner(params, F, D, dtype=str(X.dtype), precision=precision)
        K, self.F = self.pruner.capacity, F
        self.inputs = [torch.from_numpy(np.ascontiguousarray(array)).cuda() for array in (X, A, t)]
        self.outputs = {
            "tokens": torch.full((K, D), 7.0, dtype=self.inputs[0].dtype, device="cuda"),
            "indices": torch.full((K,), -7, dtype=torch.int32, device="cuda"),
            "count": torch.full((1,), -7, dtype=torch.int32, device="cuda"),
            "merged": torch.full((K,), 7, dtype=torch.uint8, device="cuda"),
            "segments": torch.full((F, 2), -7, dtype=torch.int32, device="cuda"),
        }
        self.workspace = torch.full((self.pruner.workspace_bytes,), 255, dtype=torch.uint8, device="cuda")

    def run(self, first=ROTATE, last=MERGE):
        stream = torch.cuda.current_stream().cuda_stream
        self.pruner.enqueue(*self.inputs, **self.outputs, workspace=self.workspace, stream=stream, steps=(first, last))
        return self

    def read(self, name, dtype, *shape):
        return self.workspace[self.pruner.region(name)].cpu().numpy().view(dtype)[: int(np.prod(shape))].reshape(shape)

    def write(self, name, array):
        data = np.ascontiguousarray(array).view(np.uint8).ravel()
        start = self.pruner.region(name).start
        self.workspace[start : start + data.size] = torch.from_numpy(data.copy()).cuda()

    def write_rotated(self, R):
        """Writes R [F, L, D] fp64 in the format of step 2."""
        padded = -(-R.shape[-1] // 64) * 64
        scaled = np.zeros((*R.shape[:2], padded), np.float32)
        scaled[..., : R.shape[-1]] = R * SCALE
        high = scaled.astype(np.float16)
        self.write("rotated_high", high)
        if self.pruner._params.precision:
            self.write("rotated_low", (scaled - high.astype(np.float32)).astype(np.float16))

    def pruned(self):
        """The outputs; checks the rows past the count."""
        host = {name: tensor.cpu().numpy() for name, tensor in self.outputs.items()}
        K = int(host["count"][0])
        assert 0 <= K <= self.pruner.capacity
        assert (host["indices"][K:] == -1).all()
        assert (host["tokens"][K:] == 0).all()
        assert (host["merged"][K:] == 0).all()
        segments = host["segments"]
        real = (segments[:, 0] >= 0).sum()
        assert (segments[real:] == -1).all()
        return Pruned(host["tokens"][:K], host["indices"][:K], K, segments[:real], host["merged"][:K].astype(bool))


def prune(X, A, t, params, precision="fast"):
    return Device(X, A, t, params, precision).run().pruned()
