"""Runs a kernel of a library compiled for ThreadSanitizer, which ends the process with exit code 66 on a data race."""

import ctypes
import sys
from pathlib import Path


def decode(library):
    from tango_plugins.decoder import DecoderShape
    from tests.plugins.decoders import EPS, Decoder, check_step

    shape = DecoderShape(2, 32, 4, 2, 16, 96, 100, 112, 200, EPS)
    check_step(Decoder(shape, library=library, blocks=2, device="cpu"), 150)


def quantized(library):
    from tango_plugins.decoder import DecoderShape
    from tests.plugins.decoders import EPS, Decoder, check_step

    shape = DecoderShape(1, 32, 4, 2, 16, 96, 100, 112, 200, EPS)
    for formats in (("int8", "int4-32-zeros"), ("int8-32", "int4-128", "fp16"), ("fp8",)):
        check_step(Decoder(shape, library=library, blocks=2, device="cpu", formats=formats), 40)


def batch(library):
    from tango_plugins.decoder import DecoderShape
    from tests.plugins.decoders import EPS, Batch, Decoder, check_batch

    shape = DecoderShape(2, 32, 4, 2, 16, 96, 100, 112, 200, EPS)
    for formats in (("fp16",), ("int8", "int4-32-zeros")):
        decoder = Decoder(shape, library=library, blocks=2, device="cpu", formats=formats)
        check_batch(Batch(decoder, (150, 3), (160, 32), library, 2), [0, 1])


def linear(library):
    from tests.plugins.linears import Product, check

    for form in ("int8", "int4-32-zeros", "int8-128-zeros"):
        check(Product(70, 200, 130, form, path=library, device="cpu"))


def int8(library):
    from tests.plugins.int8 import Int8Product

    for shape in ((70, 200, 130), (70, 208, 144)):
        Int8Product(*shape, path=library, device="cpu").check()


def attention(library):
    from tests.plugins.attentions import Pass, Shape, check

    check(Pass(Shape(40, 4, 1, 64, 400), 260, path=library, device="cpu"))


def attention_sm90(library):
    from tests.plugins.attentions import Pass, Shape, check

    # More tiles of keys and values than the ring has slots, and of queries than it has buffers.
    check(Pass(Shape(20, 14, 2, 128, 300), 130, path=library, device="cpu"))
    check(Pass(Shape(64, 9, 3, 64, 400), 290, path=library, device="cpu"))


def thin(library):
    import torch

    from tango_plugins import native_library
    from tests.plugins.thinnings import CASES, Prompt

    prompt = Prompt(*CASES[0], torch.float16)
    assert prompt.enqueue(native_library.load(library)) == 0
    prompt.check()


def norm(library):
    from tests.plugins.norms import Rows, check

    check(Rows("layer", 2, 3000, path=library, device="cpu"))


def vision(library):
    from tests.plugins.vision_attentions import Shape, Vision, check

    check(Vision(Shape(1, 11, 13, 1, 72), path=library, device="cpu"))
    check(Vision(Shape(1, 11, 13, 5, 80, window=8), path=library, device="cpu", rotates=True))


def vision_sm90(library):
    from tests.plugins.vision_attentions import Shape, Vision, check

    check(Vision(Shape(1, 14, 15, 3, 64), path=library, device="cpu"))


def reverse(library, fault):
    numbers, reversed_numbers = (ctypes.c_float * 256)(), (ctypes.c_float * 256)()
    ctypes.CDLL(str(library)).emulator_reverse(numbers, reversed_numbers, fault)


if __name__ == "__main__":
    cases = {
        "decode": decode,
        "quantized": quantized,
        "batch": batch,
        "linear": linear,
        "int8": int8,
        "attention": attention,
        "attention_sm90": attention_sm90,
        "thin": thin,
        "norm": norm,
        "vision": vision,
        "vision_sm90": vision_sm90,
        "no fault": lambda library: reverse(library, 0),
        "no barrier": lambda library: reverse(library, 2),
    }
    cases[sys.argv[1]](Path(sys.argv[2]))
