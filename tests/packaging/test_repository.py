"""What holds the repository together: one version, workflows that only call make, and containers that are pinned."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import tango_plugins
import tango_runtime
from tango_plugins.version import package_version
from tests.packaging.installs import ROOT, UV, run

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
CONTAINERS = sorted((ROOT / "containers").glob("*.Dockerfile"))
PROJECT = (ROOT / "pyproject.toml").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
VERSION = re.findall(r'(?m)^version = "(.+)"', PROJECT)


def workflow(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def steps(file: Path) -> list[dict[str, Any]]:
    return [step for job in workflow(file)["jobs"].values() for step in job["steps"]]


def test_the_version_is_in_one_place() -> None:
    assert len(VERSION) == 1
    assert tango_runtime.__version__ == tango_plugins.__version__ == package_version()
    assert package_version() in (*VERSION, "unknown"), "reinstall: pip install --editable ."
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_changelog_begins_with_this_version_or_what_is_not_released() -> None:
    sections = re.findall(r"(?m)^## \[(.+?)\]", CHANGELOG)
    assert sections[0] in ("Unreleased", *VERSION)
    kinds = set(re.findall(r"(?m)^### (.+)", CHANGELOG))
    assert kinds <= {"Added", "Changed", "Breaking", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_only_calls_make(file: Path) -> None:
    targets = set(re.findall(r"(?m)^([a-z0-9-]+):", (ROOT / "Makefile").read_text()))
    called = [step["run"] for step in steps(file) if "run" in step]
    assert called
    for command in called:
        made = re.fullmatch(r"make ([a-z0-9-]+)( [A-Z]+=\S+)?", command)
        assert made or command.startswith(("apt-get ", "git config ")), f"{command}: a target of the Makefile is wanted"
        assert made is None or made[1] in targets, f"the Makefile has no target {made[1]}"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_site_is_built_without_torch() -> None:
    commands = run("make", "--dry-run", "--always-make", "docs", cwd=ROOT)
    assert re.findall(r"\.\[(.*?)\]", commands) == ["docs"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_has_few_permissions_and_pinned_actions(file: Path) -> None:
    data = workflow(file)
    assert data["permissions"] == {"contents": "read"}
    assert "concurrency" in data
    assert all("timeout-minutes" in job and "permissions" not in job for job in data["jobs"].values())
    for step in steps(file):
        if "uses" in step:
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, its rest) of a Dockerfile, continued lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", file.read_text()).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda file: file.name)
def test_a_container_is_pinned_watched_and_not_of_root(file: Path) -> None:
    found = instructions(file)
    bases = [rest.split()[0] for name, rest in found if name == "FROM"]
    assert all(re.fullmatch(r"[a-z0-9./-]+:[\w.-]*\d[\w.-]*", base) for base in bases)
    last = dict(found)
    assert last["USER"].isdigit()
    assert last["USER"] != "0"
    assert "/health" in last["HEALTHCHECK"]
    assert "ENTRYPOINT" in last
    installs = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    assert all("constraints.txt" in rest for rest in installs)
    assert "Never built" in file.read_text()


def test_a_container_is_given_what_the_package_needs() -> None:
    given = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    licenses = re.findall(r'"(\w+)"', re.findall(r"(?m)^license-files = (.+)", PROJECT)[0])
    assert {"pyproject.toml", "constraints.txt", "README.md", *licenses} <= given
    assert {"calibration", "export", "plugins", "runtime"} <= given


def test_hooks_have_the_versions_of_make_lint() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: repo["rev"].lstrip("v") for repo in repos for hook in repo["hooks"]}
    pins = dict(re.findall(r"(?m)^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text()))
    for hook, package in {"ruff-check": "ruff", "clang-format": "clang-format", "codespell": "codespell"}.items():
        assert hooks[hook] == pins[package]


@pytest.mark.network  # uv asks a package index
@pytest.mark.parametrize(("version", "found"), [("3.10", False), ("3.12", True)])
def test_the_gpu_extra_has_a_wheel_for_grace_and_spark(version: str, found: bool) -> None:
    platform = ("--python-platform", "aarch64-manylinux_2_39", "--python-version", version)
    command = (UV, "pip", "compile", "--quiet", "--only-binary", ":all:", *platform, "--extra", "gpu")
    assert ("onnxruntime-gpu==" in run(*command, ROOT / "pyproject.toml")) == found
