"""What tests on a GPU are told on the command line, wherever they lie."""

from __future__ import annotations

from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--tensorrt-include", type=Path, help="folder of NvInfer.h, where it is not in a usual place")
