"""NVIDIA devices that `tango plan` knows: the Jetson modules and some server GPUs.

Peaks are dense; data sheets print twice as much, for weights with 2:4 sparsity. A Jetson's peaks are those of its GPU,
without the DLA that NVIDIA's "AI performance" includes. They follow from tensor cores and clock: twice the INT8 figure
is the sparse TOPS that NVIDIA prints for the GPU (64 tensor cores at 1.3 GHz: 171 in
NVIDIA/Deep-Learning-Accelerator-SW; 32 at 1.02 GHz: the 67 of the Orin Nano). Of several power modes, the figures are
for the fastest.

Sources; nothing was measured here:

- modules: NVIDIA's tables of Jetson modules (developer.nvidia.com/embedded/jetson-modules), as copied in the
  documentation of Ultralytics (guide "NVIDIA Jetson") and Seeed Studio (reComputer J30, J40, J501);
- super: the clocks of NVIDIA's power modes for JetPack 6.2, nvpmodel_p3767_000*_super.conf of Jetson Linux, as in
  LineageOS/android_device_nvidia_concord. Memory at 3199 MHz: two transfers a clock over 64 or 128 bits;
- gpus: NVIDIA/TensorRT-LLM, tensorrt_llm/auto_parallel/cluster_info.py, which names NVIDIA's data sheets. Its H200
  has sparse peaks; those here are of the H100 SXM in the same file, which is the same chip;
- TensorRT of each JetPack: NVIDIA's release notes (docs.nvidia.com/jetson/jetpack); for 6.1 and 6.2 also
  pytorch.org/TensorRT (getting started, JetPack).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tango_plugins import TangoError
from tango_runtime.util.versions import release

Precision = Literal["fp16", "int8", "fp8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: First TensorRT that reads a precision from an ONNX graph. INT4 weights also need an Ampere GPU.
_SINCE: dict[Precision, tuple[int, ...]] = {"fp16": (8,), "int8": (8,), "fp8": (10,), "int4": (10,)}

_GIB = 1 << 30

#: Firmware and kernel keep some of a Jetson's memory: CUDA's deviceQuery shows 7620 MiB on an Orin Nano 8GB, 15657 on
#: an Orin NX 16GB, 62841 on an AGX Orin 64GB, 125772 on an AGX Thor (outputs in public notes). This rule gives those
#: within 2 %.
_JETSON_VISIBLE, _JETSON_HIDDEN = 0.96, 250 << 20
#: Assumption for Linux without a desktop, CUDA, TensorRT and Python; a desktop takes about 0.8 GB more
#: (jetson-ai-lab.com/tips_ram-optimization.html).
_JETSON_SYSTEM = 1_500_000_000
#: Assumption for a server GPU: error correction and the driver, then CUDA's context and TensorRT.
_GPU_VISIBLE, _GPU_SYSTEM = 0.95, 1_000_000_000


@dataclass(frozen=True)
class Device:
    """A module or GPU.

    Attributes:
        title: Full name.
        memory: GiB; CPU and GPU of a Jetson share it.
        bandwidth: Memory bandwidth in GB/s.
        peaks: Dense peak by precision of a matrix product's inputs, TFLOP/s or TOP/s. INT4 has none: only weights are
            INT4, and they are multiplied as fp16.
        compute_capability: The GPU's, as ``8.7``.
        jetpacks: TensorRT of each JetPack that runs on it; empty if TensorRT is installed separately.
        mode: Power mode of the figures; empty if there is only one.
        source: Their sources, from the list at the top of this file.
        unverified: Figures that were not found in a source of NVIDIA's; empty if all were.
    """

    title: str
    memory: int
    bandwidth: float
    peaks: dict[Precision, float]
    compute_capability: str
    jetpacks: dict[str, str]
    mode: str
    source: str
    unverified: str = ""

    @property
    def jetson(self) -> bool:
        """Whether CPU and GPU share the memory."""
        return bool(self.jetpacks)

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return self.memory * _GIB

    @property
    def usable(self) -> int:
        """Bytes left for a model, by the rules at the top of this file."""
        if self.jetson:
            return int(_JETSON_VISIBLE * self.total) - _JETSON_HIDDEN - _JETSON_SYSTEM
        return int(_GPU_VISIBLE * self.total) - _GPU_SYSTEM

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions that some TensorRT can run on it."""
        return tuple(each for each in PRECISIONS if self._has(each) and (self.packs(each) or not self.jetson))

    @property
    def multiplies_slabs(self) -> bool:
        """Whether ONNX Runtime's products by INT4 weights go by slabs of them in fp16: those of Hopper do."""
        return release(self.compute_capability)[0] == 9

    def packs(self, *precisions: Precision) -> dict[str, str]:
        """The JetPacks with a TensorRT that reads all of these precisions."""
        since = max(_SINCE[each] for each in precisions)
        return {pack: tensorrt for pack, tensorrt in self.jetpacks.items() if release(tensorrt) >= since}

    def _has(self, precision: Precision) -> bool:
        return release(self.compute_capability) >= (8,) if precision == "int4" else precision in self.peaks

    def peak(self, precision: Precision) -> float:
        """Operations per second of matrix products with weights of this precision."""
        return self.peaks["fp16" if precision == "int4" else precision] * 1e12


