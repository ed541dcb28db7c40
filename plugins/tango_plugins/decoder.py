"""A decode step on the GPU, on weights and KV caches that the caller owns: :class:`CudaDecoder` for one sequence,
:class:`CudaBatchDecoder` for several.

The weights have the names of the bundle's decoder graph. A step computes ``tango_export.models.qwen2.decoder`` for one
token, with accumulators and everything between two matrix products in fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tango_plugins import structs
from tango_plugins.device_array import DeviceArray
from tango_plugins.errors import TangoError
from tango_plugins.matrix import Matrix, address
from tango_plugins.native_library import load

#: Limits of the kernel (check_shape() in native/src/decode/shape.cu): dimensions are multiples of DIM_MULTIPLE,
#: head_dim is at most MAX_HEAD_DIM, and heads / kv_heads · head_dim at most MAX_GROUP_WIDTH.
DIM_MULTIPLE, MAX_HEAD_DIM, MAX_GROUP_WIDTH = 16, 256, 4096

#: TANGO_CUDA_ERROR of tango/common.h.
_CUDA_ERROR = 3

#: TangoDecodeFormats of tango/decode.h.
_FP16, _MIXED, _BLOCKS_4 = range(3)

#: Sequences of one batched step, at most: TANGO_DECODE_SEQUENCES of tango/decode.h.
MAX_SEQUENCES = 8


@dataclass(frozen=True)
class DecoderShape:
    """Dimensions of a decoder; hidden_size, head_dim, intermediate and head_columns are multiples of 16.

    Attributes:
        layers: Transformer layers.
        hidden_size: Width of the embeddings, D.
        heads: Query heads.
        kv_heads: Heads of the KV cache.
        head_dim: Width of one head, at most 256.
        intermediate: Width of the MLP.
        vocabulary: Logits that are computed.
        head_columns: Columns of ``lm_head.weight``, at least ``vocabulary``.
        capacity: Positions of the KV cache, P.
        norm_eps: ε of the norms.
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    head_columns: int
    capacity: int
    norm_eps: float


class Words:
    """Embeddings from which a token found on the device gets its own; see :meth:`CudaDecoder.enqueue_next`.

    Args:
        table: The embeddings on the host, fp16 [words, D].
        row: Pinned memory for one of them, fp16 [D], aligned to 16 bytes.
        mail: Pinned memory that tells the device about the row, uint32 [2]; it is cleared.
        embedding: Device memory that the row is copied to, fp16 [1, D], aligned to 16 bytes.
        stop: Tokens that no step follows.

    Attributes:
        table: As given.
        row: As given.
        mail: As given.
        embedding: As given.
        stop: int32 [stop tokens].
    """

    def __init__(
        self,
        table: NDArray[Any],
        row: NDArray[Any],
        mail: NDArray[np.uint32],
        embedding: DeviceArray,
        stop: Sequence[int],
    ) -> None:
        self.table, self.row, self.mail, self.embedding = table, row, mail, embedding
        mail[:] = 0
        self.stop = np.array(stop, np.int32)

    def struct(self, hidden_size: int) -> structs.TangoDecodeWords:
        """The library's struct, valid as long as this.

        Raises:
            TangoError: A table, row or embedding is of another type or width.
        """
        count, memory = len(self.table), (self.table, self.row, self.mail)
        table, row, mail = (DeviceArray(each.ctypes.data, each.shape, each.dtype.name) for each in memory)
        return structs.TangoDecodeWords(
            address("table", table, (count, hidden_size), "float16"),
            address("row", row, (hidden_size,), "float16"),
            address("mail", mail, (2,), "uint32"),
            address("embedding", self.embedding, (hidden_size,), "float16"),
            self.stop.ctypes.data,
            *(count, len(self.stop)),
        )


class _Kernel:
    """What the steps of one sequence and of several have in common: dimensions, and the addresses of the weights."""

    def __init__(
        self,
        library: ctypes.CDLL,
        workspace: str,
        shape: DecoderShape,
        weights: Mapping[str, DeviceArray],
        matrices: Mapping[str, Matrix],
        cache: Sequence[tuple[int, int] | tuple[None, None]],
        blocks: int,
    ) -> None:
        self._library = library
        layers = [_layer(shape, i, weights, matrices, rows) for i, rows in enumerate(cache)]
        self.table: NDArray[np.uint8] = _bytes_of(layers)
        self._head = _matrix("lm_head.weight", matrices, shape.hidden_size, shape.head_columns)
        self._tensors = [address(name, weights.get(name), *spec) for name, spec in _other_weights(shape).items()]
        self._shape = structs.TangoDecodeShape(**vars(shape), blocks=blocks, formats=_formats(matrices.values()))
        size = ctypes.c_size_t()
        _check(library, getattr(library, workspace)(self._shape, ctypes.byref(size)))
        self.workspace_bytes: int = size.value


