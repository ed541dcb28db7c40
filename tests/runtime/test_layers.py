"""The packages of the runtime import each other in one direction only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import tango_runtime

ROOT = Path(tango_runtime.__file__).parent


def imported_packages(file: Path) -> Iterator[str]:
    """Packages of tango_runtime that a module imports, at its top or in a function, but not for type checking only."""
    tree = ast.parse(file.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            package, _, rest = module.partition(".")
            if package == "tango_runtime" and (ROOT / rest.split(".")[0]).is_dir() and rest:
                yield rest.split(".")[0]


def dependencies() -> dict[str, set[str]]:
    """Package → packages that it imports."""
    found: dict[str, set[str]] = {path.parent.name: set() for path in ROOT.glob("*/__init__.py")}
    for package, imports in found.items():
        for file in (ROOT / package).rglob("*.py"):
            imports |= set(imported_packages(file)) - {package}
    return found


def test_no_package_imports_one_that_imports_it() -> None:
    found = dependencies()
    assert {"cli", "pipeline", "backends", "bundle", "util"} <= set(found)
    order = list(TopologicalSorter(found).static_order())  # it raises CycleError
    assert order.index("util") < order.index("bundle") < order.index("backends") < order.index("pipeline")
    assert order[-1] == "cli"


def test_util_imports_no_other_package() -> None:
    assert dependencies()["util"] == set()
