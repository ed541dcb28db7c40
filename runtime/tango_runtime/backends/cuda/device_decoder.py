"""What is the same of a decoder's device graph whatever engine runs it: its tensors, and decoding without the graph.

The engine takes passes over many tokens: attention is an operator of the CUDA library, and the cache grows in place. A
decode step is one kernel of that library, on the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from tango_plugins.decoder import CudaBatchDecoder, CudaDecoder, DecoderShape, DecodeSequence, Words, cache_table
from tango_plugins.device_array import DeviceArray
from tango_plugins.matrix import Matrix
from tango_runtime.backends.cuda.device import Pool, Stream
from tango_runtime.backends.cuda.runner import SequenceRow, StepOutput, Token
from tango_runtime.backends.cuda.weights import Weights
from tango_runtime.backends.ort_cpu import cache_inputs, cache_rows
from tango_runtime.bundle import GraphName, Manifest


class DeviceDecoder:
    """The device graph of a bundle's decoder, or its two.

    Args:
        manifest: The bundle's.
        weights: Those of the decoder's graphs.
        stream: What everything runs on.

    Attributes:
        positions: The dtype of the last position.
    """

    positions = "int32"

    def __init__(self, manifest: Manifest, weights: Mapping[GraphName, Weights], stream: Stream) -> None:
        self._manifest, self._weights, self._stream = manifest, weights, stream

    def tensors(self, graph: GraphName, plain: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        """A portable graph's tensors as those of its device graph: past and present are the whole cache."""
        spec = self._manifest.graphs[graph]
        assert spec.device is not None
        groups = cache_inputs(spec), cache_rows(spec), cache_rows(spec.device)
        past, new, present = ([tensor.name for tensor in group] for group in groups)
        cache, replaced = [plain[name] for name in new], {"positions", *past, *new}
        others = {name: tensor for name, tensor in plain.items() if name not in replaced}
        whole = dict(zip(past, cache, strict=True)) | dict(zip(present, cache, strict=True))
        return {**others, "last_position": plain["positions"], **whole}

    def step(self, cache: Sequence[DeviceArray], pool: Pool) -> DecoderStep:
        """The CUDA library's decode step."""
        weights = self._weights["decoder"]
        matrices = weights.matrices()
        shape = _shape(self._manifest, weights, matrices, cache[0].shape[1])
        return DecoderStep(CudaDecoder(shape, weights, matrices, cache), self._stream, pool)

    def batched_step(self, pool: Pool) -> DeviceBatch:
        """The CUDA library's decode step of several sequences."""
        weights = self._weights["decoder"]
        matrices = weights.matrices()
        shape = _shape(self._manifest, weights, matrices, self._manifest.decoder.context)
        return DeviceBatch(CudaBatchDecoder(shape, weights, matrices), shape, self._stream, pool)


class DecoderStep:
    """Steps of one sequence by one kernel; see :class:`tango_runtime.backends.cuda.runner.DeviceStep`.

    Args:
        decoder: The kernel on its weights and the sequence's cache.
        stream: What it runs on.
        pool: Gives the memory that it needs.
    """

    def __init__(self, decoder: CudaDecoder, stream: Stream, pool: Pool) -> None:
        table = pool.take("decoder table", decoder.table.shape, np.uint8)
        workspace = pool.take("decoder workspace", (decoder.workspace_bytes,), np.uint8)
        stream.upload(decoder.table, table)
        stream.clear(workspace)  # the kernel's to write alone from here on
        self._enqueue = partial(decoder.enqueue, table=table, workspace=workspace, stream=stream.handle)
        self._enqueue_next = partial(decoder.enqueue_next, table=table, workspace=workspace, stream=stream.handle)

    def __call__(self, embedding: DeviceArray, position: int, rotation: int, to: StepOutput) -> None:
        """Puts a token on the stream: fills the output and its row of the cache."""
        self._enqueue(embedding, position, rotation, logits=to.logits, best=to.best)

    def after(self, words: Words, found: int, position: int, rotation: int, to: StepOutput) -> int | None:
        """Waits for the stream, then puts the token on it that was found; None if that ends the sequence."""
        return self._enqueue_next(words, found, position, rotation, logits=to.logits, best=to.best)


class DeviceBatch:
    """Steps of several sequences by one kernel; see :class:`tango_runtime.backends.cuda.runner.BatchedStep`.

    Args:
        decoder: The kernel on its weights.
        shape: The decoder's dimensions.
        stream: What it runs on.
        pool: Gives the memory that all steps share.
    """

    def __init__(self, decoder: CudaBatchDecoder, shape: DecoderShape, stream: Stream, pool: Pool) -> None:
        self._decoder, self._shape, self._stream = decoder, shape, stream
        self._table = pool.take("batch table", decoder.table.shape, np.uint8)
        self._workspace = pool.take("batch workspace", (decoder.workspace_bytes,), np.uint8)
        stream.upload(decoder.table, self._table)
        stream.clear(self._workspace)  # the kernel's to write alone from here on

    def new_row(self, cache: Sequence[DeviceArray], pool: Pool) -> SequenceRow:
        """What a step needs of a sequence, in memory that lives as long as its cache."""
        addresses = cache_table(replace(self._shape, capacity=cache[0].shape[1]), cache)
        caches = pool.take("cache table", addresses.shape, np.uint8)
        self._stream.upload(addresses, caches)
        return SequenceRow(caches, pool.take("row of logits", (self._shape.vocabulary,), np.float32))

    def __call__(self, tokens: Sequence[Token]) -> None:
        """Puts a step on the stream: fills each sequence's logits and its row of the cache."""
        sequences = [
            DecodeSequence(
                token.embedding,
                token.position,
                token.rotation,
                token.row.caches,
                token.capacity,
                token.row.logits,
            )
            for token in tokens
        ]
        self._decoder.enqueue(sequences, table=self._table, workspace=self._workspace, stream=self._stream.handle)


def _shape(manifest: Manifest, weights: Weights, matrices: Mapping[str, Matrix], capacity: int) -> DecoderShape:
    """The decoder's dimensions; the shapes of the weights have those that bundle.json has not."""
    spec, layer = manifest.decoder, "layers.0"
    return DecoderShape(
        layers=spec.layers,
        hidden_size=spec.hidden_size,
        heads=weights[f"{layer}.self_attn.qkv_proj.bias"].shape[-1] // spec.head_dim - 2 * spec.kv_heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        intermediate=matrices[f"{layer}.mlp.gate_proj.weight"].outputs,
        vocabulary=manifest.prompt.vocabulary,
        head_columns=matrices["lm_head.weight"].outputs,
        capacity=capacity,
        norm_eps=spec.norm_eps,
    )
