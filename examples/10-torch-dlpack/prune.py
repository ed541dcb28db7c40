"""Prune PyTorch tensors on the GPU, without a copy and on PyTorch's stream: python prune.py"""

import torch

from tango_plugins import PruneParams
from tango_plugins.pruner import CudaPruner

FRAMES, GRID, WIDTH = 32, (14, 14), 3584
TOKENS = GRID[0] * GRID[1]

cuda = torch.device("cuda")
pruner = CudaPruner(PruneParams(retention_ratio=0.1, grid=GRID, sink_positions=()), frames=FRAMES, width=WIDTH)

# Allocated once, used for every video.
tokens = torch.empty(pruner.capacity, WIDTH, dtype=torch.float16, device=cuda)
indices = torch.empty(pruner.capacity, dtype=torch.int32, device=cuda)
count = torch.empty(1, dtype=torch.int32, device=cuda)
workspace = torch.empty(pruner.workspace_bytes, dtype=torch.uint8, device=cuda)

# In place of a vision tower.
features = torch.randn(FRAMES, TOKENS, WIDTH, dtype=torch.float16, device=cuda)
salience = torch.rand(FRAMES, TOKENS, device=cuda)
seconds = torch.arange(FRAMES, dtype=torch.float32, device=cuda)

# The operator follows the kernels that PyTorch has enqueued, and neither waits nor allocates.
pruner.enqueue(
    features,
    salience,
    seconds,
    tokens=tokens,
    indices=indices,
    count=count,
    workspace=workspace,
    stream=torch.cuda.current_stream().cuda_stream,
)

kept = int(count)  # waits
print(f"kept {kept} of {FRAMES * TOKENS} tokens: {tokens[:kept].dtype} {list(tokens[:kept].shape)} on {tokens.device}")
