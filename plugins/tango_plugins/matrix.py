"""Matrices of linear layers in device memory: fp16, FP8, or integers with scales (native/include/tango/linear.h)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tango_plugins.device_array import DeviceArray
from tango_plugins.errors import TangoError
from tango_plugins.native_library import load
from tango_plugins.structs import TangoMatrix

#: Sizes of blocks that the kernels read.
GROUPS = (32, 64, 128)

# TangoWeights of tango/linear.h.
_FP16, _INT8, _BLOCKS_4, _BLOCKS_8, _FP8 = range(5)

#: FP8 as a dtype.
FP8 = "float8_e4m3fn"


@dataclass(frozen=True)
class Matrix:
    """A matrix [in, out].

    Attributes:
        values: fp16 [in, out]; int8 [in, out]; FP8 [out, in]; or uint8 [out, blocks, bytes] with blocks along the
            inputs, where a byte holds two 4-bit elements, the first in the low half.
        scales: fp32 [out] for int8, fp16 [] for FP8, fp16 [out, blocks] for blocks, None for fp16.
        zeros: Zero points of blocks, uint8 [out, bytes], packed like the elements; None if all are the middle of the
            range.
        bits: Bits of an element.
        group: Inputs per block; 0 without blocks.
        interleaved: Whether the blocks are as :meth:`interleave` leaves them.
    """

    values: DeviceArray
    scales: DeviceArray | None = None
    zeros: DeviceArray | None = None
    bits: int = 16
    group: int = 0
    interleaved: bool = False

    @property
    def outputs(self) -> int:
        """Width of the product."""
        return self.values.shape[0 if self.group or self.values.dtype == FP8 else -1]

    def struct(self, name: str, inputs: int, outputs: int) -> TangoMatrix:
        """The matrix as the library's struct.

        Args:
            name: Name of the weight, for messages.
            inputs: Length of the axis that is summed over.
            outputs: Width of the product.

        Raises:
            TangoError: The tensors have other shapes or types.
        """
        shapes: tuple[tuple[int, ...], tuple[int, ...]]
        if self.group:
            if self.bits not in (4, 8) or self.group not in GROUPS:
                known = f"known are 4 and 8 bits in blocks of {', '.join(map(str, GROUPS))}"
                raise TangoError(f"{name} has {self.bits} bits in blocks of {self.group}", known)
            blocks = -(-inputs // self.group)
            shapes = (outputs, blocks, self.group * self.bits // 8), (outputs, blocks)
            packed = (outputs, -(-blocks * self.bits // 8))
            weights, types = _BLOCKS_4 if self.bits == 4 else _BLOCKS_8, ("uint8", "float16")
        elif self.values.dtype == FP8:
            shapes, packed = ((outputs, inputs), ()), (0, 0)
            weights, types = _FP8, (FP8, "float16")
        else:
            shapes, packed = ((inputs, outputs), (outputs,)), (0, 0)
            weights, types = (_FP16, ("float16", "")) if self.bits == 16 else (_INT8, ("int8", "float32"))
        values = address(name, self.values, shapes[0], types[0])
        scales = None if weights == _FP16 else address(f"{name}'s scale", self.scales, shapes[1], types[1])
        zeros = None if self.zeros is None else address(f"{name}'s zero points", self.zeros, packed, "uint8")
        return TangoMatrix(values, scales, zeros, weights, self.group, self.interleaved)

    def interleave(self, name: str, workspace: DeviceArray, stream: int, library: Path | None = None) -> Matrix:
        """Puts blocks in the order in which a decode step reads them, in place; any other matrix stays as it is.

        Args:
            name: Name of the weight, for messages.
            workspace: uint8 [bytes], aligned to 16 bytes; at least 16 outputs of the matrix. It is free again after the
                work on the stream.
            stream: Handle of the CUDA stream.
            library: The CUDA library; None takes the one that :func:`tango_plugins.native_library.search` finds.

        Returns:
            The matrix as all that reads it has to take it from then on.

        Raises:
            TangoError: The tensors have other shapes or types, or the library reports an error.
        """
        if not self.group or self.interleaved:
            return self
        outputs, blocks, _ = self.values.shape
        inputs, loaded = blocks * self.group, load(library)
        given, scratch = self.struct(name, inputs, outputs), (workspace.address, workspace.nbytes, stream)
        if loaded.tango_interleave_enqueue(given, inputs, outputs, *scratch) != 0:
            message = loaded.tango_last_error().decode()
            raise TangoError(f"the CUDA library cannot interleave {name}: {message}", "see: tango doctor")
        return replace(self, interleaved=True)


def address(name: str, memory: DeviceArray | None, shape: tuple[int, ...], dtype: str) -> int:
    """The address of a tensor of this shape and dtype.

    Raises:
        TangoError: The tensor is missing, or has another shape or dtype.
    """
    if memory is None:
        raise TangoError(f"there is no weight {name}", "export the bundle again")
    # A batch axis of 1 in front is ignored: there is one sequence.
    found = memory.shape[1:] if len(memory.shape) > len(shape) and memory.shape[0] == 1 else memory.shape
    if found != shape or memory.dtype != dtype:
        wanted = f"a decode step takes {dtype} {list(shape)}"
        raise TangoError(f"{name} is {memory.dtype} {list(memory.shape)}", wanted)
    return memory.address
