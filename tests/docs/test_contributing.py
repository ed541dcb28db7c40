"""The guides for contributors: what their checklists say is tested, is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tango_runtime.backends.registry import BACKENDS
from tango_runtime.cli.main import COMMANDS
from tools.docs import c_api

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs/contributing"
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("guide", sorted(GUIDES.glob("add-*.md")), ids=lambda guide: guide.name)
def test_a_guide_ends_in_a_checklist_whose_tests_exist(guide: Path) -> None:
    checklist = guide.read_text(encoding="utf-8").partition("\n## Checklist\n")[2]
    assert "- [ ] " in checklist
    assert "\n## " not in checklist
    tests = re.findall(r"`(tests/[\w./]+\.py)`", checklist)
    assert tests
    assert [test for test in tests if not (ROOT / test).is_file()] == []


def test_a_script_that_imports_another_runs_as_a_module() -> None:
    found = 0
    for script in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]:
        text = script.read_text(encoding="utf-8")
        if re.search(r"^from (?:benchmarks|examples)[. ]", text, re.MULTILINE):
            found += 1
            assert f"    python -m {script.parent.name}.{script.stem} " in text, script.name
    assert found > 3


def test_the_benchmarks_of_the_page_exist() -> None:
    commands = re.findall(r"`python ([^`]+)`", (ROOT / "benchmarks/README.md").read_text(encoding="utf-8"))
    assert len(commands) > 9
    for command in commands:
        script = re.match(r"-m (benchmarks\.bench_\w+)\b", command)
        assert script is not None, command
        assert (ROOT / f"{script[1].replace('.', '/')}.py").is_file(), command


def test_the_page_about_architecture_names_files_that_exist() -> None:
    page = (ROOT / "docs/design/architecture.md").read_text(encoding="utf-8")
    files = {
        path.name
        for root in ("export", "calibration", "runtime", "plugins", "models", "tests")
        for path in (ROOT / root).rglob("*")
    }
    named = set(re.findall(r"[\w-]+\.(?:py|cuh|cu|cpp|h)\b", page))
    assert len(named) > 100
    assert sorted(named - files) == []
    table = page.partition("## Where to change what")[2].partition("\n## ")[0]
    for path in re.findall(r"`((?:[\w-]+/)+[\w.-]*)`", table):
        homes = (ROOT, ROOT / "runtime/tango_runtime", ROOT / "plugins/tango_plugins/native")
        assert any((home / path).exists() for home in homes), path


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs/design/decisions"
    index = (folder / "index.md").read_text(encoding="utf-8")
    records = sorted(record.name for record in folder.glob("*.md") if record.name != "index.md")
    assert [name for name in records if f"({name})" not in index] == []
    for name in records:
        record = (folder / name).read_text(encoding="utf-8")
        assert [part for part in ("**Context.**", "**Decision.**", "**Consequences.**") if part not in record] == [], (
            name
        )


@pytest.mark.parametrize("header", c_api.HEADERS)
def test_every_header_has_a_test(header: str) -> None:
    sources = [path for path in (ROOT / "tests").rglob("*") if path.suffix in (".py", ".cpp", ".cu")]
    names = c_api.functions()[header]
    named = any(name in path.read_text(encoding="utf-8") for path in sources for name in names)
    assert named or any(path.name == f"test_{header.removesuffix('.h')}.py" for path in sources)


def test_extras_exist() -> None:
    extras = set(re.findall(r"^([\w]+) = \[", PROJECT.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    wanted = {entry.extra for entry in (*BACKENDS.values(), *COMMANDS.values())}
    assert wanted <= extras


def test_every_dependency_has_a_reason() -> None:
    requirements = PROJECT.partition("\ndependencies = [")[2].partition("[project.scripts]")[0]
    names = set(re.findall(r"\"([a-z][\w-]*)(?:[><=\[ ;]|\")", re.sub(r"#.*", "", requirements))) - {"tango-edge"}
    page = (GUIDES / "dependencies.md").read_text(encoding="utf-8")
    table = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| "))
    listed = {name for cell in table.splitlines() for name in _names(cell)}
    assert len(names) > 15
    assert sorted(names - listed) == []


def _names(cell: str) -> list[str]:
    """Packages of a cell; ``tensorrt-rtx-cu13-bindings, -libs`` are two of one stem."""
    first, *rest = (name.strip() for name in cell.split(","))
    stem = first.rpartition("-")[0]
    return [first, *(f"{stem}{name}" if name.startswith("-") else name for name in rest)]


@pytest.mark.parametrize("folder", ["reference", "design", "results", "contributing", "guide/families"])
def test_pages_are_written_in_american_english(folder: str) -> None:
    british = re.compile(
        r"\b\w*(?:normalis|quantis|optimis|initialis|colour|behaviour|licence|neighbour)\w*", re.IGNORECASE
    )
    for page in sorted((ROOT / "docs" / folder).rglob("*.md")):
        if page.name == "style.md":  # which names them
            continue
        assert british.findall(page.read_text(encoding="utf-8")) == [], page.name
