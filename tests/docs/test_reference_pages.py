"""The reference pages say what the code does: generated parts are fresh, and hand-written parts name everything."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import tango_plugins
import tango_runtime
from tango_export.families import FAMILIES
from tango_runtime.backends.registry import BACKENDS
from tango_runtime.cli.main import COMMANDS, leaves, parser
from tools.docs import limits, markdown, pages, support
from tools.docs.c_api import INCLUDE

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs/reference"


def text(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


# Generated parts


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: page.name)
def test_a_page_is_what_its_sources_give(page: Path) -> None:
    stale = pages.generated(page) != page.read_text(encoding="utf-8")
    assert not stale, f"{page.relative_to(ROOT)} is stale; run: make reference"


def test_every_part_is_on_one_page() -> None:
    found = [name for page in pages.pages() for name in markdown.part_names(page.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(pages.PARTS)


def test_parts_are_replaced_between_their_marks() -> None:
    page = "before\n<!-- generated: a -->\nold\n<!-- end of generated -->\nafter <!-- generated: b -->\n"
    once = markdown.filled(page, {"a": lambda: "| new |\n"})
    assert (
        once == "before\n<!-- generated: a -->\n\n| new |\n\n<!-- end of generated -->\nafter <!-- generated: b -->\n"
    )
    assert markdown.filled(once, {"a": lambda: "| new |\n"}) == once


def test_a_table_escapes_its_cells() -> None:
    assert markdown.table(("a", "b"), [("x|y", "")]) == "| a | b |\n| --- | --- |\n| x\\|y |  |\n"
    assert markdown.table(("a",), []) == ""


# Commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_on_the_page(name: str) -> None:
    sections = re.split(r"^## ", text("cli.md"), flags=re.MULTILINE)
    common = next(section for section in sections if section.startswith("Options of every command\n"))
    for leaf in leaves(parser(name, f"tango {name}")):
        (section,) = (each for each in sections if each.startswith(f"{leaf.prog}\n"))
        for action in leaf._actions:
            for option in action.option_strings:
                assert f"`{option}`" in section + common, f"{leaf.prog} {option}"


FOLDERS = ("reference", "design", "results", "contributing", "guide/families")
PAGES = [
    *(page for folder in FOLDERS for page in sorted((ROOT / "docs" / folder).rglob("*.md"))),
    ROOT / "benchmarks/README.md",
]


def commands(page: Path) -> list[list[str]]:
    """Commands in a page's blocks of code, and those in its text that have an argument."""
    text = page.read_text(encoding="utf-8")
    blocks = [block for _, block in re.findall(r"^```(bash|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    blocks += re.findall(r"^ {4}(.*)$", text, re.MULTILINE)
    lines = [line.partition(" && ")[0] for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    found = [line for line in [*lines, *inline] if re.match(r"tango(-export)? \S+ \S", line)]
    return [shlex.split(line, comments=True) for line in found if not re.search(r"[…<\[]|COMMAND", line)]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_on_a_page_parse(page: Path) -> None:
    for command in commands(page):
        name, rest = ("export", command[1:]) if command[0] == "tango-export" else (command[1], command[2:])
        found = parser(name, "tango")
        if rest[0].startswith("--"):  # a command with the option that the text is about, perhaps without its arguments
            known = {option for leaf in leaves(found) for action in leaf._actions for option in action.option_strings}
            assert {word for word in rest if word.startswith("--")} <= known, command
        else:
            found.parse_args(rest)


# The C interface


def test_every_function_and_struct_of_the_headers_is_on_the_page() -> None:
    declared = ""
    for header in sorted((INCLUDE / "tango").glob("*.h")):
        declared += re.sub(r"/\*.*?\*/", "", header.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert f"### tango/{header.name}\n" in text("c-api.md"), f"add {header.name} to HEADERS of tools/docs/c_api.py"
    index = text("c-api.md").partition("## Headers")[2].partition("### ")[0]
    functions = re.findall(r"\b(tango_\w+)\(", declared)
    assert len(functions) > 20
    assert [name for name in functions if f"`{name}`" not in index] == []
    names = re.findall(r"^\} (Tango\w+);", declared, re.MULTILINE)
    assert [name for name in names if name not in text("c-api.md")] == []


# Limits


@pytest.mark.parametrize(
    "limit", [each for group in limits.LIMITS.values() for each in group], ids=lambda each: each.what
)
def test_a_note_that_is_a_product_gives_the_limit(limit: limits.Limit) -> None:
    assert limit.value > 0
    if found := re.fullmatch(r"(\d+)×(\d+)", limit.note):
        assert int(found[1]) * int(found[2]) == limit.value


def test_options_of_the_server_exist() -> None:
    options = {
        option for leaf in leaves(parser("serve", "tango serve")) for a in leaf._actions for option in a.option_strings
    }
    assert set(limits.OPTIONS.values()) <= options


# The support matrix


def test_marks_agree_with_their_evidence() -> None:
    assert list(support.contradictions()) == []


def test_a_wrong_mark_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (right,) = (c for c in support.cells() if (c.platform, c.precision) == ("tensorrt-8.6-h200", "int8"))
    wrong = {
        "there is no": replace(right, evidence=("benchmarks/results/none.json",)),
        "no evidence": replace(right, evidence=()),
        "the precision is not int4": replace(right, precision="int4"),
        "the backend is not ONNX Runtime 1.31.1, CUDA": replace(right, platform="ort-cuda-h200"),
        "the family is llava-ov": replace(
            right,
            family="llava-video",
            precision="fp16",
            evidence=("benchmarks/results/h200-tensorrt-0.5b-device.json",),
        ),
        "is no file of results": replace(right, evidence=("tests/conftest.py",)),
    }
    for problem, cell in wrong.items():
        monkeypatch.setattr(support, "cells", lambda cell=cell: (cell,))
        assert any(problem in found for found in support.contradictions()), problem


def test_a_recorded_precision_counts_more_than_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (right,) = (c for c in support.cells() if (c.platform, c.precision) == ("ort-cuda-h200", "fp8"))
    found = json.loads((ROOT / right.evidence[0]).read_text(encoding="utf-8"))
    found["bundle"] |= {"name": "int4", "precision": {"vision": "float16", "decoder": "fp8"}}
    (tmp_path / "found.json").write_text(json.dumps(found))
    cells = [replace(right, precision=each, evidence=(f"{tmp_path}/found.json",)) for each in support.PRECISIONS]
    monkeypatch.setattr(support, "cells", lambda: cells)
    problems = "\n".join(support.contradictions())
    wrong = [each for each in support.PRECISIONS if f"the precision is not {each}" in problems]
    assert wrong == ["fp32", "int8", "int4"]


def test_the_gpu_of_a_mark_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: {**platform, "gpu": "Jetson AGX Orin"} for name, platform in support.platforms().items()}
    monkeypatch.setattr(support, "platforms", lambda: known)
    assert any("the GPU is not Jetson AGX Orin" in found for found in support.contradictions())


def test_every_backend_and_family_is_in_the_matrix() -> None:
    assert {known["backend"] for known in support.platforms().values()} == set(BACKENDS)
    assert set(support.FAMILIES) == set(FAMILIES)
    assert {cell.family for cell in support.cells()} <= {*FAMILIES, "*"}


def test_the_data_is_sorted_as_it_is_shown() -> None:
    data = json.loads(support.FILE.read_text(encoding="utf-8"))
    found = [(cell["platform"], cell["precision"]) for cell in data["cells"]]
    order = [(platform, precision) for platform in data["platforms"] for precision in support.PRECISIONS]
    assert found == sorted(found, key=order.index)


# Python


DIRECTIVES = re.findall(r"^::: ([\w.]+)$", text("python-api.md"), re.MULTILINE)


def found_object(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_public_name_is_on_the_page() -> None:
    documented = {path.rpartition(".")[2] for path in DIRECTIVES}
    for package in (tango_runtime, tango_plugins):
        assert [name for name in package.__all__ if name not in documented] == []


@pytest.mark.parametrize("path", DIRECTIVES)
def test_a_docstring_describes_each_argument(path: str) -> None:
    subject = found_object(path)
    assert inspect.getdoc(subject)
    members = [subject]
    if inspect.isclass(subject):
        public = {name: each for name, each in vars(subject).items() if not name.startswith("_")}
        members += [each for each in public.values() if inspect.isfunction(each)]
        assert [name for name, each in public.items() if inspect.isfunction(each) and not each.__doc__] == []
    for member in members:
        if described := arguments_in(inspect.getdoc(member) or ""):
            taken = [name for name in inspect.signature(member).parameters if name != "self"]
            assert sorted(described) == sorted(taken), f"{path}: {member}"


def arguments_in(docstring: str) -> list[str]:
    """The names in the section about arguments, which ends where another section begins."""
    section = re.split(r"^[A-Z]\w+:$", docstring.partition("Args:\n")[2], flags=re.MULTILINE)[0]
    return re.findall(r"^ {4}(\w+): ", section, re.MULTILINE)


def test_roles_in_docstrings_become_code() -> None:
    griffe = pytest.importorskip("griffe", reason="mkdocstrings is not installed: pip install 'tango-edge[docs]'")
    extension = importlib.import_module("tools.docs.sphinx_roles").SphinxRoles()
    function = griffe.Function(
        "ask", docstring=griffe.Docstring("As :meth:`stream`, and :class:`~tango_runtime.Session`.")
    )
    extension.on_instance(obj=function)
    assert function.docstring.value == "As `stream`, and `tango_runtime.Session`."


def test_every_link_to_a_name_has_a_heading() -> None:
    # mkdocstrings makes a heading for each directive, and one for each public member of a class.
    for link in re.findall(r"\]\(#(tango_[\w.]+)\)", text("python-api.md")):
        owner = link.rpartition(".")[0]
        assert link in DIRECTIVES or (owner in DIRECTIVES and hasattr(found_object(owner), link.rpartition(".")[2])), (
            link
        )
