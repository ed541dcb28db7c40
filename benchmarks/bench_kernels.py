"""Times the kernels of a vision tower, attention of a prefill, and products of fp16, on a GPU, next to PyTorch's in the
same run.

    python -m benchmarks.bench_kernels --output benchmarks/results/kernels-h200.json

Each figure is the median time of one call in a replayed CUDA graph, which goes over rotating inputs. A tower's
attention takes one packed tensor of queries, keys and values, with a bias; PyTorch's takes views of it, without the
bias. With a rotation of queries and keys it is measured in one kernel and in two. A prefill's attention adds biases,
rotates, and writes keys and values to the cache; PyTorch's does none of this, and takes keys and values of every query
head. The peer of a norm is an addition and a norm, that of a product cuBLAS as PyTorch calls it. Where GELU follows,
both are also followed by the CUDA library's GELU with a bias.

A library that was built for sm_80 has no kernel for Hopper's warpgroups; `--mma-library` times its attention of a
prefill too, from PTX that the driver compiles:

    tango plugin build --architectures 80 --output build/sm80
"""

from __future__ import annotations

import argparse
import json
from itertools import cycle
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, layer_norm, rms_norm, scaled_dot_product_attention

from tango_plugins import native_library, structs

#: Frames, rows and columns of patches, heads, head_dim, window: SigLIP so400m of 32 frames, and both kinds of layers of
#: Qwen2.5-VL's tower.
ATTENTION = [(32, 27, 27, 16, 72, 0), (8, 36, 80, 16, 80, 0), (16, 36, 80, 16, 80, 8)]
#: Tokens, heads, kv_heads, head_dim: prompts of the 7B and of the 0.5B. 659 is that of a pruned video, 6303 that of all
#: of its tokens, 2181 that of LLaVA-Video.
PREFILLS = [(T, *heads) for heads in ((28, 4, 128), (14, 2, 64)) for T in (320, 659, 1280, 2181, 6303)]
#: Those with a rotation: a pass over 32 frames of 560×1008.
ROTATION = [(16, 40, 72, 16, 80, 8), (16, 40, 72, 16, 80, 0), (16, 36, 80, 16, 80, 8)]
#: Kind, rows and width, types of the residual stream, of the branch and of the result (TangoDtype).
NORMS = [
    ("layer", 32 * 729, 1152, (0, 0, 0)),
    ("layer", 32 * 729, 1152, (1, 0, 0)),
    ("layer", 32 * 729, 1152, (1, 1, 1)),
    ("rms", 8 * 2880, 1280, (0, 0, 0)),
    ("rms", 659, 3584, (0, 0, 0)),
]
#: Rows and width of the MLP.
GELU = [(32 * 729, 4304)]
#: Rows, inputs and outputs: prefills of the 0.5B and of the 7B, and SigLIP so400m of 32 frames.
LINEARS = [
    *[(659, 896, 1152), (659, 896, 896), (659, 896, 4864), (659, 4864, 896)],
    *[(659, 3584, 4608), (659, 3584, 3584), (659, 3584, 18944), (659, 18944, 3584)],
    *[(30, 3584, 4608), (30, 3584, 3584), (30, 3584, 18944), (30, 18944, 3584)],
    *[(32 * 729, 1152, 3456), (32 * 729, 1152, 1152), (32 * 729, 4304, 1152)],
]
#: Those that GELU follows.
LINEAR_GELUS = [(32 * 729, 1152, 4304)]
DTYPES = (torch.float16, torch.float32)
INPUTS, CALLS = 3, 24


