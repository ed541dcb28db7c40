"""What weights of 4 and 8 bits cost and save: tables of docs/results/quantization.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.docs.markdown import table
from tools.docs.measured import Column, backend, link, load, number, stages

_WEIGHTS = {
    "fp16": "fp16",
    "fp8": "FP8",
    "int8": "INT8",
    "int8-32": "INT8, groups of 32",
    "int4-32": "INT4, groups of 32",
    "int4-128": "INT4, groups of 128",
}
#: Products have one more: INT8 weights and activations.
_PRODUCTS = _WEIGHTS | {"w8a8": "INT8, activations too"}


_STAGES = {
    "vision": "vision",
    "prefill": "prefill",
    "first token": "first token",
    "each further token": "decode",
    "first token of a second question": "second question",
}
_CONDITIONS = ("positions of the prompt", "memory on the GPU, MB", "backend", "repeats")


def decoder() -> str:
    """The pipeline of the 0.5B in fp16, and with a decoder of 4 bits."""
    columns = (
        Column("fp16", "h200-onnxruntime-0.5b-ahead"),
        Column("INT4, groups of 128", "h200-onnxruntime-0.5b-int4-128"),
    )
    rows = {title: stage for title, stage in _STAGES.items() if stage != "vision"}
    return stages(columns, rows, (*_CONDITIONS, "file"))


def whole() -> str:
    """The pipeline of the 7B in each precision."""
    columns = (
        Column("fp16", "h200-onnxruntime-7b-fp16"),
        Column("FP8", "h200-onnxruntime-7b-fp8"),
        Column("INT4 decoder, groups of 128", "h200-onnxruntime-7b-int4-128"),
        Column("FP8 vision, INT4 decoder", "h200-onnxruntime-7b-fp8-vision-int4-128"),
        Column("INT8", "h200-onnxruntime-7b-int8"),
    )
    return stages(columns, _STAGES, (*_CONDITIONS, "file"))


def fp8() -> str:
    """The 0.5B in FP8 beside the fp16 bundle that it was made of."""
    columns = (
        Column("0.5B, fp16", "h200-onnxruntime-0.5b-fp16-beside-fp8"),
        Column("0.5B, FP8", "h200-onnxruntime-0.5b-fp8"),
    )
    return stages(columns, _STAGES, (*_CONDITIONS, "file"))


def steps() -> str:
    """The decode step alone, of one sequence and of several."""
    records = [r for r in load("weights-h200")["records"] if r["kind"] in ("decode", "batch")]
    found = {(r["size"], r.get("sequences"), r["weights"]): r for r in records}
    rows = []
    for size, count in dict.fromkeys((size, count) for size, count, _ in found):
        title = f"{size.upper()}" if count is None else f"{size.upper()}, {count} in a shared step"
        times = (found.get((size, count, each), {}).get("us") for each in _WEIGHTS)
        rows.append((title, *("" if time is None else f"{time / 1000:.3f}" for time in times)))
    for size in dict.fromkeys(size for size, _, _ in found):
        shares = (found[size, None, each]["share_of_bandwidth"] for each in _WEIGHTS)
        rows.append((f"{size.upper()}, share of the memory's bandwidth", *(f"{100 * share:.0f} %" for share in shares)))
    return table(("a step, ms", *_WEIGHTS.values()), rows)


def products() -> str:
    """The matrix products of a prefill, and PyTorch's."""
    records = [r for r in load("products-h200")["records"] if r["rows"] == 659 and r["by_default"]]
    found = {(r["size"], r["name"], r["weights"]): r for r in records}
    names = dict.fromkeys((size, name) for size, name, _ in found)
    columns = {title: (form, "tflops") for form, title in _PRODUCTS.items()}
    # A peer has one column: of INT4's, the last format's.
    columns |= {f"`{r['peer']}`": (r["weights"], "peer_tflops") for r in records if "peer" in r}
    rows = [
        (f"{size.upper()}, {name}", *(number(found[size, name, form][key]) for form, key in columns.values()))
        for size, name in names
    ]
    return table(("TFLOP/s, 659 rows", *columns), rows)


def few_rows() -> str:
    """Products of the 7B with few rows and blocks of 4 bits: those of a later question, and of one position."""
    records = [r for r in load("products-h200")["records"] if r["size"] == "7b" and r["rows"] < 659]
    found = {(r["name"], r["rows"], r["weights"], r["by_default"]): r for r in records}
    rows = []
    for name, count in dict.fromkeys((r["name"], r["rows"]) for r in records):
        fp16, slabs = (found[name, count, form, True] for form in ("fp16", "int4-128"))
        times = fp16["us"], slabs["us"], found[name, count, "int4-128", False]["us"], slabs["peer_us"]
        rows.append((f"{name}, {count}", *(number(time) for time in times)))
    ways = "fp16", "INT4, groups of 128, slabs", "in registers", "`torch._weight_int4pack_mm`"
    return table(("µs, rows", *ways), rows)


def bundles() -> str:
    """Quantized bundles of models/tiny against the fp16 one."""
    rows = []
    for name in ("h200-onnxruntime-precision", "h200-tensorrt-precision"):
        records = load(name)["records"]
        asked = records[-1]["against_first"]["answers"]  # the first bundle again, which gives all of its own answers
        rows += [(_title(each, each is not records[0]), *_cells(each, asked), link(name)) for each in records]
    times, sizes = ("vision, ms", "prefill, ms", "decode, ms"), ("vision, MB", "decoder, MB")
    return table(("bundle", *times, "same tokens", "same answers", *sizes, "file"), rows)


def _title(record: dict[str, Any], repeated: bool) -> str:
    vision, decoder = (record["precision"][graph] for graph in ("vision", "decoder"))
    text = f"{vision} vision, {decoder} decoder".replace("float16", "fp16").replace("int", "INT")
    if vision == decoder == "float16":
        text = "fp16, again" if repeated else "fp16"
    return f"{backend(record)}: {text}"


def _cells(record: dict[str, Any], asked: int) -> tuple[str, ...]:
    times = (number(record["milliseconds"][stage]["p50"]) for stage in ("vision", "prefill", "decode"))
    sizes = [_megabytes(record, graph) for graph in ("vision", "decoder")]
    if "against_first" not in record:
        return (*times, "", "", *sizes)
    found = record["against_first"]
    least = found["kept_min"] if "kept_min" in found else found["kept_least"]  # the latter in older files
    kept = f"{100 * found['kept']:.1f} % (at least {100 * least:.1f})"
    return (*times, kept, f"{found['answers']} of {asked}", *sizes)


def _megabytes(record: dict[str, Any], graph: str) -> str:
    file, engines = record["graph_bytes"][graph] / 1e6, record["engine_bytes"]
    return f"{file:.1f}" + (f", engine {engines[graph] / 1e6:.1f}" if engines else "")


PARTS: dict[str, Callable[[], str]] = {
    "whole": whole,
    "decoder": decoder,
    "fp8": fp8,
    "steps": steps,
    "products": products,
    "few-rows": few_rows,
    "bundles": bundles,
}
