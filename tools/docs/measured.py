"""Files of benchmarks/results, as `tango bench` and the benchmarks write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tools.docs.markdown import table

RESULTS = Path(__file__).parents[2] / "benchmarks/results"

#: From a page in docs/results or docs/reference to the files.
LINK = "../../benchmarks/results"


@cache
def load(name: str) -> Any:
    """The content of a file, by its name without .json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def link(name: str) -> str:
    """A link to a file."""
    return f"[JSON]({LINK}/{name}.json)"


def number(value: float) -> str:
    """A measured value, with as many decimals as mean something."""
    decimals = next(decimals for above, decimals in ((1000, 0), (10, 1), (1, 2), (0, 3)) if value >= above)
    return f"{value:,.{decimals}f}"


def backend(found: dict[str, Any]) -> str:
    """What ran the graphs, from a file's conditions or one of its records; older files call it engine."""
    text: str = found["backend"] if "backend" in found else found["engine"]
    return text.removesuffix(", NVIDIA H200")


@dataclass(frozen=True)
class Column:
    """A column of a table: a case of a file of `tango bench`.

    Attributes:
        title: Its heading.
        name: The file.
        case: Name of the case in it.
        runner: Whose times: ``tango``, or one of `tango_runtime.bench.peer.Peer.systems`.
    """

    title: str
    name: str
    case: str = "pruned, 384x384"
    runner: str = "tango"

    @property
    def found(self) -> Any:
        """The case."""
        return next(case for case in load(self.name)["cases"] if case["name"] == self.case)

    @property
    def measured(self) -> bool:
        """Whether the file has this runner's times."""
        return self.runner in self.found["milliseconds"]

    def p50(self, stage: str) -> str:
        """The median of a stage in milliseconds; empty if it was not measured."""
        stages = self.found["milliseconds"][self.runner]
        return number(stages[stage]["p50"]) if stage in stages else ""

    def fact(self, row: str) -> str:
        """What a row says of the case or its file."""
        conditions, case = load(self.name)["conditions"], self.found
        facts: dict[str, Callable[[], str]] = {
            "tokens kept": lambda: f"{case['kept']:,} of {case['total']:,}",
            "positions of the prompt": lambda: f"{case['prompt_tokens']:,}",
            "memory on the GPU, MB": lambda: f"{case['device_memory'] / 1e6:,.0f}",
            "peak memory on the host, MB": lambda: f"{case['host_memory'] / 1e6:,.0f}",
            "backend": lambda: backend(conditions) if self.runner == "tango" else conditions["peer"].split(",")[0],
            "repeats": lambda: str(load(self.name)["setting"]["repeats"]),
            "load average of the host": lambda: str(conditions["machine"]["load_average"]),
            "file": lambda: link(self.name),
        }
        return facts[row]()


def stages(columns: tuple[Column, ...], rows: dict[str, str], facts: tuple[str, ...]) -> str:
    """A table of medians in milliseconds, and of facts below them.

    Args:
        columns: Its columns.
        rows: Titles of the stages' rows, with the stages' names in the files.
        facts: Rows below.
    """
    times = [(title, *(column.p50(stage) for column in columns)) for title, stage in rows.items()]
    below = [(fact, *(column.fact(fact) for column in columns)) for fact in facts]
    return table(("p50, ms", *(column.title for column in columns)), [row for row in times if any(row[1:])] + below)