def measure(calls, repeats, count=CALLS):
    """Microseconds of one call: median of replays of a graph of ``count`` calls."""
    for call in calls:
        call()
    graph, turns = torch.cuda.CUDAGraph(), cycle(calls)
    with torch.cuda.graph(graph):
        for _ in range(count):
            next(turns)()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / count)
    return round(sorted(times)[repeats // 2], 2)


def enqueue(name, *arguments, library=None):
    """Calls a function of the CUDA library, or of another build of it, on the current stream."""
    library = native_library.load(library)
    if getattr(library, name)(*arguments, torch.cuda.current_stream().cuda_stream) != 0:
        raise RuntimeError(library.tango_last_error().decode())


def random(*size, dtype=torch.float16):
    """Normal numbers on the GPU."""
    return torch.randn(*size, device="cuda").to(dtype)


def time_attention(case, repeats):
    """A record of one shape; the peers are left out where there are windows."""
    F, rows, columns, H, d, window = case
    T, width = rows * columns, H * d
    shape = structs.TangoVisionAttentionShape(F, rows, columns, H, d, window, *[3 * width] * 3)
    inputs = [(random(F, T, 3 * width), random(3 * width), random(F, T, width)) for _ in range(INPUTS)]

    def ours(packed, bias, out):
        parts, biases = (parts_of(x, width) for x in (packed, bias))
        tensors = structs.TangoVisionAttentionTensors(*parts, *biases, None, None, out.data_ptr())
        enqueue("tango_vision_attention_enqueue", shape, tensors)

    def theirs(packed, backend):
        with sdpa_kernel(backend):
            scaled_dot_product_attention(*(part.view(F, T, H, d).transpose(1, 2) for part in packed.chunk(3, -1)))

    record = {"kernel": "vision attention", "shape": case}
    record["us"] = measure([lambda given=given: ours(*given) for given in inputs], repeats)
    if window == 0:
        record["tflops"] = round(4 * F * T * T * width / record["us"] / 1e6, 1)
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            calls = [lambda given=given, backend=backend: theirs(given[0], backend) for given in inputs]
            record[f"{name}_us"] = measure(calls, repeats)
    return record


def time_prefill(case, repeats, mma_library=None):
    """A record of causal attention among new tokens; nothing is in the cache before them."""
    T, H, G, d = case
    shape = structs.TangoAttentionShape(*case, T, 0)
    fixed = [random((H + 2 * G) * d), torch.tensor([T - 1], dtype=torch.int32, device="cuda"), *random(2, T, d // 2)]
    inputs = [(random(T, (H + 2 * G) * d), random(G, T, d), random(G, T, d), random(T, H * d)) for _ in range(INPUTS)]

    def ours(qkv, keys, values, out, library=None):
        tensors = structs.TangoAttentionTensors(*(part.data_ptr() for part in (qkv, *fixed, keys, values, out)))
        enqueue("tango_attention_enqueue", shape, tensors, library=library)

    def theirs(query, key, value, backend):
        with sdpa_kernel(backend):
            scaled_dot_product_attention(query, key, value, is_causal=True)

    record = {"kernel": "attention of a prefill", "shape": case}
    record["us"] = measure([lambda given=given: ours(*given) for given in inputs], repeats)
    record["tflops"] = round(2 * H * d * T * (T + 1) / record["us"] / 1e6, 1)
    if mma_library is not None:
        record["mma_us"] = measure([lambda given=given: ours(*given, mma_library) for given in inputs], repeats)
    heads = [[random(1, H, T, d) for _ in range(3)] for _ in range(INPUTS)]
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        calls = [lambda given=given, backend=backend: theirs(*given, backend) for given in heads]
        record[f"{name}_us"] = measure(calls, repeats)
    return record


def time_rotation(case, repeats):
    """A record of attention after a rotation, in two kernels, and in one where there are windows."""
    F, rows, columns, H, d, window = case
    T, width = rows * columns, H * d
    grid = F, rows, columns, H, d, window
    packed = structs.TangoVisionAttentionShape(*grid, *[3 * width] * 3)
    apart = structs.TangoVisionAttentionShape(*grid, width, width, 3 * width)
    patches = structs.TangoPatchRotationShape(F, T, H, d, 0)
    angles = [random(T, d // 2, dtype=torch.float32) for _ in range(2)]
    turns = [angle.data_ptr() for angle in angles]
    sizes = (F, T, 3 * width), (3 * width,), *[(F, T, width)] * 3
    inputs = [[random(*size) for size in sizes] for _ in range(INPUTS)]

    def fused(qkv, bias, query, key, out):
        parts, biases = parts_of(qkv, width), parts_of(bias, width)
        tensors = structs.TangoVisionAttentionTensors(*parts, *biases, *turns, out.data_ptr())
        enqueue("tango_vision_attention_enqueue", packed, tensors)

    def rotate(qkv, bias, query, key, out):
        outputs = query.data_ptr(), key.data_ptr()
        tensors = structs.TangoPatchRotationTensors(qkv.data_ptr(), bias.data_ptr(), *turns, *outputs)
        enqueue("tango_patch_rotation_enqueue", patches, tensors)

    def attend(qkv, bias, query, key, out):
        (*_, value), (*_, value_bias) = parts_of(qkv, width), parts_of(bias, width)
        addresses = {"query": query.data_ptr(), "key": key.data_ptr(), "attn_out": out.data_ptr()}
        tensors = structs.TangoVisionAttentionTensors(value=value, value_bias=value_bias, **addresses)
        enqueue("tango_vision_attention_enqueue", apart, tensors)

    def both(*given):
        rotate(*given)
        attend(*given)

    ways = {"us": fused} if window else {}
    ways |= {"rotation_us": rotate, "attention_us": attend, "both_us": both}
    record = {"kernel": "vision attention, rotation", "shape": case}
    for name, way in ways.items():
        record[name] = measure([lambda given=given, way=way: way(*given) for given in inputs], repeats)
    return record


def parts_of(packed, width):
    """Addresses of queries, keys and values."""
    return [packed.data_ptr() + 2 * i * width for i in range(3)]


def time_norm(case, repeats):
    """A record of one norm after an addition."""
    kind, rows, width, types = case
    stream, branch, y = (DTYPES[i] for i in types)
    weight, beta = random(width, dtype=torch.float32), random(width, dtype=torch.float32)
    half_weight, half_beta = weight.half(), beta.half()
    shape = structs.TangoNormShape(rows, width, *types[:2], types[1], types[2], 1e-6, 1.0, 1.0)
    inputs = [[random(rows, width, dtype=dtype) for dtype in (stream, branch, stream, y)] for _ in range(INPUTS)]

    def ours(residual, added, total, out):
        tensors = structs.TangoNormTensors(
            *(residual.data_ptr(), added.data_ptr(), None),
            *(weight.data_ptr(), beta.data_ptr() if kind == "layer" else None, total.data_ptr(), out.data_ptr()),
        )
        enqueue(f"tango_{kind}_norm_enqueue", shape, tensors)

    def theirs(residual, added, total, _):
        torch.add(residual, added, out=total)
        if kind == "layer":
            layer_norm(total, (width,), half_weight, half_beta, 1e-6)
        else:
            rms_norm(total, (width,), half_weight, 1e-6)

    record = {"kernel": f"{kind} norm", "shape": (rows, width), "dtypes": [str(DTYPES[i]) for i in types]}
    record["us"] = measure([lambda given=given: ours(*given) for given in inputs], repeats)
    bytes_moved = rows * width * (2 * stream.itemsize + branch.itemsize + y.itemsize)
    record["tb_per_s"] = round(bytes_moved / record["us"] / 1e6, 2)
    if types == (0, 0, 0):
        record["torch_us"] = measure([lambda given=given: theirs(*given) for given in inputs], repeats)
    return record


def time_gelu(case, repeats):
    """A record of both forms of GELU, with a bias; PyTorch's is the exact form without one."""
    rows, width = case
    bias, out = random(width), random(rows, width)
    inputs = [random(rows, width) for _ in range(INPUTS)]
    record = {"kernel": "gelu", "shape": case}
    for form, name in enumerate(("erf", "tanh")):

        def ours(x, form=form):
            lengths = (x.data_ptr(), bias.data_ptr(), rows, width, 0, 1.0, out.data_ptr())
            enqueue("tango_bias_gelu_enqueue", 0, form, *lengths)

        record[f"{name}_us"] = measure([lambda x=x, ours=ours: ours(x) for x in inputs], repeats)
    record["torch_us"] = measure([lambda x=x: gelu(x) for x in inputs], repeats)
    return record


def linear_inputs(case):
    """x, weight, bias and y of a product, several times."""
    rows, inputs, outputs = case
    given = ((rows, inputs), (inputs, outputs), (outputs,), (rows, outputs))
    return [[random(*size) for size in given] for _ in range(INPUTS)]


def linear(x, weight, bias, y, function="tango_fp16_linear_enqueue"):
    """The CUDA library's product."""
    shape = structs.TangoLinearShape(*x.shape, y.shape[1])
    tensors = structs.TangoFp16LinearTensors(*(tensor.data_ptr() for tensor in (x, weight, bias, y)))
    enqueue(function, shape, tensors)


def linear_gelu(x, weight, bias, y):
    """The CUDA library's product with a bias and GELU."""
    linear(x, weight, bias, y, "tango_fp16_linear_gelu_enqueue")


def mm(x, weight, bias, y):
    """PyTorch's product."""
    torch.mm(x, weight, out=y)


def then_gelu(product):
    """A product, and the CUDA library's GELU with a bias on its result."""

    def call(x, weight, bias, y):
        product(x, weight, bias, y)
        address = y.data_ptr()
        enqueue("tango_bias_gelu_enqueue", 0, 1, address, bias.data_ptr(), *y.shape, 0, 1.0, address)

    return call


def time_products(kernel, case, ways, repeats):
    """A record of a product in several ways; the first is ours."""
    given, record = linear_inputs(case), {"kernel": kernel, "shape": case}
    for name, way in ways.items():
        record[name] = measure([lambda tensors=tensors, way=way: way(*tensors) for tensors in given], repeats)
    return record | {"tflops": round(2 * case[0] * case[1] * case[2] / record["us"] / 1e6, 1)}


def time_linear(case, repeats):
    """A record of a product."""
    return time_products("linear", case, {"us": linear, "torch_us": mm}, repeats)


def time_linear_gelu(case, repeats):
    """A record of a product with GELU, in one kernel and in two."""
    ways = {"us": linear_gelu, "linear_and_gelu_us": then_gelu(linear), "torch_and_gelu_us": then_gelu(mm)}
    return time_products("linear, gelu", case, ways, repeats)


KERNELS = {
    "vision-attention": (time_attention, ATTENTION),
    "vision-rotation": (time_rotation, ROTATION),
    "prefill-attention": (time_prefill, PREFILLS),
    "norm": (time_norm, NORMS),
    "gelu": (time_gelu, GELU),
    "linear": (time_linear, LINEARS),
    "linear-gelu": (time_linear_gelu, LINEAR_GELUS),
}


def main():
    """Measures everything; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write (default: none)")
    parser.add_argument("--repeats", type=int, default=15, help="replays of each graph (default: %(default)s)")
    parser.add_argument("--mma-library", type=Path, metavar="FILE", help="a libtango.so without Hopper's kernels")
    parser.add_argument("--only", nargs="+", choices=list(KERNELS), help="kernels to measure (default: all)")
    options = parser.parse_args()
    conditions = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "library": native_library.load().tango_version().decode(),
    }
    print(json.dumps(conditions))
    records = []
    for name in options.only or KERNELS:
        time, cases = KERNELS[name]
        for case in cases:
            more = {"mma_library": options.mma_library} if time is time_prefill else {}
            records.append(time(case, options.repeats, **more))
            print(json.dumps(records[-1]), flush=True)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"conditions": conditions, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