class CudaDecoder(_Kernel):
    """A decode step on the GPU, as one kernel that takes a token through all layers.

    Args:
        shape: Dimensions.
        weights: Other weights by their names in the decoder graph: the bias in fp16, norms and ``rotary.inv_freq`` in
            fp32.
        matrices: Matrices by their names in the decoder graph, in any format; ``gate_proj`` and ``up_proj`` share one.
        cache: Keys and values of each layer in turn, fp16 [kv_heads, P, head_dim].
        library: The CUDA library; None takes the one that :func:`tango_plugins.native_library.search` finds.
        blocks: Thread blocks; 0 takes one per SM. Fewer leave SMs free, and are slower.

    Attributes:
        table: Addresses of each layer's weights and cache, uint8 [208 · layers], to be copied to the device once.
        workspace_bytes: Scratch memory of a step on the device, aligned to 256 bytes, zero before the first step.

    Raises:
        TangoError: There is no library, a weight is missing or has the wrong shape or dtype, or the kernel does not
            support a dimension.
    """

    def __init__(
        self,
        shape: DecoderShape,
        weights: Mapping[str, DeviceArray],
        matrices: Mapping[str, Matrix],
        cache: Sequence[DeviceArray],
        library: Path | None = None,
        blocks: int = 0,
    ) -> None:
        self._hidden_size, self._vocabulary = shape.hidden_size, shape.vocabulary
        rows = _cache_addresses(shape, cache)
        super().__init__(load(library), "tango_decode_workspace", shape, weights, matrices, rows, blocks)

    def enqueue(
        self,
        embedding: DeviceArray,
        position: int,
        rotation: int | None = None,
        *,
        logits: DeviceArray,
        best: int | None = None,
        table: DeviceArray,
        workspace: DeviceArray,
        stream: int,
    ) -> None:
        """Enqueues a step on a stream. It neither allocates nor waits.

        Args:
            embedding: Embedding of the token, fp16 [D].
            position: Row of the token in the KV cache. The step reads the rows before it, and writes this one.
            rotation: Position of the token's rotary angles; None takes ``position``. With M-RoPE the two differ.
            logits: Output, fp32 [vocabulary].
            best: Address of pinned or device memory for index and value of the greatest logit, a ``TangoArgmax``; None
                does without.
            table: The bytes of :attr:`table`.
            workspace: ``workspace_bytes`` of memory, used by one step at a time.
            stream: A ``cudaStream_t`` as an integer.

        Raises:
            TangoError: An argument has the wrong shape or dtype, or CUDA failed.
        """
        tensors = self._given(table, logits, best, address("embedding", embedding, (self._hidden_size,), "float16"))
        positions = position, position if rotation is None else rotation
        scratch = workspace.address, workspace.nbytes
        enqueue = self._library.tango_decode_enqueue
        _check(self._library, enqueue(self._shape, tensors, *positions, *scratch, stream))

    def enqueue_next(
        self,
        words: Words,
        found: int,
        position: int,
        rotation: int,
        *,
        logits: DeviceArray,
        best: int | None = None,
        table: DeviceArray,
        workspace: DeviceArray,
        stream: int,
    ) -> int | None:
        """Enqueues the step of the token that the work of a stream finds, and waits for that work.

        Other threads of Python run meanwhile, and do not delay the step: it is on the stream before the token is known.

        Args:
            words: Where the token's embedding comes from.
            found: Address of pinned memory that the work writes the token to, int32: ``best`` of the step before.
            position: As of :meth:`enqueue`.
            rotation: As of :meth:`enqueue`.
            logits: As of :meth:`enqueue`.
            best: As of :meth:`enqueue`; other memory than ``found``, which the caller may still read.
            table: As of :meth:`enqueue`.
            workspace: As of :meth:`enqueue`.
            stream: As of :meth:`enqueue`.

        Returns:
            The token; None if there is no step, because the token is one of ``words.stop`` or has no embedding.

        Raises:
            TangoError: An argument has the wrong shape or dtype, or CUDA failed.
        """
        token = ctypes.c_int32(-1)
        given = self._shape, self._given(table, logits, best, None), position, rotation, words.struct(self._hidden_size)
        scratch = workspace.address, workspace.nbytes
        _check(self._library, self._library.tango_decode_next(*given, found, ctypes.byref(token), *scratch, stream))
        return token.value if token.value >= 0 else None

    def _given(
        self, table: DeviceArray, logits: DeviceArray, best: int | None, embedding: int | None
    ) -> structs.TangoDecodeTensors:
        return structs.TangoDecodeTensors(
            address("table", table, self.table.shape, "uint8"),
            *self._tensors,
            self._head,
            embedding,
            address("logits", logits, (self._vocabulary,), "float32"),
            best,
        )


