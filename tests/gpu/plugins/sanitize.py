"""A few small videos and tokens through every kernel, for compute-sanitizer.

compute-sanitizer --tool memcheck|racecheck|initcheck python -m tests.gpu.plugins.sanitize
"""

import numpy as np
import torch

from tango_plugins import PruneParams
from tests.gpu.plugins.device import Device
from tests.gpu.plugins.test_decode import SHAPES, Decoder
from tests.plugins.scenes import video

CASES = [
    (6, (5, 5), 64, 0.5, 0.1, {"budget": "exact", "retention_ratio": 0.2}),
    (4, (14, 14), 128, 1.0, 0.02, {"merge_order": "density"}),
    (3, (6, 6), 30, 0.0, 0.1, {"neighbors": 40}),
]

if __name__ == "__main__":
    for precision in ("fast", "exact"):
        for frames, grid, width, moving, noise, options in CASES:
            clip = video(frames, grid, width, seed=1, cuts=(4,), moving=moving, noise=noise, dtype=np.float16)
            device = Device(*clip, PruneParams(grid=grid, **options), precision).run()
            torch.cuda.synchronize()
            print(precision, frames, grid, device.pruned().count)
    for name in ("tests", "odd", "tiny"):
        for blocks in (0, 3):
            decoder = Decoder(SHAPES[name], blocks=blocks)
            for position in (0, 64, 400):
                print(name, blocks, position, float(decoder.step(decoder.embedding(), position).max()))
