"""Runs a kernel of a library compiled for ThreadSanitizer, which ends the process with exit code 66 on a data race."""

import ctypes
import sys
from pathlib import Path

from tango_plugins.decoder import DecoderShape
from tests.plugins.attentions import Pass, Shape, check
from tests.plugins.decoders import EPS, Decoder, check_step

if __name__ == "__main__":
    name, library = sys.argv[1], Path(sys.argv[2])
    if name == "decode":
        shape = DecoderShape(2, 32, 4, 2, 16, 96, 100, 112, 200, EPS)
        check_step(Decoder(shape, library=library, blocks=2, device="cpu"), 150)
    elif name == "attention":
        check(Pass(Shape(40, 4, 1, 64, 400), 260, path=library, device="cpu"))
    else:
        numbers = (ctypes.c_float * 512)()
        fault = {"no fault": 0, "no barrier": 2}[name]
        ctypes.CDLL(str(library)).emulator_reverse(numbers, ctypes.byref(numbers, 1024), fault)