@dataclass(frozen=True)
class DecodeSequence:
    """A sequence of a batched step.

    Attributes:
        embedding: Embedding of its token, fp16 [D].
        position: Row of the token in its KV cache. The step reads the rows before it, and writes this one.
        rotation: Position of the token's rotary angles.
        caches: The bytes of :func:`cache_table`, in device memory.
        capacity: Positions of its KV cache.
        logits: Output, fp32 [vocabulary].
    """

    embedding: DeviceArray
    position: int
    rotation: int
    caches: DeviceArray
    capacity: int
    logits: DeviceArray


class CudaBatchDecoder(_Kernel):
    """A decode step of up to ``MAX_SEQUENCES`` sequences on the GPU, as one kernel that reads the weights once.

    What a sequence gets does not depend on the others: neither on what they are nor on how many there are. It differs
    from the results of :class:`CudaDecoder` by rounding.

    Args:
        shape: Dimensions; each sequence has its own ``capacity``, so that of the shape does not count.
        weights: As of :class:`CudaDecoder`.
        matrices: As of :class:`CudaDecoder`.
        library: The CUDA library; None takes the one that :func:`tango_plugins.native_library.search` finds.
        blocks: Thread blocks; 0 takes one per SM.

    Attributes:
        table: Addresses of each layer's weights, uint8 [208 · layers], to be copied to the device once.
        workspace_bytes: Scratch memory of a step on the device, aligned to 256 bytes, zero before the first step.

    Raises:
        TangoError: There is no library, a weight is missing or has the wrong shape or dtype, or the kernel does not
            support a dimension on this GPU.
    """

    def __init__(
        self,
        shape: DecoderShape,
        weights: Mapping[str, DeviceArray],
        matrices: Mapping[str, Matrix],
        library: Path | None = None,
        blocks: int = 0,
    ) -> None:
        self._decoder = shape
        rows = [(None, None)] * shape.layers
        super().__init__(load(library), "tango_decode_batch_workspace", shape, weights, matrices, rows, blocks)

    def enqueue(
        self, sequences: Sequence[DecodeSequence], *, table: DeviceArray, workspace: DeviceArray, stream: int
    ) -> None:
        """Enqueues a step on a stream. It neither allocates nor waits.

        Args:
            sequences: From 1 to ``MAX_SEQUENCES``, with caches and logits of their own.
            table: The bytes of :attr:`table`.
            workspace: ``workspace_bytes`` of memory, used by one step at a time.
            stream: A ``cudaStream_t`` as an integer.

        Raises:
            TangoError: An argument has the wrong shape or dtype, or CUDA failed.
        """
        layers = address("table", table, self.table.shape, "uint8")
        tensors = structs.TangoDecodeTensors(layers, *self._tensors, self._head, None, None, None)
        given = (structs.TangoDecodeSequence * len(sequences))(*map(self._sequence, sequences))
        scratch = workspace.address, workspace.nbytes
        enqueue = self._library.tango_decode_batch_enqueue
        _check(self._library, enqueue(self._shape, tensors, given, len(sequences), *scratch, stream))

    def _sequence(self, given: DecodeSequence) -> structs.TangoDecodeSequence:
        shape, bytes_per_layer = self._decoder, ctypes.sizeof(structs.TangoDecodeCache)
        return structs.TangoDecodeSequence(
            address("caches", given.caches, (shape.layers * bytes_per_layer,), "uint8"),
            address("embedding", given.embedding, (shape.hidden_size,), "float16"),
            address("logits", given.logits, (shape.vocabulary,), "float32"),
            *(given.capacity, given.position, given.rotation),
        )


def cache_table(shape: DecoderShape, cache: Sequence[DeviceArray]) -> NDArray[np.uint8]:
    """Addresses of a sequence's KV cache as a batched step takes them, to be copied to the device.

    Args:
        shape: Dimensions of the decoder, with the cache's capacity.
        cache: Keys and values of each layer in turn, fp16 [kv_heads, P, head_dim].

    Returns:
        uint8 [16 · layers].

    Raises:
        TangoError: A tensor is missing, or has another shape or dtype.
    """
    return _bytes_of([structs.TangoDecodeCache(*layer) for layer in _cache_addresses(shape, cache)])


