"""This machine's GPU, asked through a driver that is simulated."""

from __future__ import annotations

import ctypes
import shutil
from types import SimpleNamespace

import pytest

from tango_plugins import TangoError
from tango_plugins import driver as nvidia
from tango_runtime.system import gpu as system

ATTRIBUTES = {18: 0, 75: 9, 76: 0}  # integrated, compute capability


class Driver:
    """The functions of libcuda that are called; ``failing`` names one that fails."""

    def __init__(self, count=1, integrated=False, failing=None):
        self.count, self.failing = count, failing
        self.attributes = ATTRIBUTES | {18: int(integrated)}

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: 999 if name == self.failing else self._call(name, *arguments)

    def _call(self, name, *arguments):
        values = {
            "cuDeviceGetCount": (self.count,),
            "cuDriverGetVersion": (12040,),
            "cuDeviceTotalMem_v2": (80 << 30,),
            "cuMemGetInfo_v2": (70 << 30, 80 << 30),
        }
        if name == "cuDeviceGetName":
            arguments[0].value = b"NVIDIA H100"
        elif name == "cuDeviceGetAttribute":
            arguments[0]._obj.value = self.attributes[arguments[1]]
        elif name == "cuGetErrorString":
            arguments[1]._obj.value = b"unknown error"
        for argument, value in zip(arguments, values.get(name, ()), strict=False):
            argument._obj.value = value
        return 0


@pytest.fixture
def driver(monkeypatch):
    """``driver(**)`` simulates a driver."""

    def install(**options):
        simulated = vars(ctypes) | {"CDLL": lambda name: Driver(**options)}
        monkeypatch.setattr(nvidia, "ctypes", SimpleNamespace(**simulated))

    return install


def test_facts_of_the_gpu(driver):
    driver()
    assert system.gpu() == system.Gpu("NVIDIA H100", "9.0", "12.4", 80 << 30, integrated=False)


def test_free_memory(driver, monkeypatch):
    driver()
    monkeypatch.setattr(system, "available_host", lambda: 16 << 30)
    assert system.free(system.gpu()) == system.Free(70 << 30, 16 << 30, shared=False)


def test_an_integrated_gpu_shares_the_hosts_memory(driver, monkeypatch):
    driver(integrated=True)
    monkeypatch.setattr(system, "available_host", lambda: 16 << 30)
    assert system.free(system.gpu()) == system.Free(16 << 30, 16 << 30, shared=True)


def test_no_gpu_is_an_error(driver):
    driver(count=0)
    with pytest.raises(TangoError, match="CUDA sees no GPU"):
        system.gpu()


def test_a_failing_driver_names_the_function_and_the_error(driver):
    driver(failing="cuDeviceGetName")
    with pytest.raises(TangoError, match="the NVIDIA driver failed: cuDeviceGetName: unknown error"):
        system.gpu()


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="for machines without a GPU")
def test_no_driver_is_an_error():
    with pytest.raises(TangoError, match="there is no NVIDIA driver"):
        system.gpu()


def test_available_host_memory(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       1000 kB\nMemAvailable:    512 kB\n")
    assert system.available_host(file) == 512 * 1024
    file.write_text("MemTotal:       1000 kB\n")
    with pytest.raises(TangoError, match="has no MemAvailable"):
        system.available_host(file)
