"""What an installed tango-edge is: its wheel, a base install without torch, and what resolves for a Jetson."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.packaging.installs import ROOT, UV, install, run

pytestmark = pytest.mark.network  # pip's build environment and uv ask a package index


def test_the_wheel_is_pure_and_holds_the_four_packages(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("tango_export", "tango_calibration", "tango_runtime", "tango_plugins"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert {"tango_runtime/report/report.html.jinja", "tango_runtime/sizing/released_models.json"} <= names
    assert "tango_runtime/server/page/index.html" in names
    assert not [name for name in names if name.startswith(("tests/", "examples/"))]


def test_a_base_install_runs_without_torch_onnx_or_transformers(wheel: Path, tmp_path: Path) -> None:
    python = install(tmp_path / "venv", str(wheel), "--constraint", ROOT / "constraints.txt") / "python"
    installed = run(UV, "pip", "freeze", "--quiet", "--python", python)
    for heavy in ("torch", "transformers", "onnx", "onnxruntime"):
        assert f"\n{heavy}==" not in f"\n{installed}"
    code = "import tango_runtime, tango_plugins.reference, tango_runtime.report.report; print(tango_runtime.__name__)"
    assert run(python, "-c", code).strip() == "tango_runtime"
    assert "tango COMMAND" in run(python.with_name("tango"), "--help")
    refused = subprocess.run([python.with_name("tango-export")], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "pip install 'tango-edge[export]'" in refused.stderr


@pytest.mark.parametrize(("version", "extra"), [("3.10", "jetpack6"), ("3.12", "jetpack7")])
def test_it_resolves_for_a_jetson(version: str, extra: str) -> None:
    platform = ["--python-platform", "aarch64-manylinux_2_31", "--python-version", version]
    command = [UV, "pip", "compile", "--quiet", "--only-binary", ":all:", *platform, ROOT / "pyproject.toml"]
    base = run(*command)
    assert "tokenizers==" in base
    assert "torch==" not in base
    assert "cuda-bindings==" + ("12" if extra == "jetpack6" else "13") in run(*command, "--extra", extra)


@pytest.mark.parametrize(("version", "there"), [("3.10", False), ("3.12", True)])
def test_the_gpu_extra_brings_onnx_runtime_to_grace_and_spark(version: str, there: bool) -> None:
    platform = ("--python-platform", "aarch64-manylinux_2_34", "--python-version", version)
    command = (UV, "pip", "compile", "--quiet", "--only-binary", ":all:", *platform, "--extra", "gpu")
    assert ("\nonnxruntime-gpu==" in run(*command, ROOT / "pyproject.toml")) == there
