"""One step of decoding by the CUDA library: :class:`CudaDecoder` over weights and a cache that somebody else owns.

The weights are those of the bundle's decoder graph, under its names. What a step computes is
``tango_export.models.qwen2.decoder`` for one token, with sums and everything between two products in fp32.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tango_plugins.device_array import DeviceArray
from tango_plugins.errors import TangoError
from tango_plugins.native_library import load

#: What the kernel takes (check() in native/src/decode/decode.cu): widths are multiples of this, a head is so wide at
#: most, and the queries of one head of the cache together.
WIDTHS, MOST_HEAD_WIDTH, MOST_QUERIES = 16, 256, 4096


@dataclass(frozen=True)
class DecoderShape:
    """Dimensions of a decoder; the widths of its matrices are multiples of 16.

    Attributes:
        layers: Transformer layers.
        width: Of the embeddings, D.
        heads: Of the queries.
        kv_heads: Of the key/value cache.
        head_dim: Of one head, at most 256.
        intermediate: Of the MLP.
        vocabulary: Logits that are computed.
        head_columns: Columns of ``lm_head.weight``, at least as many.
        capacity: Positions of the cache, P.
        norm_eps: ε of the norms.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    head_columns: int
    capacity: int
    norm_eps: float


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("layers", "width", "heads", "kv_heads", "head_dim", "intermediate")),
        *((name, ctypes.c_int32) for name in ("vocabulary", "head_columns", "capacity", "blocks")),
        ("norm_eps", ctypes.c_float),
    )


class _Tensors(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("layers", "frequencies", "norm", "head", "embedding", "logits")
    )


class CudaDecoder:
    """A step of decoding on the GPU: one kernel, in which a token goes through all layers.

    Args:
        shape: Dimensions.
        weights: By the names of the decoder graph; matrices fp16 [in, out], norms and ``rotary.inv_freq`` fp32.
        cache: Key and value of each layer in turn, fp16 [kv_heads, P, head_dim].
        library: The CUDA library; None takes the one that ``tango plugin build`` installed.
        blocks: Thread blocks; 0 takes the whole GPU. Fewer leave the rest of it to others, and are slower.

    Attributes:
        table: Addresses of all that belongs to a layer, uint8 [80 · layers]: to be copied to the device once.
        workspace_bytes: Device memory that a step works in, aligned to 256 bytes, zero before the first one.

    Raises:
        TangoError: There is no library, a weight is missing or of another shape or dtype, or a dimension is one that
            the kernel cannot take.
    """

    def __init__(
        self,
        shape: DecoderShape,
        weights: Mapping[str, DeviceArray],
        cache: Sequence[DeviceArray],
        library: Path | None = None,
        blocks: int = 0,
    ) -> None:
        self._library = load(library)
        self._shape = _Shape(**vars(shape), blocks=blocks)
        self._width, self._vocabulary = shape.width, shape.vocabulary
        rows = (shape.kv_heads, shape.capacity, shape.head_dim)
        if len(cache) != 2 * shape.layers:
            raise TangoError(f"the cache has {len(cache)} tensors", f"it must have {2 * shape.layers}")
        addresses = []
        for i in range(shape.layers):
            named = {f"layers.{i}.{name}": like for name, like in _layer(shape).items()}
            addresses += [_address(name, weights.get(name), *like) for name, like in named.items()]
            kinds = "key", "value"
            addresses += [_address(f"{kinds[j]} {i}", cache[2 * i + j], rows, "float16") for j in range(2)]
        self.table: NDArray[np.uint8] = np.array(addresses, np.uint64).view(np.uint8)
        self._last = [_address(name, weights.get(name), *like) for name, like in _rest(shape).items()]
        size = ctypes.c_size_t()
        self._check(self._library.tango_decode_workspace(ctypes.byref(self._shape), ctypes.byref(size)))
        self.workspace_bytes = size.value

    def enqueue(
        self,
        embedding: DeviceArray,
        position: int,
        *,
        logits: DeviceArray,
        table: DeviceArray,
        workspace: DeviceArray,
        stream: int,
    ) -> None:
        """Enqueues a step on a stream; neither allocates nor waits.

        Args:
            embedding: Of the token, fp16 [D].
            position: Of the token: cache rows before it are read, row ``position`` is written.
            logits: Written: fp32 [vocabulary].
            table: The bytes of :attr:`table`.
            workspace: ``workspace_bytes`` of memory, which one step after the other uses.
            stream: A ``cudaStream_t`` as an integer.

        Raises:
            TangoError: An argument has the wrong shape or dtype, or CUDA reported an error.
        """
        tensors = _Tensors(
            _address("table", table, self.table.shape, "uint8"),
            *self._last,
            _address("embedding", embedding, (self._width,), "float16"),
            _address("logits", logits, (self._vocabulary,), "float32"),
        )
        what = ctypes.byref(self._shape), ctypes.byref(tensors), ctypes.c_int32(position)
        size = ctypes.c_size_t(math.prod(workspace.shape))
        room = ctypes.c_void_p(workspace.address)
        self._check(self._library.tango_decode_enqueue(*what, room, size, ctypes.c_void_p(stream)))

    def _check(self, status: int) -> None:
        if status != 0:
            message = self._library.tango_last_error().decode()
            hint = "see the limits in plugins/README.md; a decoder that exceeds them is exported without a device graph"
            raise TangoError(f"the CUDA library refused a step of decoding: {message}", hint)


_Like = tuple[tuple[int, ...], str]


def _layer(shape: DecoderShape) -> dict[str, _Like]:
    """The weights of a layer in the order of TangoDecodeLayer."""
    mixed = shape.heads * shape.head_dim
    packed = mixed + 2 * shape.kv_heads * shape.head_dim
    return {
        "input_layernorm.weight": ((shape.width,), "float32"),
        "self_attn.qkv_proj.weight": ((shape.width, packed), "float16"),
        "self_attn.qkv_proj.bias": ((packed,), "float16"),
        "self_attn.o_proj.weight": ((mixed, shape.width), "float16"),
        "post_attention_layernorm.weight": ((shape.width,), "float32"),
        "mlp.gate_proj.weight": ((shape.width, shape.intermediate), "float16"),
        "mlp.up_proj.weight": ((shape.width, shape.intermediate), "float16"),
        "mlp.down_proj.weight": ((shape.intermediate, shape.width), "float16"),
    }


def _rest(shape: DecoderShape) -> dict[str, _Like]:
    """The other weights in the order of TangoDecodeTensors."""
    return {
        "rotary.inv_freq": ((shape.head_dim // 2,), "float32"),
        "norm.weight": ((shape.width,), "float32"),
        "lm_head.weight": ((shape.width, shape.head_columns), "float16"),
    }


def _address(name: str, memory: DeviceArray | None, shape: tuple[int, ...], dtype: str) -> int:
    if memory is None:
        raise TangoError(f"there is no weight {name}", "export the bundle again")
    # one sequence: a batch axis of 1 in front says nothing
    found = memory.shape[1:] if len(memory.shape) > len(shape) and memory.shape[0] == 1 else memory.shape
    if found != shape or memory.dtype != dtype:
        wanted = f"a step of decoding takes {dtype} {list(shape)}"
        raise TangoError(f"{name} is {memory.dtype} {list(memory.shape)}", wanted)
    return memory.address
