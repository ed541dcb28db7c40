"""Runs every kernel on a few small inputs, for compute-sanitizer.

compute-sanitizer --tool memcheck|racecheck|initcheck python -m tests.gpu.plugins.sanitize
"""

import numpy as np
import torch

from tango_plugins import PruneParams, native_library
from tests.gpu.plugins import test_activation
from tests.gpu.plugins.device import Device
from tests.gpu.plugins.test_decode import SHAPES, Decoder, batch_of
from tests.plugins import fp8, int8
from tests.plugins.attentions import Pass, Shape
from tests.plugins.fp16 import GELU_SHAPES, LINEAR, LINEAR_GELU, Fp16Product
from tests.plugins.fp16 import SHAPES as LINEARS
from tests.plugins.linears import SHAPES as PRODUCTS
from tests.plugins.linears import SLABS, Product
from tests.plugins.matrices import FORMATS
from tests.plugins.norms import SINGLE, TYPES, Rows
from tests.plugins.resizes import SURFACES, Frames
from tests.plugins.resizes import Shape as FrameShape
from tests.plugins.rows import gather, row_tensors
from tests.plugins.thinnings import CASES as CASES_OF_THIN
from tests.plugins.thinnings import Prompt
from tests.plugins.videos import video
from tests.plugins.vision_attentions import Shape as VisionShape
from tests.plugins.vision_attentions import Vision

CASES = [
    (6, (5, 5), 64, 0.5, 0.1, {"budget": "exact", "retention_ratio": 0.2}),
    (4, (14, 14), 128, 1.0, 0.02, {"merge_order": "density"}),
    (3, (6, 6), 30, 0.0, 0.1, {"neighbors": 40}),
]


def quantized():
    """Kernels of weights of few bits."""
    for form in FORMATS:
        for name, blocks in (("tests", 0), ("odd", 3), ("tiny", 0)):
            decoder = Decoder(SHAPES[name], blocks=blocks, formats=(form,))
            print(name, form, float(decoder.step(decoder.embedding(), 64).max()))
            print("batch", *(float(logits.max()) for logits in batch_of(decoder, blocks).step(range(8))[0]))
        for *shape, room in (*((*sizes, 0) for sizes in (*PRODUCTS, (300, 64, 130))), *SLABS):
            assert Product(*shape, form, room=room).enqueue() == 0
            torch.cuda.synchronize()
            print("product", shape, form, "slabs of", room)


if __name__ == "__main__":
    quantized()
    for precision in ("fast", "exact"):
        for frames, grid, width, moving, noise, options in CASES:
            clip = video(frames, grid, width, seed=1, cuts=(4,), moving=moving, noise=noise, dtype=np.float16)
            device = Device(*clip, PruneParams(grid=grid, **options), precision).run()
            torch.cuda.synchronize()
            print(precision, frames, grid, device.pruned().count)
    for name in ("tests", "odd", "tiny"):
        for blocks in (0, 3):
            decoder = Decoder(SHAPES[name], blocks=blocks)
            print("batch", *(float(logits.max()) for logits in batch_of(decoder, blocks).step(range(8))[0]))
            for position in (0, 64, 400):
                print(name, blocks, position, float(decoder.step(decoder.embedding(), position).max()))
    for shape, begin in (
        (Shape(33, 4, 2, 48, 150), 90),
        (Shape(70, 64, 64, 64, 80), 0),
        (Shape(9, 2, 1, 256, 64), 30),
        (Shape(140, 64, 64, 64, 150), 3),  # by warpgroups
        (Shape(310, 28, 4, 128, 700), 385),
    ):
        assert Pass(shape, begin).enqueue() == 0
        torch.cuda.synchronize()
        print("attention", shape)
    for tokens, head_dim, window in (
        ((5, 7), 72, 0),
        ((12, 15), 72, 0),
        ((20, 21), 80, 0),
        ((9, 10), 80, 4),
        ((13, 17), 128, 0),
    ):
        assert Vision(VisionShape(2, *tokens, 2, head_dim, window), rotates=window > 0).enqueue() == 0
        torch.cuda.synchronize()
        print("vision attention", tokens, head_dim, window)
    for shape in (FrameShape(37, 53, 16, 21, gap=3), *SURFACES[::5]):
        Frames(shape).enqueue()
        torch.cuda.synchronize()
        print("resize", shape)
    for name in test_activation.NAMES:
        for size in ((33, 64), (7, 13)):
            a, b, y = test_activation.tensors(name, size, torch.float16)
            assert test_activation.call(name, a, b, y) == 0
            torch.cuda.synchronize()
            print(name, size)
    for kind, size in (("layer", (5, 1152)), ("rms", (3, 1288)), ("layer", (2, 1300)), ("rms", (7, 13))):
        for types in TYPES[:4]:
            assert Rows(kind, *size, types).enqueue() == 0
            torch.cuda.synchronize()
            print(kind, "norm", size)
    for kind in (fp8, int8):
        for size in ((5, 1152), (7, 13)):
            kind.check_norm(*(Rows("layer", *size, (*TYPES[0][:2], SINGLE)) for _ in range(2)))
            print("quantized norm", size)
        kind.check_every_number(native_library.load(), 0.1)
    for shape in (*int8.SHAPES, (300, 64, 130)):
        int8.Int8Product(*shape).check()
        print("product of INT8", shape)
    for function, shapes in ((LINEAR, LINEARS), (LINEAR_GELU, GELU_SHAPES)):
        for shape in shapes:
            assert Fp16Product(*shape).enqueue(function) == 0
            torch.cuda.synchronize()
            print(function, shape)
    for width in (64, 13):
        tensors = row_tensors(torch.float16, width, "cuda")
        assert gather(native_library.load(), *tensors, torch.cuda.current_stream().cuda_stream) == 0
        torch.cuda.synchronize()
        print("rows", width)
    for case in CASES_OF_THIN:
        assert Prompt(*case, torch.float16, "cuda").enqueue(native_library.load()) == 0
        torch.cuda.synchronize()
        print("thin", case)
