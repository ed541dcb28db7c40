"""CUDA on a machine without a GPU: device memory is the host's, work is done at once, kernels are NumPy.

It stands in for cuda.bindings.runtime and the CUDA library, so that what the stages do with memory, copies and graphs
can be tested anywhere. An address that was not allocated, a copy that leaves its allocation, and pinned memory
that is written to or freed before its upload has been waited for, are errors here.
"""

# ruff: noqa: N801, N802, N815  (the names are CUDA's)

from __future__ import annotations

import ctypes
import dataclasses
import time
from enum import IntEnum
from typing import ClassVar

import ml_dtypes
import numpy as np
from PIL import Image

from tango_plugins import reference
from tango_plugins.decoder import MAX_SEQUENCES
from tango_plugins.device_array import DeviceArray
from tango_plugins.op import capacity
from tango_plugins.resize import NV12, RGB24
from tango_plugins.structs import TangoArgmax
from tango_plugins.thinning import thin
from tango_runtime.backends.cuda.logits import ARGMAX


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2


class Kind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class Pitched:
    def __init__(self, ptr, pitch, xsize, ysize):
        self.ptr, self.pitch, self.xsize, self.ysize = ptr, pitch, xsize, ysize


class Job:
    pass


class HostCuda:
    """The part of cuda.bindings.runtime that tango_runtime.backends.cuda.device uses.

    Args:
        memory: Bytes that the device has.
    """

    cudaError_t, cudaMemcpyKind = Status, Kind
    cudaStreamNonBlocking, cudaDeviceScheduleBlockingSync = 1, 4
    cudaMemcpy3DParms = Job
    make_cudaPitchedPtr = Pitched

    class cudaStreamCaptureMode(IntEnum):
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self, memory=1 << 32):
        self.memory, self.blocks, self.allocations, self.flags = memory, {}, 0, 0
        self.locked, self.locks, self.flying = {}, 0, []
        self.recorded, self.recording = [], None

    def make_cudaExtent(self, width, height, depth):
        return width, height, depth

    def held(self):
        return sum(size for _, size in self.blocks.values())

    def cudaMalloc(self, size):
        if self.held() + size > self.memory:
            return Status.cudaErrorMemoryAllocation, 0
        block = ctypes.create_string_buffer(b"\xff" * (size + 256), size + 256)  # NaN, whatever it is read as
        address = -(-ctypes.addressof(block) // 256) * 256
        self.blocks[address] = (block, size)
        self.allocations += 1
        return Status.cudaSuccess, address

    def cudaFree(self, address):
        del self.blocks[address]
        return (Status.cudaSuccess,)

    def cudaMallocHost(self, size):
        block = ctypes.create_string_buffer(size)
        self.locked[ctypes.addressof(block)] = block
        self.locks += 1
        return Status.cudaSuccess, ctypes.addressof(block)

    def cudaFreeHost(self, address):
        assert all(source != address for source, _ in self.flying)
        del self.locked[address]
        return (Status.cudaSuccess,)

    def inside(self, address, size):
        assert any(start <= address and address + size <= start + n for start, (_, n) in self.blocks.items())
        return address

    def cudaMemGetInfo(self):
        return Status.cudaSuccess, self.memory - self.held(), self.memory

    def cudaGetDevice(self):
        return Status.cudaSuccess, 0

    def cudaGetDeviceFlags(self):
        return Status.cudaSuccess, self.flags

    def cudaSetDeviceFlags(self, flags):
        self.flags = flags
        return (Status.cudaSuccess,)

    def cudaGetLastError(self):
        return (Status.cudaSuccess,)

    def cudaMemset(self, address, value, size):
        ctypes.memset(self.inside(address, size), value, size)
        return (Status.cudaSuccess,)

    def cudaMemsetAsync(self, address, value, size, stream):
        return self.cudaMemset(address, value, size)

    def cudaMemset2DAsync(self, address, pitch, value, width, height, stream):
        assert width <= pitch
        for i in range(height if width else 0):
            ctypes.memset(self.inside(address + i * pitch, width), value, width)
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        if size:
            if kind != Kind.cudaMemcpyHostToDevice:
                self.inside(source, size)
            if kind != Kind.cudaMemcpyDeviceToHost:
                self.inside(to, size)
            if source in self.locked:
                self.flying.append((source, ctypes.string_at(source, size)))
            self.do(lambda: ctypes.memmove(to, source, size))
        return (Status.cudaSuccess,)

    def cudaMemcpy(self, to, source, size, kind):
        assert kind == Kind.cudaMemcpyHostToDevice
        ctypes.memmove(self.inside(to, size), source, size)
        return (Status.cudaSuccess,)

    def cudaMemcpy3DAsync(self, job, stream):
        width, height, depth = job.extent
        assert width <= job.srcPtr.pitch
        assert width <= job.dstPtr.pitch
        for z in range(depth):
            for y in range(height):
                to, source = (p.ptr + (z * p.ysize + y) * p.pitch for p in (job.dstPtr, job.srcPtr))
                ctypes.memmove(self.inside(to, width), self.inside(source, width), width)
        return (Status.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags):
        return Status.cudaSuccess, 7

    def cudaStreamDestroy(self, stream):
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        assert self.recording is None, "waiting cannot be recorded"
        assert all(ctypes.string_at(source, len(sent)) == sent for source, sent in self.flying)
        self.flying.clear()
        return (Status.cudaSuccess,)

    def cudaDeviceSynchronize(self):
        return (Status.cudaSuccess,)

    def cudaEventCreate(self):
        return Status.cudaSuccess, [0.0]

    def cudaEventRecord(self, event, stream):
        event[0] = time.perf_counter()
        return (Status.cudaSuccess,)

    def cudaEventSynchronize(self, event):
        return (Status.cudaSuccess,)

    def cudaEventElapsedTime(self, begin, end):
        return Status.cudaSuccess, 1e3 * (end[0] - begin[0])

    def cudaEventDestroy(self, event):
        return (Status.cudaSuccess,)

    def do(self, work):
        """Does a piece of work, or records it."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def cudaStreamBeginCapture(self, stream, mode):
        self.recording = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        recorded, self.recording = self.recording, None
        return Status.cudaSuccess, recorded

    def cudaGraphInstantiate(self, recorded, flags):
        return Status.cudaSuccess, list(recorded)

    def cudaGraphDestroy(self, recorded):
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, executable):
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, executable, stream):
        for work in executable:
            work()
        return (Status.cudaSuccess,)


def array(memory):
    """The array behind device memory."""
    size = int(np.prod(memory.shape)) * np.dtype(memory.dtype).itemsize
    if not size:
        return np.empty(memory.shape, memory.dtype)
    buffer = (ctypes.c_char * size).from_address(memory.address)
    return np.frombuffer(buffer, memory.dtype).reshape(memory.shape)


class HostPruner:
    """The reference in the place of tango_plugins.pruner.CudaPruner."""

    workspace_bytes = 256

    def __init__(self, params, frames, width, dtype):
        self.params = params
        self.capacity = capacity(frames, params.grid[0] * params.grid[1], params)

    def enqueue(self, features, salience, seconds, *, tokens, indices, count, merged, segments, workspace, stream):
        pruned = reference.prune(array(features), array(salience), array(seconds), self.params)
        array(count)[:] = K = pruned.count
        for memory, value, rest in (
            (tokens, pruned.tokens, 0),
            (indices, pruned.indices, -1),
            (merged, pruned.merged, 0),
            (segments, pruned.segments, -1),
        ):
            array(memory)[:] = rest
            array(memory)[: len(value)] = value
        assert len(pruned.indices) == K


class HostThinner:
    """The reference in the place of tango_plugins.thinner.CudaThinner."""

    workspace_bytes = 256

    def __init__(self, thinning, rows, width, dtype):
        self.thinning, self.rows = thinning, rows - thinning.rows + thinning.kept

    def enqueue(self, prompt, share, *, thinned, stay, workspace, stream):
        array(thinned)[:], array(stay)[:] = thin(array(prompt), array(share), self.thinning)


class HostDecoder:
    """A step as tango_export.models.qwen2 computes it, in the place of tango_plugins.decoder.CudaDecoder.

    It takes any floating-point type. A workspace that was not zero at first, or that another has written into, is an
    error here.
    """

    workspace_bytes = 512
    host: ClassVar[HostCuda]

    def __init__(self, shape, weights, matrices, cache, library=None):
        self.shape, self.weights, self.matrices, self.cache, self.left = shape, weights, matrices, cache, 0
        assert {memory.shape for memory in cache} == {(shape.kv_heads, shape.capacity, shape.head_dim)}
        assert len(cache) == 2 * shape.layers
        self.table = np.array([memory.address for memory in (*weights.values(), *cache)]).view(np.uint8)

    def enqueue(self, embedding, position, rotation=None, *, logits, best=None, table, workspace, stream):
        assert (array(workspace) == self.left).all()
        assert (array(table) == self.table).all()
        assert 0 <= position < self.shape.capacity
        self.left = array(workspace)[:] = 170
        x = array(embedding).reshape(self.shape.hidden_size)
        places = position, position if rotation is None else rotation
        for i in range(self.shape.layers):
            x = x + self.attend(f"layers.{i}.self_attn", self.norm(f"layers.{i}.input_layernorm", x), i, *places)
            x = x + self.mlp(f"layers.{i}.mlp", self.norm(f"layers.{i}.post_attention_layernorm", x))
        row = self.linear("lm_head", self.norm("norm", x), self.shape.head_columns)
        array(logits)[:] = row[: self.shape.vocabulary]
        if best is not None:
            TangoArgmax.from_address(best).index = int(array(logits).argmax())
            TangoArgmax.from_address(best).value = array(logits).max()

    def enqueue_next(self, words, found, position, rotation, *, stream, **memory):
        self.host.cudaStreamSynchronize(stream)
        token = ctypes.c_int32.from_address(found).value
        if token in words.stop or not 0 <= token < len(words.table):
            return None
        array(words.embedding)[0] = words.row[:] = words.table[token]
        self.enqueue(words.embedding, position, rotation, stream=stream, **memory)
        return token

    def attend(self, name, x, layer, position, rotation):
        heads, kv_heads, width = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        packed = self.linear(f"{name}.qkv_proj", x, (heads + 2 * kv_heads) * width)
        packed = (packed + array(self.weights[f"{name}.qkv_proj.bias"])).reshape(-1, width)
        rotated = self.rotate(packed[: heads + kv_heads].astype(np.float32), rotation)
        keys, values = (array(memory) for memory in self.cache[2 * layer : 2 * layer + 2])
        keys[:, position], values[:, position] = rotated[heads:], packed[heads + kv_heads :]
        keys, values = (rows[:, : position + 1].astype(np.float32) for rows in (keys, values))
        scores = rotated[:heads].reshape(kv_heads, -1, width) * width**-0.5 @ keys.transpose(0, 2, 1)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares = (shares / shares.sum(-1, keepdims=True)).astype(x.dtype)
        return self.linear(f"{name}.o_proj", (shares @ values).astype(x.dtype).reshape(-1), self.shape.hidden_size)

    def rotate(self, x, position):
        angles = np.float32(position) * array(self.weights["rotary.inv_freq"])
        first, second = np.split(x, 2, -1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)

    def mlp(self, name, x):
        gate, up = (self.linear(f"{name}.{kind}_proj", x, self.shape.intermediate) for kind in ("gate", "up"))
        silu = gate / (1 + np.exp(-gate.astype(np.float32)))
        return self.linear(f"{name}.down_proj", (silu * up).astype(x.dtype), self.shape.hidden_size)

    def norm(self, name, x):
        wide = x.astype(np.float32)
        scale = 1 / np.sqrt((wide * wide).mean() + np.float32(self.shape.norm_eps))
        return (wide * scale * array(self.weights[f"{name}.weight"])).astype(x.dtype)

    def linear(self, name, x, columns):
        weight = dequantized(self.matrices[f"{name}.weight"], len(x))
        assert weight.shape == (len(x), columns)
        return (x.astype(np.float32) @ weight.astype(np.float32, copy=False)).astype(x.dtype)


class HostBatchDecoder(HostDecoder):
    """Steps of several sequences, in the place of tango_plugins.decoder.CudaBatchDecoder.

    Attributes:
        steps: Number of sequences of each step so far, of all decoders.
    """

    steps: ClassVar[list[int]] = []

    def __init__(self, shape, weights, matrices, library=None):
        super().__init__(shape, weights, matrices, [DeviceArray(0, _rows(shape), "float16")] * (2 * shape.layers))
        self.table = np.array([memory.address for memory in weights.values()]).view(np.uint8)

    def enqueue(self, sequences, *, table, workspace, stream):
        assert 1 <= len(sequences) <= MAX_SEQUENCES
        assert len({sequence.caches.address for sequence in sequences}) == len(sequences)
        self.steps.append(len(sequences))
        shared = {"table": table, "workspace": workspace, "stream": stream}
        for each in sequences:
            self.shape = dataclasses.replace(self.shape, capacity=each.capacity)
            addresses = array(each.caches).view(np.int64)
            self.cache = [DeviceArray(int(address), _rows(self.shape), self.dtype) for address in addresses]
            super().enqueue(each.embedding, each.position, each.rotation, logits=each.logits, **shared)

    @property
    def dtype(self):
        return self.weights["layers.0.self_attn.qkv_proj.bias"].dtype


def host_cache_table(shape, cache):
    """In the place of tango_plugins.decoder.cache_table, for any floating-point type."""
    assert {memory.shape for memory in cache} == {_rows(shape)}
    return np.array([memory.address for memory in cache]).view(np.uint8)


def _rows(shape):
    return shape.kv_heads, shape.capacity, shape.head_dim


def dequantized(matrix, inputs):
    """A matrix [in, out] that tango_plugins.matrix.Matrix describes."""
    values = array(matrix.values)
    if values.dtype == ml_dtypes.float8_e4m3fn:
        return values.astype(np.float32).T * array(matrix.scales).astype(np.float32)
    if not matrix.group:
        return values if matrix.scales is None else values * array(matrix.scales)
    assert matrix.zeros is None
    elements = np.stack([values >> shift & 2**matrix.bits - 1 for shift in range(0, 8, matrix.bits)], -1)
    elements = elements.reshape(*elements.shape[:2], matrix.group).astype(np.float32) - 2 ** (matrix.bits - 1)
    numbers = elements * array(matrix.scales).astype(np.float32)[..., None]
    return numbers.reshape(len(numbers), -1)[:, :inputs].T


def resize(shape, image, chroma, resized, workspace, stream):
    """In the place of tango_plugins.resize.enqueue, for RGB and NV12."""
    if shape.format == RGB24:
        assert shape.pitch == 3 * shape.columns
        assert shape.frame_rows == shape.rows
        frames = array(DeviceArray(image, (shape.frames, shape.rows, shape.columns, 3), "uint8"))
    else:
        frames = [nv12_to_rgb(shape, image, chroma)]
    for rgb, target in zip(frames, array(resized), strict=True):
        shown = rgb.transpose(1, 0, 2) if shape.transpose else rgb
        shown = np.ascontiguousarray(shown[:: 1 - 2 * shape.flip_rows, :: 1 - 2 * shape.flip_columns])
        found = Image.fromarray(shown).resize((shape.out_columns, shape.out_rows), Image.Resampling.BICUBIC)
        target[:] = np.asarray(found)


def nv12_to_rgb(shape, image, chroma):
    """Converts a frame in what stands for device memory."""
    from tests.plugins import resizes

    half = -(-shape.rows // 2), -(-shape.columns // 2)
    luma = array(DeviceArray(image, (shape.rows, shape.pitch), "uint8"))[:, : shape.columns]
    colors = array(DeviceArray(chroma, (half[0], shape.pitch), "uint8"))[:, : 2 * half[1]].reshape(*half, 2)
    made = resizes.Shape(shape.rows, shape.columns, 1, 1, format=NV12, matrix=shape.matrix, full_range=shape.full_range)
    return resizes.rgb(made, [luma[None].astype(int), colors[None].astype(int)])[0]


def argmax(rows, best, stream):
    """In the place of tango_runtime.backends.cuda.logits.enqueue_argmax."""
    found = array(best).reshape(-1).view(ARGMAX)
    for i, row in enumerate(map(array, rows)):
        found[i] = row.argmax(), row.max() if not np.isnan(row).any() else np.nan


def gather(rows, filler, order, gathered, stream):
    """In the place of tango_runtime.backends.cuda.row_ends.enqueue_gather."""
    places = array(order)
    assert places.max() < len(array(rows))
    array(gathered)[:] = np.where(places[:, None] < 0, array(filler), array(rows)[places])


def install(monkeypatch, memory=1 << 32):
    """Puts all of this in the place of CUDA."""
    from tango_plugins import native_library
    from tango_runtime.backends.cuda import backend as cuda
    from tango_runtime.backends.cuda import device, device_decoder, frames, logits, tensorrt, thinning_decoder

    found = HostCuda(memory)
    monkeypatch.setattr(device, "cudart", lambda: found)
    monkeypatch.setattr(frames, "cudart", lambda: found)
    monkeypatch.setattr(frames, "workspace_bytes", lambda shape: 256)
    monkeypatch.setattr(frames, "enqueue", resize)
    monkeypatch.setattr(native_library, "load", lambda: None)
    monkeypatch.setattr(cuda, "CudaPruner", HostPruner)
    monkeypatch.setattr(cuda, "enqueue_gather", gather)
    monkeypatch.setattr(thinning_decoder, "enqueue_gather", gather)
    monkeypatch.setattr(thinning_decoder, "CudaThinner", HostThinner)
    monkeypatch.setattr(HostDecoder, "host", found, raising=False)
    monkeypatch.setattr(device_decoder, "CudaDecoder", HostDecoder)
    monkeypatch.setattr(device_decoder, "CudaBatchDecoder", HostBatchDecoder)
    monkeypatch.setattr(device_decoder, "cache_table", host_cache_table)
    monkeypatch.setattr(HostBatchDecoder, "steps", [])
    monkeypatch.setattr(logits, "enqueue_argmax", argmax)
    monkeypatch.setattr(tensorrt, "start_products", lambda library: None)
    return found
