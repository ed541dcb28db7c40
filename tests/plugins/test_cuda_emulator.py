"""Kernels in the CUDA emulator: what they compute, and that they wait for all that they read."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from functools import cache
from math import isnan
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tango_plugins import TangoError, native_library, structs
from tango_plugins.decoder import DecoderShape
from tests.plugins.attentions import Pass, Shape, check
from tests.plugins.cuda_emulator import compiled
from tests.plugins.decoders import EPS, Decoder, check_next, check_step
from tests.plugins.matrices import device_array
from tests.plugins.rows import assert_gathered, gather, row_tensors

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]

ROOT = Path(__file__).parents[2]

#: TANGO_BAD_ARGUMENT of tango/common.h, and an address that no test reads.
BAD_ARGUMENT, HERE = 1, 4096

#: With few SMs, attention takes large tiles for few rows.
GPUS = {
    "attention": {"sms": 1, "shared_bytes": 100 << 10},
    "attention_sm90": {"sms": 1},
    "vision_sm90": {"sms": 1},
}
SHAPES = {
    "tests": DecoderShape(2, 64, 4, 2, 16, 128, 420, 448, 512, EPS),
    "odd": DecoderShape(2, 144, 3, 1, 48, 208, 300, 304, 700, EPS),
    "blocks with nothing to do": DecoderShape(3, 16, 1, 1, 16, 256, 250, 256, 80, EPS),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """``library("decode")``: the kernels of a name, compiled once."""
    return cache(lambda name: compiled(tmp_path_factory.mktemp(name), name, **GPUS.get(name, {})))


@pytest.mark.parametrize(
    ("name", "blocks", "positions"),
    [
        ("tests", 1, (0, 65, 511)),
        ("tests", 3, (150,)),
        ("odd", 2, (0, 699)),
        ("blocks with nothing to do", 3, (0, 70)),
    ],
)
def test_logits_and_new_rows_equal_fp64(library, name, blocks, positions):
    decoder = Decoder(SHAPES[name], library=library("decode"), blocks=blocks, device="cpu")
    for position in positions:
        check_step(decoder, position)


@pytest.mark.parametrize("rotation", [0, 33, 70_000])
def test_rotary_angles_follow_the_rotation_and_not_the_cache_row(library, rotation):
    check_step(Decoder(SHAPES["tests"], library=library("decode"), blocks=3, device="cpu"), 70, rotation)


def test_the_rotation_is_the_position_by_default(library):
    decoder = Decoder(SHAPES["tests"], library=library("decode"), blocks=3, device="cpu")
    embedding = decoder.embedding()
    assert torch.equal(decoder.step(embedding, 70), decoder.step(embedding, 70, 70))


def test_the_lower_of_equal_logits_is_the_greatest_and_nan_above_all(library):
    decoder = Decoder(SHAPES["tests"], library=library("decode"), blocks=3, device="cpu")
    embedding, head = decoder.embedding(), decoder.weights["lm_head.weight"]
    index = int(decoder.step(embedding, 70).argmax())
    head[:, [index // 2, 419]] = head[:, [index]]
    logits = decoder.step(embedding, 70)
    assert decoder.greatest() == (index // 2, float(logits[index]))
    head[:, [5, 300]] = torch.nan
    decoder.step(embedding, 70)
    index, value = decoder.greatest()
    assert index == 5
    assert isnan(value)


def test_a_step_does_without_the_greatest_logit(library):
    decoder = Decoder(SHAPES["tests"], library=library("decode"), blocks=3, device="cpu")
    embedding = decoder.embedding()
    logits, found = decoder.step(embedding, 70), decoder.greatest()
    decoder.best = torch.zeros(8, dtype=torch.uint8)
    given = {name: device_array(getattr(decoder, name)) for name in ("logits", "table", "workspace")}
    decoder.decoder.enqueue(device_array(embedding), 71, **given, stream=0)
    assert decoder.greatest() == (0, 0.0)
    assert torch.equal(decoder.step(embedding, 70), logits)
    assert decoder.greatest() == found


def test_a_negative_rotation_is_rejected(library):
    decoder = Decoder(SHAPES["tests"], library=library("decode"), blocks=3, device="cpu")
    with pytest.raises(TangoError, match="rotation is -1: it must be from 0 to 16777216"):
        decoder.enqueue(decoder.embedding(), 70, -1)


@pytest.mark.parametrize(("name", "blocks"), [("tests", 3), ("odd", 2)])
def test_a_step_of_a_token_that_was_found_is_its_own(library, name, blocks):
    check_next(Decoder(SHAPES[name], library=library("decode"), blocks=blocks, device="cpu"), 70, 33)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"table": None}, "table is null"),
        ({"row": None}, "row is null"),
        ({"mail": None}, "mail is null"),
        ({"embedding": None}, "embedding is null"),
        ({"embedding": HERE + 8}, "embedding is at 0x1008: it must be aligned to 16 bytes"),
        ({"stop": None}, "stop is null"),
        ({"words": 0}, "words is 0: it must be from 1"),
        ({"stops": -1}, "stops is -1: it must be from 0"),
    ],
)
def test_words_that_cannot_be_are_rejected_before_the_wait(library, monkeypatch, changed, message):
    decoder = Decoder(SHAPES["tests"], library=library("decode"), blocks=3, device="cpu")
    words = decoder.words((3,))
    struct = words.struct(decoder.shape.hidden_size)
    for name, value in changed.items():
        setattr(struct, name, value)
    monkeypatch.setattr(words, "struct", lambda width: struct)
    with pytest.raises(TangoError, match=message):
        decoder.next(torch.zeros(1, dtype=torch.int32), 70, 70, words)


@pytest.mark.parametrize(
    ("shape", "begin"),
    [
        (Shape(9, 4, 2, 16, 80), 0),
        (Shape(3, 3, 1, 48, 200), 130),
        (Shape(70, 2, 1, 64, 100), 0),
        (Shape(20, 7, 1, 128, 90), 60),
        (Shape(5, 2, 2, 80, 64), 0),
        (Shape(12, 3, 1, 192, 60), 40),
        (Shape(70, 4, 2, 48, 170), 90),  # large tiles
        (Shape(70, 4, 2, 96, 170), 90),
    ],
)
@pytest.mark.parametrize("positioned", [False, True])
def test_attention_equals_fp64(library, shape, begin, positioned):
    check(Pass(shape, begin, path=library("attention"), device="cpu", positioned=positioned))


@pytest.mark.parametrize("missing", ["shape", "tensors"])
def test_attention_rejects_null_arguments(library, missing):
    given = {"shape": structs.TangoAttentionShape(1, 1, 1, 16, 1), "tensors": structs.TangoAttentionTensors()}
    attention = native_library.load(library("attention"))
    assert attention.tango_attention_enqueue(*(given | {missing: None}).values(), None) == BAD_ARGUMENT
    assert attention.tango_last_error() == f"{missing} is null".encode()


@pytest.mark.parametrize("name", [name for name, _ in structs.TangoAttentionTensors._fields_])
def test_attention_rejects_a_null_tensor(library, name):
    found = Pass(Shape(2, 2, 1, 16, 4), path=library("attention"), device="cpu")
    found.tensors[name] = SimpleNamespace(data_ptr=lambda: None)
    assert found.enqueue() == BAD_ARGUMENT
    assert found.library.tango_last_error() == f"{name} is null".encode()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tango_bias_enqueue", (0, None, HERE, 1, 8, HERE), "x is null"),
        ("tango_bias_enqueue", (0, HERE, None, 1, 8, HERE), "bias is null"),
        ("tango_bias_gelu_enqueue", (0, 1, HERE, HERE, 1, 8, 0, 0, None), "y is null"),
        ("tango_bias_gelu_enqueue", (0, 2, HERE, HERE, 1, 8, 0, 0, HERE), "gelu is 2: it must be from 0 to 1"),
        ("tango_bias_gelu_enqueue", (2, 0, HERE, HERE, 1, 8, 2, 1, HERE), "dtype is 2: it must be from 0 to 1"),
        ("tango_bias_gelu_enqueue", (0, 0, HERE, HERE, 1, 8, 1, 0, HERE), "y_dtype is 1: it must be dtype, which is 0"),
        ("tango_swiglu_enqueue", (0, None, HERE, 8, 0, 0, HERE), "gate is null"),
        ("tango_swiglu_enqueue", (0, HERE, None, 8, 0, 0, HERE), "up is null"),
        ("tango_swiglu_enqueue", (0, HERE, HERE, -1, 0, 0, HERE), "size is -1"),
    ],
)
def test_activations_reject_bad_arguments(library, name, arguments, message):
    activation = native_library.load(library("activation"))
    assert getattr(activation, name)(*arguments, None) == BAD_ARGUMENT
    assert activation.tango_last_error().decode().startswith(message)


@pytest.mark.parametrize(("gelu", "form"), [(0, "none"), (1, "tanh")])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 64), (2, 13)])
def test_gelu_equals_fp64(library, gelu, form, has_bias, shape):
    generator = torch.Generator().manual_seed(shape[1])
    x, bias, y = (
        torch.randn(shape, generator=generator) * 4,
        torch.randn(shape[1], generator=generator),
        torch.empty(shape),
    )
    activation = native_library.load(library("activation"))
    given = bias.data_ptr() if has_bias else None
    assert activation.tango_bias_gelu_enqueue(1, gelu, x.data_ptr(), given, *shape, 1, 0, y.data_ptr(), None) == 0
    wanted = torch.nn.functional.gelu(x.double() + (bias.double() if has_bias else 0), approximate=form)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("size", [1, 31, 1024, 5000])
def test_argmax_finds_the_first_largest_value(library, size):
    values = torch.randint(-9, 10, (size,), generator=torch.Generator().manual_seed(size)).float()
    assert argmax(library, values) == (int(values.numpy().argmax()), float(values.max()))


def test_nan_is_larger_than_infinity_and_zeros_are_equal(library):
    index, value = argmax(library, torch.tensor([1.0, torch.inf, torch.nan, 3.0, torch.nan]))
    assert index == 2
    assert isnan(value)
    assert argmax(library, torch.tensor([-1.0, -0.0, 0.0]))[0] == 1


def test_argmax_of_rows_is_that_of_each(library):
    rows = torch.randn(3, 3000, generator=torch.Generator().manual_seed(0))
    addresses, found = (ctypes.c_void_p * 3)(*(row.data_ptr() for row in rows)), (structs.TangoArgmax * 3)()
    loaded = native_library.load(library("argmax"))
    assert loaded.tango_argmax_rows_enqueue(addresses, 3, 3000, ctypes.byref(found), None) == 0
    assert [(each.index, each.value) for each in found] == [argmax(library, row) for row in rows]
    assert loaded.tango_argmax_rows_enqueue(addresses, 9, 3000, ctypes.byref(found), None) == BAD_ARGUMENT
    assert loaded.tango_last_error().decode() == "count is 9: it must be from 1 to 8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((None, 1, HERE), "values is null"), ((HERE, 0, HERE), "size is 0"), ((HERE, 1, None), "argmax is null")],
)
def test_argmax_rejects_bad_arguments(library, arguments, message):
    loaded = native_library.load(library("argmax"))
    assert loaded.tango_argmax_enqueue(*arguments, None) == BAD_ARGUMENT
    assert loaded.tango_last_error().decode().startswith(message)


def argmax(library, values):
    found = structs.TangoArgmax()
    loaded = native_library.load(library("argmax"))
    assert loaded.tango_argmax_enqueue(values.data_ptr(), len(values), ctypes.byref(found), None) == 0
    return found.index, found.value


@pytest.mark.parametrize(("dtype", "width"), [(torch.float16, 72), (torch.float16, 5), (torch.float32, 4)])
def test_rows_are_gathered_bit_for_bit(library, dtype, width):
    tensors = row_tensors(dtype, width)
    assert gather(native_library.load(library("rows")), *tensors) == 0
    assert_gathered(*tensors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, HERE, HERE, 1, 8, HERE), "rows is null"),
        ((HERE, None, HERE, 1, 8, HERE), "filler is null"),
        ((HERE, HERE, None, 1, 8, HERE), "order is null"),
        ((HERE, HERE, HERE + 2, 1, 8, HERE), "order is at"),
        ((HERE, HERE, HERE, 1, 8, None), "gathered is null"),
        ((HERE, HERE, HERE, -1, 8, HERE), "count is -1"),
        ((HERE, HERE, HERE, 1, 0, HERE), "row_bytes is 0"),
        ((HERE, HERE, HERE, 1, 9, HERE), "row_bytes is 9: it must be even"),
    ],
)
def test_a_gather_rejects_bad_arguments(library, arguments, message):
    loaded = native_library.load(library("rows"))
    assert loaded.tango_rows_gather_enqueue(*arguments, None) == BAD_ARGUMENT
    assert loaded.tango_last_error().decode().startswith(message)


@pytest.mark.parametrize(("fault", "found"), [(0, False), (1, True)])
def test_the_emulator_finds_a_copy_that_nobody_waits_for(library, fault, found):
    numbers, reversed_numbers = torch.arange(256.0), torch.zeros(256)
    reverse = ctypes.CDLL(str(library("faults"))).emulator_reverse
    assert reverse(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in (numbers, reversed_numbers)), fault) == 0
    assert reversed_numbers.isnan().all() == found
    assert torch.equal(reversed_numbers, numbers.flip(0)) != found


@pytest.fixture
def sanitizer():
    """The environment of a process under ThreadSanitizer."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the PATH")
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {"LD_PRELOAD": found.stdout.strip(), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", ""], env=environment, capture_output=True, text=True)
    if ran.returncode != 0 or ran.stderr:
        pytest.skip(f"ThreadSanitizer does not run here: {ran.stderr.strip()}")
    return environment


def under_sanitizer(folder, environment, case, kernel, *parts):
    flags = ("-fsanitize=thread", "-g", "-DTANGO_EARLY_COPIES")
    library = compiled(folder, kernel, *parts, **GPUS.get(kernel, {}), flags=flags)
    command = [sys.executable, "-m", "tests.plugins.cuda_emulator.races", case, str(library)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *("decode", "quantized", "batch", "linear", "int8", "attention", "attention_sm90", "vision", "vision_sm90"),
        *("norm", "thin"),
    ],
)
def test_no_two_threads_race(tmp_path, sanitizer, case):
    linear = ("linear", "products")
    kernels = {"quantized": ("decode",), "batch": ("decode",), "linear": linear, "int8": linear}
    ran = under_sanitizer(tmp_path, sanitizer, case, *kernels.get(case, (case,)))
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(("case", "code"), [("no fault", 0), ("no barrier", 66)])
def test_the_sanitizer_finds_a_missing_barrier(tmp_path, sanitizer, case, code):
    ran = under_sanitizer(tmp_path, sanitizer, case, "faults")
    assert ran.returncode == code, ran.stderr
    assert ("data race" in ran.stderr) == (code == 66)