def _tensor_cores(count: int, ghz: float, fp16: int) -> dict[Precision, float]:
    """Dense peaks of tensor cores with ``fp16`` operations per clock each, and twice as many in INT8."""
    return {"fp16": count * ghz * fp16 / 1000, "int8": count * ghz * 2 * fp16 / 1000}


_VOLTA, _AMPERE = 128, 512  # operations of a Jetson's tensor core per clock: 64 and 256 multiply-adds

_JETPACK_5 = {"5.1": "8.5.2"}
_ORIN = _JETPACK_5 | {"6.0": "8.6.2", "6.2": "10.3", "7.2": "10.16"}
_THOR = {"7.0": "10.13", "7.2": "10.16"}
_SUPER = "MAXN SUPER, JetPack 6.2 on"
_XAVIER = "peaks: tensor cores taken as a V100's, INT8 as twice as fast"

DEVICES = {
    "orin-nano-4gb": Device(
        "Jetson Orin Nano 4GB", 4, 51.2, _tensor_cores(16, 1.02, _AMPERE), "8.7", _ORIN, _SUPER, "modules, super"
    ),
    "orin-nano-8gb": Device(
        "Jetson Orin Nano 8GB", 8, 102.4, _tensor_cores(32, 1.02, _AMPERE), "8.7", _ORIN, _SUPER, "modules, super"
    ),
    "orin-nx-8gb": Device(
        "Jetson Orin NX 8GB", 8, 102.4, _tensor_cores(32, 1.173, _AMPERE), "8.7", _ORIN, _SUPER, "modules, super",
        "clock in this mode, taken as the Orin NX 16GB's",
    ),
    "orin-nx-16gb": Device(
        "Jetson Orin NX 16GB", 16, 102.4, _tensor_cores(32, 1.173, _AMPERE), "8.7", _ORIN, _SUPER, "modules, super"
    ),
    "agx-orin-32gb": Device(
        "Jetson AGX Orin 32GB", 32, 204.8, _tensor_cores(56, 0.93, _AMPERE), "8.7", _ORIN, "MAXN", "modules"
    ),
    "agx-orin-64gb": Device(
        "Jetson AGX Orin 64GB", 64, 204.8, _tensor_cores(64, 1.3, _AMPERE), "8.7", _ORIN, "MAXN", "modules"
    ),
    # NVIDIA prints 2070 TFLOP/s of sparse FP4: dense is half of it, and each doubling of the width halves it again.
    "agx-thor": Device(
        "Jetson AGX Thor (T5000)", 128, 273, {"fp16": 259, "int8": 259, "fp8": 517}, "11.0", _THOR, "MAXN", "modules",
        "all peaks but FP4's, which are halved from it; INT8 taken as FP16",
    ),
    "xavier-nx": Device(
        "Jetson Xavier NX 8GB", 8, 59.7, _tensor_cores(48, 1.1, _VOLTA), "7.2", _JETPACK_5, "", "modules", _XAVIER
    ),
    "agx-xavier": Device(
        "Jetson AGX Xavier 32GB", 32, 136.5, _tensor_cores(64, 1.377, _VOLTA), "7.2", _JETPACK_5, "", "modules", _XAVIER
    ),
    "a10": Device("NVIDIA A10", 24, 600, {"fp16": 125, "int8": 250}, "8.6", {}, "", "gpus"),
    "l4": Device("NVIDIA L4", 24, 300, {"fp16": 120, "int8": 242, "fp8": 242}, "8.9", {}, "", "gpus"),
    "a100": Device("NVIDIA A100 SXM 80GB", 80, 2039, {"fp16": 312, "int8": 624}, "8.0", {}, "", "gpus"),
    "h100": Device("NVIDIA H100 SXM", 80, 3350, {"fp16": 989, "int8": 1979, "fp8": 1979}, "9.0", {}, "", "gpus"),
    "h200": Device("NVIDIA H200 SXM", 141, 4800, {"fp16": 989, "int8": 1979, "fp8": 1979}, "9.0", {}, "", "gpus"),
}  # fmt: skip


def find_device(name: str) -> Device:
    """A device by its name.

    Raises:
        TangoError: There is none of that name.
    """
    if name not in DEVICES:
        raise TangoError(f"there is no device {name!r}", f"devices are {', '.join(DEVICES)}, or all")
    return DEVICES[name]