def _formats(matrices: Collection[Matrix]) -> int:
    """What the matrices are, as a TangoDecodeFormats."""
    if all(matrix.bits == 16 for matrix in matrices):
        return _FP16
    return _BLOCKS_4 if all(matrix.bits == 4 for matrix in matrices) else _MIXED


def _check(library: ctypes.CDLL, status: int) -> None:
    if status == 0:
        return
    message = library.tango_last_error().decode()
    if status == _CUDA_ERROR:
        raise TangoError(f"a decode step failed: {message}", "see: tango doctor")
    hint = "see docs/reference/limits.md; a decoder beyond the limits is exported without a device graph"
    raise TangoError(f"the CUDA library rejected a decode step: {message}", hint)


def _bytes_of(structures: Sequence[ctypes.Structure]) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray().join(map(bytes, structures)), np.uint8)


def _cache_addresses(shape: DecoderShape, cache: Sequence[DeviceArray]) -> list[tuple[int, int]]:
    """Addresses of the keys and values of each layer."""
    if len(cache) != 2 * shape.layers:
        raise TangoError(f"the cache has {len(cache)} tensors", f"it must have {2 * shape.layers}")
    rows = (shape.kv_heads, shape.capacity, shape.head_dim)

    def found(layer: int, kind: str, place: int) -> int:
        return address(f"{kind} {layer}", cache[2 * layer + place], rows, "float16")

    return [(found(i, "key", 0), found(i, "value", 1)) for i in range(shape.layers)]


_Spec = tuple[tuple[int, ...], str]


def _layer(
    shape: DecoderShape,
    layer: int,
    weights: Mapping[str, DeviceArray],
    matrices: Mapping[str, Matrix],
    cache: tuple[int, int] | tuple[None, None],
) -> structs.TangoDecodeLayer:
    """Addresses of a layer's weights, and of its keys and values."""

    def named(of: Mapping[str, Any]) -> dict[str, Any]:
        return {f"layers.{layer}.{name}": spec for name, spec in of.items()}

    found = [_matrix(name, matrices, *sizes) for name, sizes in named(_layer_matrices(shape)).items()]
    _, _, gate, _, up = found
    if (gate.weights, gate.group, gate.zeros is None) != (up.weights, up.group, up.zeros is None):
        raise TangoError(
            f"layers.{layer}.mlp.gate_proj and up_proj have weights of different formats",
            "calibrate the bundle again with this tango-edge",
        )
    addresses = [address(name, weights.get(name), *spec) for name, spec in named(_layer_weights(shape)).items()]
    return structs.TangoDecodeLayer(*found, *addresses, *cache)


def _matrix(name: str, matrices: Mapping[str, Matrix], inputs: int, outputs: int) -> structs.TangoMatrix:
    if name not in matrices:
        raise TangoError(f"there is no weight {name}", "export the bundle again")
    return matrices[name].struct(name, inputs, outputs)


def _layer_matrices(shape: DecoderShape) -> dict[str, tuple[int, int]]:
    """The matrices of a layer in the order of TangoDecodeLayer."""
    attn_out = shape.heads * shape.head_dim
    qkv = attn_out + 2 * shape.kv_heads * shape.head_dim
    return {
        "self_attn.qkv_proj.weight": (shape.hidden_size, qkv),
        "self_attn.o_proj.weight": (attn_out, shape.hidden_size),
        "mlp.gate_proj.weight": (shape.hidden_size, shape.intermediate),
        "mlp.down_proj.weight": (shape.intermediate, shape.hidden_size),
        "mlp.up_proj.weight": (shape.hidden_size, shape.intermediate),
    }


def _layer_weights(shape: DecoderShape) -> dict[str, _Spec]:
    """The other weights of a layer in the order of TangoDecodeLayer."""
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return {
        "input_layernorm.weight": ((shape.hidden_size,), "float32"),
        "self_attn.qkv_proj.bias": ((qkv,), "float16"),
        "post_attention_layernorm.weight": ((shape.hidden_size,), "float32"),
    }


def _other_weights(shape: DecoderShape) -> dict[str, _Spec]:
    """The other weights in the order of TangoDecodeTensors."""
    return {
        "rotary.inv_freq": ((shape.head_dim // 2,), "float32"),
        "norm.weight": ((shape.hidden_size,), "float32"),
    }
