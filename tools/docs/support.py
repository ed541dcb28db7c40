"""What ran where: docs/reference/support.json as tables, and whether its evidence says the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from tango_runtime.sizing.devices import DEVICES
from tango_runtime.sizing.estimate import OPERATOR_CAPABILITY
from tango_runtime.util.versions import release
from tools.docs.markdown import table

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs/reference/support.json"

Status = Literal["measured", "tested", "compiled", "no"]
MARKS: dict[Status, str] = {"measured": "●", "tested": "✔", "compiled": "○", "no": "–"}

#: Families by their names on the command line; the columns of the matrix.
FAMILIES = {"llava-ov": "LLaVA-OneVision", "llava-video": "LLaVA-Video", "qwen2.5-vl": "Qwen2.5-VL"}
PRECISIONS = ("fp16", "fp32", "int8", "int4", "fp8")


@dataclass(frozen=True)
class Cell:
    """What is known of a family and a precision on a platform.

    Attributes:
        platform: A key of ``platforms``: a backend on some hardware.
        family: The model family; ``*`` for all of them.
        precision: Precision of the vision tower or of the decoder.
        status: ``measured``: timed there; ``tested``: compared with a reference there; ``compiled``: compiled or built,
            not run; ``no``: not supported.
        evidence: Files that show it: results of ``measured``, tests of ``tested`` and ``compiled``.
    """

    platform: str
    family: str
    precision: str
    status: Status
    evidence: tuple[str, ...]


@cache
def platforms() -> dict[str, dict[str, str]]:
    """Title, backend and recorded versions of each platform."""
    found: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))["platforms"]
    return found


@cache
def cells() -> tuple[Cell, ...]:
    """Everything that is known."""
    found = json.loads(FILE.read_text(encoding="utf-8"))["cells"]
    return tuple(Cell(**{**cell, "evidence": tuple(cell["evidence"])}) for cell in found)


def matrix() -> str:
    """A row for each platform and precision of which something is known, a column for each family."""
    rows = []
    for name, known in platforms().items():
        for precision in PRECISIONS:
            marks = [_mark(name, family, precision) for family in FAMILIES]
            if any(marks):
                rows.append((f"`{known['backend']}`", known["title"], _precision(precision), *marks))
    return table(("backend", "on", "precision", *FAMILIES.values()), rows)


def gpus() -> str:
    """The devices that `tango plan` knows, and what was done with the CUDA library for each."""
    rows = []
    for name, device in DEVICES.items():
        capable = release(device.compute_capability) >= release(OPERATOR_CAPABILITY)
        status: Status = "measured" if name == "h200" else "compiled" if capable else "no"
        sm = f"sm_{device.compute_capability.replace('.', '')}"
        packs = ", ".join(f"{pack} ({tensorrt})" for pack, tensorrt in device.jetpacks.items())
        rows.append((device.title, sm, MARKS[status], packs))
    return table(("device", "architecture", "CUDA library", "JetPack (its TensorRT)"), rows)


def legend() -> str:
    """What the marks mean."""
    meanings = {
        "measured": "timed there; the link is the file of results",
        "tested": "compared with a reference there, by a test",
        "compiled": "compiled or built for it, and not run",
        "no": "not supported",
    }
    return "\n".join(f"- {MARKS[status]} {meanings[status]}" for status in get_args(Status))


def contradictions() -> Iterator[str]:
    """Cells whose evidence is missing, or records other conditions."""
    for cell in cells():
        where = f"{cell.platform}, {cell.family}, {cell.precision}"
        if cell.status != "no" and not cell.evidence:
            yield f"{where}: no evidence"
        for name in cell.evidence:
            if not (ROOT / name).is_file():
                yield f"{where}: there is no {name}"
            elif name.endswith(".json"):
                yield from (f"{where}: {name}: {problem}" for problem in _differences(cell, ROOT / name))
            elif cell.status == "measured":
                yield f"{where}: {name} is no file of results"


def _mark(platform: str, family: str, precision: str) -> str:
    """A family's mark, with a link to the results if it was measured; empty if nothing is known."""
    known = (each for each in cells() if (each.platform, each.precision) == (platform, precision))
    found = next((each for each in known if each.family in (family, "*")), None)
    if found is None:
        return ""
    mark = MARKS[found.status]
    return f"[{mark}](../../{found.evidence[0]})" if found.status == "measured" else mark


def _precision(name: str) -> str:
    return name if name in ("fp16", "fp32") else name.upper()


def _differences(cell: Cell, file: Path) -> Iterator[str]:
    """The differences between what a file of results records and what a cell says."""
    text, known = file.read_text(encoding="utf-8"), platforms()[cell.platform]
    found = json.loads(text)
    if known["version"] not in text:
        yield f"the backend is not {known['version']}"
    if known.get("gpu", "") not in text:
        yield f"the GPU is not {known['gpu']}"
    if cell.precision not in _precisions(found):
        yield f"the precision is not {cell.precision}"
    family = _family(found)
    if family is not None and family != cell.family:
        yield f"the family is {family}"


def _precisions(found: Any) -> set[str]:
    """Precisions that a file names: of its records or bundle; in older files, in the bundle's name, or as its dtype."""
    short = {"float16": "fp16", "float32": "fp32"}
    if "records" in found:
        return {short.get(kind, kind) for record in found["records"] for kind in record["precision"].values()}
    if "bundles" in found:  # names such as `fp32, use_tf32 0`
        return {name.split(",")[0] for runs in found["bundles"].values() for name in runs}
    bundle = found["bundle"]
    if isinstance(bundle, str):  # models/tiny, which is in fp16 unless the name says otherwise
        return {"fp16"}
    if "precision" in bundle:
        return {short.get(kind, kind) for kind in bundle["precision"].values()}
    quantized = {kind for kind in ("int8", "int4", "fp8") if kind in bundle["name"].split("-")}
    return quantized or {short[bundle["dtype"]]}


def _family(found: Any) -> str | None:
    """The family that a file names; None if it does not."""
    bundle = found.get("bundle")
    return bundle["family"] if isinstance(bundle, dict) else None


PARTS: dict[str, Callable[[], str]] = {"legend": legend, "matrix": matrix, "gpus": gpus}
