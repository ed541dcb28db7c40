"""Times weights of 4 and 8 bits on a GPU, next to fp16 in the same run: decode steps of one sequence and of several,
and the products of a prefill.

    python -m benchmarks.bench_weights --output benchmarks/results/weights-h200.json

Weights are random, with the shapes of the 0.5B and the 7B, and of SigLIP's layers. Times are medians over replays of a
CUDA graph of several calls. A product rotates over several copies of the weights, so that they are read from memory and
not from the cache; that of fp16 is PyTorch's. Products of quantized weights are timed as the library
wants them, with a workspace or without, and the other way where it wants one; ``--kinds product`` leaves decode steps
out.

Formats have peers in PyTorch, of the same shapes, in the same run: ``torch._scaled_mm`` for FP8, ``torch._int_mm`` for
INT8 activations, ``torch._weight_int4pack_mm`` for INT4. The first two take activations that are quantized already, and
the second leaves the scales out; ours quantize and scale. The third takes bf16, and weights packed ahead.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_kernels import measure
from tango_plugins import native_library, structs
from tango_plugins.decoder import CudaBatchDecoder, CudaDecoder, DecoderShape, DecodeSequence, Words, cache_table
from tango_plugins.device_array import DeviceArray
from tango_plugins.matrix import Matrix

#: Vocabulary and head columns of the released checkpoints.
_HEAD = (151646, 152064)
SHAPES = {
    "0.5b": DecoderShape(24, 896, 14, 2, 64, 4864, *_HEAD, 8192, 1e-6),
    "7b": DecoderShape(28, 3584, 28, 4, 128, 18944, *_HEAD, 8192, 1e-6),
}
#: Bits, and inputs of a block (0: one scale for each output; None: FP8, one for all), by name.
FORMATS = {
    "fp16": (16, 0),
    "fp8": (8, None),
    "int8": (8, 0),
    "int8-32": (8, 32),
    "int4-32": (4, 32),
    "int4-128": (4, 128),
}
#: Products that quantize their activations first, where int8 takes them as they are: type, its TangoDtype, scale.
ACTIVATIONS = {"fp8": (torch.float8_e4m3fn, 2, 0.01), "w8a8": (torch.int8, 3, 0.03)}
#: Inputs and outputs of the products of a layer.
PRODUCTS = {
    "7b": {"qkv": (3584, 4608), "out": (3584, 3584), "gate, up": (3584, 18944), "down": (18944, 3584)},
    "0.5b": {"qkv": (896, 1152), "out": (896, 896), "gate, up": (896, 4864), "down": (4864, 896)},
    "siglip": {"qkv": (1152, 3456), "out": (1152, 1152), "fc1": (1152, 4304), "fc2": (4304, 1152)},
}
for size, shape in SHAPES.items():
    PRODUCTS[size]["head"] = (shape.hidden_size, shape.head_columns)
POSITION, BANDWIDTH = 671, 4.8e12
COUNTS = (659, 30, 8, 1)  # rows of a prompt, of a later question, and of the last layer, which computes one position
TOWER_ROWS, TOWER_FORMATS = 32 * 729, ("fp16", "fp8", "int8", "w8a8")  # of 32 frames
KINDS, PRODUCT_FORMATS = ("decode", "product"), (*FORMATS, "w8a8")
STEPS, COPIES, WARM_UP = 10, 4, 8
#: Formats and numbers of sequences of a step of several.
BATCHED, SEQUENCES = ("fp16", "fp8", "int8", "int4-32", "int4-128"), (1, 8)


def described(tensor):
    """A tensor as the library's bindings take it."""
    return DeviceArray(tensor.data_ptr(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor)


def random_matrix(inputs, outputs, bits, group):
    """A matrix in a format, scaled so that products have the magnitude of their input."""
    if bits == 16:
        return Matrix(described(torch.randn(inputs, outputs, device="cuda", dtype=torch.half) * inputs**-0.5))
    if group is None:
        values = torch.randn(outputs, inputs, device="cuda").to(torch.float8_e4m3fn)
        return Matrix(described(values), described(torch.tensor(inputs**-0.5, device="cuda").half()), bits=bits)
    step = inputs**-0.5 * 2 ** (1 - bits)
    if not group:
        values = torch.randint(-127, 128, (inputs, outputs), device="cuda", dtype=torch.int8)
        return Matrix(described(values), described(torch.full((outputs,), step, device="cuda")), bits=bits)
    blocks = inputs // group
    values = torch.randint(0, 256, (outputs, blocks, group * bits // 8), device="cuda", dtype=torch.uint8)
    scales = torch.full((outputs, blocks), step, device="cuda", dtype=torch.half)
    # As the runtime has them: random numbers are random in any order.
    return Matrix(described(values), described(scales), bits=bits, group=group, interleaved=True)


def bytes_of(matrix):
    """Bytes of a matrix with its scales."""
    tensors = [matrix.values.owner] + ([matrix.scales.owner] if matrix.scales else [])
    return sum(tensor.nbytes for tensor in tensors)


class RandomDecoder:
    """Weights of a decoder whose matrices are in a format; what runs it has their addresses."""

    def __init__(self, size, form):
        self.shape, kind = SHAPES[size], FORMATS[form]
        s = self.shape
        qkv = (s.heads + 2 * s.kv_heads) * s.head_dim
        self.weights = {
            "rotary.inv_freq": described(1e6 ** (-torch.arange(0, s.head_dim, 2, device="cuda") / s.head_dim)),
            "norm.weight": random(s.hidden_size),
        }
        self.matrices = {"lm_head.weight": random_matrix(s.hidden_size, s.head_columns, *kind)}
        for i in range(s.layers):
            for name, sizes in {
                "self_attn.qkv_proj": (s.hidden_size, qkv),
                "self_attn.o_proj": (s.heads * s.head_dim, s.hidden_size),
                "mlp.gate_proj": (s.hidden_size, s.intermediate),
                "mlp.up_proj": (s.hidden_size, s.intermediate),
                "mlp.down_proj": (s.intermediate, s.hidden_size),
            }.items():
                self.matrices[f"layers.{i}.{name}.weight"] = random_matrix(*sizes, *kind)
            self.weights[f"layers.{i}.input_layernorm.weight"] = random(s.hidden_size)
            self.weights[f"layers.{i}.post_attention_layernorm.weight"] = random(s.hidden_size)
            self.weights[f"layers.{i}.self_attn.qkv_proj.bias"] = random(qkv, dtype=torch.half)

    def cache(self):
        """A random KV cache."""
        s = self.shape
        return [random(s.kv_heads, s.capacity, s.head_dim, dtype=torch.half) for _ in range(2 * s.layers)]

    def bytes_read(self, sequences):
        """Bytes that a step reads: all matrices once, and each cache up to its position."""
        s = self.shape
        cache = 2 * s.layers * s.kv_heads * (POSITION + 1) * s.head_dim * 2
        return sum(map(bytes_of, self.matrices.values())) + sequences * cache


def time_decode(size, form, repeats):
    """A record of a decode step."""
    made = RandomDecoder(size, form)
    cache, embedding, logits = made.cache(), random(made.shape.hidden_size, dtype=torch.half), logits_of(made.shape)
    decoder = CudaDecoder(made.shape, made.weights, made.matrices, cache)
    given = {"logits": logits, **memory_of(decoder)}

    def step():
        decoder.enqueue(embedding, POSITION, **given, stream=torch.cuda.current_stream().cuda_stream)

    return decode_record("decode", size, form, made.bytes_read(1), measure([step], repeats, STEPS), [logits])


def time_chain(size, form, repeats):
    """A record of steps that each take the token which the one before has found, as greedy decoding does."""
    made = RandomDecoder(size, form)
    width = made.shape.hidden_size
    decoder = CudaDecoder(made.shape, made.weights, made.matrices, made.cache())
    given, stream = memory_of(decoder), torch.cuda.current_stream().cuda_stream
    table = torch.randn(made.shape.vocabulary, width, device="cuda", dtype=torch.half).cpu().numpy()
    row, mail = (
        torch.zeros(n, dtype=dtype).pin_memory().numpy() for n, dtype in ((width, torch.half), (2, torch.int32))
    )
    words = Words(table, row, mail.view(np.uint32), random(1, width, dtype=torch.half), [])
    found = torch.zeros(2, 8, dtype=torch.uint8).pin_memory()
    outputs = [(logits_of(made.shape), best.data_ptr()) for best in found]
    moments, tokens = [], []
    for i in range(repeats * STEPS + WARM_UP):
        (_, before), (logits, best) = outputs[i % 2], outputs[1 - i % 2]
        places = POSITION + i, POSITION + i
        tokens.append(decoder.enqueue_next(words, before, *places, logits=logits, best=best, **given, stream=stream))
        moments.append(time.perf_counter())
    microseconds = round(1e6 * statistics.median(np.diff(moments[WARM_UP:])), 2)
    record = decode_record("chain", size, form, made.bytes_read(1), microseconds, [logits for logits, _ in outputs])
    return record | {"tokens": tokens[:STEPS]}


def time_batch(size, form, count, repeats):
    """A record of a decode step of several sequences."""
    made = RandomDecoder(size, form)
    caches, outputs = [made.cache() for _ in range(count)], [logits_of(made.shape) for _ in range(count)]
    tables = [described(torch.from_numpy(cache_table(made.shape, cache)).cuda()) for cache in caches]
    sequences = [
        DecodeSequence(
            random(made.shape.hidden_size, dtype=torch.half), POSITION, POSITION, table, made.shape.capacity, logits
        )
        for table, logits in zip(tables, outputs, strict=True)
    ]
    decoder = CudaBatchDecoder(made.shape, made.weights, made.matrices)
    given = memory_of(decoder)

    def step():
        decoder.enqueue(sequences, **given, stream=torch.cuda.current_stream().cuda_stream)

    microseconds = measure([step], repeats, STEPS)
    return decode_record("batch", size, form, made.bytes_read(count), microseconds, outputs) | {"sequences": count}


def random(*shape, dtype=torch.float32):
    """Random values on the GPU."""
    return described(torch.randn(*shape, device="cuda", dtype=dtype))


def logits_of(shape):
    """Room for the logits of a step."""
    return described(torch.empty(shape.vocabulary, device="cuda"))


def memory_of(decoder):
    """The table and the workspace of a decoder."""
    memory = torch.zeros(decoder.workspace_bytes + 256, dtype=torch.uint8, device="cuda")
    workspace = memory[-memory.data_ptr() % 256 :][: decoder.workspace_bytes]
    return {"table": described(torch.from_numpy(decoder.table).cuda()), "workspace": described(workspace)}


def decode_record(kind, size, form, size_read, microseconds, outputs):
    """A record of a step that read so many bytes and wrote some logits."""
    record = {"kind": kind, "size": size, "weights": form, "us": microseconds, "gb": round(size_read / 1e9, 3)}
    record["share_of_bandwidth"] = round(size_read / (microseconds * 1e-6) / BANDWIDTH, 3)
    record["finite"] = all(bool(logits.owner.isfinite().all()) for logits in outputs)
    return record


def time_product(size, name, form, rows, repeats, room=0, by_default=True):
    """A record of a product of a prefill or a tower, with room for so many outputs in a workspace."""
    inputs, outputs = PRODUCTS[size][name]
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.half)
    y = torch.empty(rows, outputs, device="cuda", dtype=torch.half)
    matrices = [random_matrix(inputs, outputs, *FORMATS.get(form, FORMATS["int8"])) for _ in range(COPIES)]
    if form == "fp16":
        calls = [lambda m=m: torch.mm(x, m.values.owner, out=y) for m in matrices]
    elif form in ACTIVATIONS:
        calls = [quantized_product(x, matrix, y, form) for matrix in matrices]
    else:
        shape, library = structs.TangoLinearShape(rows, inputs, outputs), native_library.load()
        given = [matrix.struct("weight", inputs, outputs) for matrix in matrices]
        workspace = torch.empty(room, inputs, device="cuda", dtype=torch.half)
        scratch = (workspace.data_ptr() if room else None), workspace.nbytes

        def call(matrix):
            stream = torch.cuda.current_stream().cuda_stream
            if library.tango_linear_enqueue(shape, matrix, x.data_ptr(), y.data_ptr(), *scratch, stream) != 0:
                raise RuntimeError(library.tango_last_error().decode())

        calls = [lambda matrix=matrix: call(matrix) for matrix in given]
    microseconds = measure(calls, repeats, 2 * COPIES)
    record = {"kind": "product", "size": size, "name": name, "rows": rows, "weights": form, "us": microseconds}
    record |= {"room": room, "by_default": by_default}
    record["tflops"] = tflops(rows, inputs, outputs, microseconds)
    return record | (time_peer(size, name, form, rows, repeats) if form in PEERS and by_default else {})


def slabs_of(size, name, rows):
    """Outputs that there is room for in a workspace, as the library wants it, and 0 for none."""
    inputs, outputs = PRODUCTS[size][name]
    library, wanted = native_library.load(), ctypes.c_size_t()
    if library.tango_linear_workspace(structs.TangoLinearShape(rows, inputs, outputs), wanted) != 0:
        raise RuntimeError(library.tango_last_error().decode())
    return list(dict.fromkeys((wanted.value // (2 * inputs), 0)))


def scaled_mm(rows, inputs, outputs, _):
    """A function that calls PyTorch's product of FP8 with one scale each."""
    x, weight = (torch.randn(n, inputs, device="cuda").to(torch.float8_e4m3fn) for n in (rows, outputs))
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.half)


def int_mm(rows, inputs, outputs, _):
    """A function that calls PyTorch's product of INT8, which gives INT32."""
    x, weight = (torch.randint(-127, 128, (n, inputs), device="cuda", dtype=torch.int8) for n in (rows, outputs))
    return lambda: torch._int_mm(x, weight.t())


def int4pack_mm(rows, inputs, outputs, group):
    """A function that calls PyTorch's product of bf16 and blocks of INT4."""
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    values = torch.randint(0, 256, (outputs, inputs // 2), device="cuda", dtype=torch.uint8)
    packed = torch._convert_weight_to_int4pack(values, 8)
    scales = torch.randn(inputs // group, outputs, 2, device="cuda", dtype=torch.bfloat16)
    return lambda: torch._weight_int4pack_mm(x, packed, group, scales)


#: The peers of formats.
PEERS = {"fp8": scaled_mm, "w8a8": int_mm, "int4-32": int4pack_mm, "int4-128": int4pack_mm}


def time_peer(size, name, form, rows, repeats):
    """What a product's record says of its peer: its name, and its time or why there is none."""
    make, (inputs, outputs), group = PEERS[form], PRODUCTS[size][name], FORMATS.get(form, (8, 0))[1]
    found = {"peer": f"torch._{'weight_' if make is int4pack_mm else ''}{make.__name__}"}
    try:
        calls = [make(rows, inputs, outputs, group) for _ in range(COPIES)]
        microseconds = measure(calls, repeats, 2 * COPIES)
    except RuntimeError as error:
        return found | {"peer_not_run": str(error).splitlines()[0]}
    return found | {"peer_us": microseconds, "peer_tflops": tflops(rows, inputs, outputs, microseconds)}


def tflops(rows, inputs, outputs, microseconds):
    """TFLOP/s of a product."""
    return round(2 * rows * inputs * outputs / microseconds / 1e6, 1)


def quantized_product(x, matrix, y, form):
    """A function that quantizes x and multiplies it by a matrix."""
    library, shape = native_library.load(), structs.TangoLinearShape(*x.shape, y.shape[1])
    dtype, number, step = ACTIVATIONS[form]
    quantized, scale = torch.empty(x.shape, device="cuda", dtype=dtype), matrix.scales.owner.float()
    if form == "fp8":
        pointers = [tensor.data_ptr() for tensor in (quantized, matrix.values.owner, scale)]
        tensors = structs.TangoFp8LinearTensors(*pointers, None, None, y.data_ptr())
        multiply = partial(library.tango_fp8_linear_enqueue, shape, tensors, step)
    else:
        given = shape, matrix.struct("weight", x.shape[1], y.shape[1]), quantized.data_ptr(), step, y.data_ptr()
        multiply = partial(library.tango_int8_linear_enqueue, *given)

    def call(keep=(quantized, scale)):
        stream = torch.cuda.current_stream().cuda_stream
        result = number, step, quantized.data_ptr(), stream
        if library.tango_quantize_enqueue(0, x.data_ptr(), x.numel(), *result) or multiply(stream):
            raise RuntimeError(library.tango_last_error().decode())

    return call


def main():
    """Measures and prints all records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sizes", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--formats", nargs="+", choices=PRODUCT_FORMATS, default=PRODUCT_FORMATS, help="of products")
    args = parser.parse_args()
    records = []

    def add(record):
        records.append(record)
        print(json.dumps(record), flush=True)
        torch.cuda.empty_cache()

    for size in args.sizes:
        decodes = "decode" in args.kinds and size in SHAPES
        for form in FORMATS if decodes else ():
            add(time_decode(size, form, args.repeats))
            add(time_chain(size, form, args.repeats))
        for form, count in product(BATCHED, SEQUENCES) if decodes else ():
            add(time_batch(size, form, count, args.repeats))
        if "product" not in args.kinds:
            continue
        counts, forms = (COUNTS, PRODUCT_FORMATS) if size in SHAPES else ((TOWER_ROWS,), TOWER_FORMATS)
        for rows, name, form in product(counts, PRODUCTS[size], [form for form in forms if form in args.formats]):
            if name == "head" and rows > 1:  # it takes the last position only
                continue
            rooms = slabs_of(size, name, rows) if form not in ("fp16", *ACTIVATIONS) else [0]
            for room in rooms:
                add(time_product(size, name, form, rows, args.repeats, room, room == rooms[0]))
    if args.output:
        conditions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "repeats": args.repeats}
        args.output.write_text(json.dumps({"conditions": conditions, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
