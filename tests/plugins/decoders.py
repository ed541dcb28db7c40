"""Random decoders for the CUDA library's decode step, and the same step in fp64."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from tango_plugins.decoder import CudaBatchDecoder, CudaDecoder, DecodeSequence, Words, cache_table
from tango_plugins.structs import TangoArgmax
from tests.plugins.matrices import device_array, quantized

EPS = 1e-6

#: Largest relative error of logits. On an H200 it is at most 1e-5.
LIMIT = 1e-4


class Decoder:
    """Random weights and a random cache; the logits are poisoned before each step.

    Args:
        shape: Dimensions.
        seed: Seed of all random numbers.
        library: The CUDA library; None takes the installed one.
        blocks: Thread blocks; 0 takes the whole GPU.
        device: Device of all tensors.
        formats: Those of the matrices, in turn; see tests.plugins.matrices. ``up_proj`` has that of ``gate_proj``.
    """

    def __init__(self, shape, seed=0, library=None, blocks=0, device="cuda", formats=("fp16",)):
        self.shape, self.device, s = shape, device, shape
        self.generator = torch.Generator(device).manual_seed(seed)
        qkv = (s.heads + 2 * s.kv_heads) * s.head_dim
        self.weights = {
            "norm.weight": self.random(s.hidden_size) + 1,
            "lm_head.weight": self.matrix(s.hidden_size, s.head_columns),
            "rotary.inv_freq": 1e6 ** (-torch.arange(0, s.head_dim, 2, device=device) / s.head_dim),
        }
        for i in range(s.layers):
            layer = {
                "input_layernorm.weight": self.random(s.hidden_size) + 1,
                "self_attn.qkv_proj.weight": self.matrix(s.hidden_size, qkv),
                "self_attn.qkv_proj.bias": self.random(qkv).half(),
                "self_attn.o_proj.weight": self.matrix(s.heads * s.head_dim, s.hidden_size),
                "post_attention_layernorm.weight": self.random(s.hidden_size) + 1,
                "mlp.gate_proj.weight": self.matrix(s.hidden_size, s.intermediate),
                "mlp.up_proj.weight": self.matrix(s.hidden_size, s.intermediate),
                "mlp.down_proj.weight": self.matrix(s.intermediate, s.hidden_size),
            }
            self.weights |= {f"layers.{i}.{name}": weight for name, weight in layer.items()}
        rows = s.kv_heads, s.capacity, s.head_dim
        self.cache = [self.random(*rows).half() for _ in range(2 * s.layers)]
        names = [name for name, weight in self.weights.items() if weight.ndim == 2]
        form = dict(zip(names, formats * len(names), strict=False))
        form |= {name: form[name.replace("up_proj", "gate_proj")] for name in names if "up_proj" in name}
        self.matrices = {name: quantized(self.weights.pop(name), form[name]) for name in names}
        self.weights |= {name: matrix.dequantized for name, matrix in self.matrices.items()}
        given = {name: device_array(weight) for name, weight in self.weights.items() if name not in self.matrices}
        matrices = {name: matrix.given for name, matrix in self.matrices.items()}
        self.given = given, matrices
        cache = [device_array(rows) for rows in self.cache]
        self.decoder = CudaDecoder(shape, given, matrices, cache, library, blocks)
        self.table = torch.from_numpy(self.decoder.table).to(device)
        self.workspace = zeros(self.decoder.workspace_bytes, device)
        self.logits = torch.empty(s.vocabulary, device=device)
        self.best = torch.zeros(8, dtype=torch.uint8)
        if device == "cuda":
            self.best = self.best.pin_memory()

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def matrix(self, rows, columns):
        return (self.random(rows, columns) * rows**-0.5).half()

    def embedding(self):
        return self.random(self.shape.hidden_size).half()

    def enqueue(self, embedding, position, rotation=None):
        tensors = {"logits": self.logits, "table": self.table, "workspace": self.workspace}
        named = {name: device_array(tensor) for name, tensor in tensors.items()}
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        best = self.best.data_ptr()
        self.decoder.enqueue(device_array(embedding), position, rotation, **named, best=best, stream=stream)

    def step(self, embedding, position, rotation=None):
        self.logits.fill_(torch.nan)
        self.enqueue(embedding, position, rotation)
        return self.logits.clone()

    def greatest(self):
        """Index and value of the greatest logit, as the last step found it."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        found = TangoArgmax.from_address(self.best.data_ptr())
        return found.index, found.value

    def next(self, found, position, rotation, words=None):
        """A step of a token that was found, int32 [1] in memory that the GPU writes → the token, and the logits."""
        self.logits.fill_(torch.nan)
        tensors = {"logits": self.logits, "table": self.table, "workspace": self.workspace}
        named = {name: device_array(tensor) for name, tensor in tensors.items()}
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        if self.device == "cuda":
            torch.cuda._sleep(20_000_000)  # cycles, some 10 ms
        given, best = (words or self.words(), found.data_ptr(), position, rotation), self.best.data_ptr()
        return self.decoder.enqueue_next(*given, **named, best=best, stream=stream), self.logits.clone()

    def words(self, stop=()):
        """Embeddings of 50 words, which are the same at every call."""
        generator, width = torch.Generator().manual_seed(3), self.shape.hidden_size
        table = torch.randn(50, width, generator=generator).half()
        self.row, self.placed = torch.empty(width).half(), torch.empty(1, width, device=self.device).half()
        self.mail = torch.zeros(2, dtype=torch.int32)
        if self.device == "cuda":
            self.row, self.mail = self.row.pin_memory(), self.mail.pin_memory()
        return Words(
            table.numpy(), self.row.numpy(), self.mail.numpy().view(np.uint32), device_array(self.placed), stop
        )


class Batch:
    """Sequences with random caches for a batched step of a decoder.

    Args:
        decoder: Has the weights.
        positions: Of each sequence's token.
        capacities: Positions of each cache.
        library: As of :class:`Decoder`.
        blocks: As of :class:`Decoder`.
    """

    def __init__(self, decoder, positions, capacities, library=None, blocks=0):
        self.decoder, self.positions, self.device = decoder, positions, decoder.device
        s = decoder.shape
        self.shapes = [dataclasses.replace(s, capacity=capacity) for capacity in capacities]
        self.caches = [
            [decoder.random(s.kv_heads, capacity, s.head_dim).half() for _ in range(2 * s.layers)]
            for capacity in capacities
        ]
        self.embeddings = [decoder.embedding() for _ in positions]
        self.rotations = [position + 3 * i for i, position in enumerate(positions)]
        self.logits = [torch.empty(s.vocabulary, device=self.device) for _ in positions]
        self.batch = CudaBatchDecoder(s, *decoder.given, library, blocks)
        self.table = torch.from_numpy(self.batch.table).to(self.device)
        self.workspace = zeros(self.batch.workspace_bytes, self.device)
        self.tables = [
            torch.from_numpy(cache_table(shape, [device_array(rows) for rows in cache])).to(self.device)
            for shape, cache in zip(self.shapes, self.caches, strict=True)
        ]

    def sequence(self, i):
        return DecodeSequence(
            device_array(self.embeddings[i]),
            self.positions[i],
            self.rotations[i],
            device_array(self.tables[i]),
            self.shapes[i].capacity,
            device_array(self.logits[i]),
        )

    def enqueue_sequences(self, sequences):
        memory = {"table": device_array(self.table), "workspace": device_array(self.workspace)}
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        self.batch.enqueue(sequences, **memory, stream=stream)

    def enqueue(self, chosen):
        """A step of some of the sequences, in this order."""
        self.enqueue_sequences([self.sequence(i) for i in chosen])

    def step(self, chosen):
        """The logits of a step of some sequences, and their new rows."""
        for logits in self.logits:
            logits.fill_(torch.nan)
        self.enqueue(chosen)
        rows = [[layer[:, self.positions[i]].clone() for layer in self.caches[i]] for i in chosen]
        return [self.logits[i].clone() for i in chosen], rows

    def spoil(self):
        """Fills the rows after the positions with NaN."""
        for cache, position in zip(self.caches, self.positions, strict=True):
            for rows in cache:
                rows[:, position:] = torch.nan


def check_batch(batch, chosen):
    """Compares a step of some sequences with fp64, and that nothing else of any cache is written."""
    before = [[rows.clone() for rows in cache] for cache in batch.caches]
    found, _ = batch.step(chosen)
    for logits, i in zip(found, chosen, strict=True):
        like, position = [rows.clone() for rows in before[i]], batch.positions[i]
        wanted = reference(batch.decoder, batch.embeddings[i], position, like, batch.rotations[i], batch.caches[i])
        assert error(logits, wanted) < LIMIT, i
        for rows, expected, old in zip(batch.caches[i], like, before[i], strict=True):
            assert error(rows[:, position], expected[:, position].double()) < 1e-3, i
            old[:, position] = rows[:, position]
    for cache, old in zip(batch.caches, before, strict=True):
        assert all(torch.equal(rows.nan_to_num(7.0), was.nan_to_num(7.0)) for rows, was in zip(cache, old, strict=True))


def zeros(size, device):
    """uint8 [size], aligned to 256 bytes."""
    memory = torch.zeros(size + 256, dtype=torch.uint8, device=device)
    return memory[-memory.data_ptr() % 256 :][:size]


def norm(x, weight):
    return x * torch.rsqrt((x * x).mean() + EPS) * weight.double()


def reference(decoder, embedding, position, cache, rotation=None, own=None):
    """Logits in fp64; writes the new rows to ``cache`` in fp16, as the kernel does.

    Attention reads ``own`` instead, if given: the cache after the kernel's step. A value that lies between two fp16
    numbers may be rounded either way, which costs 1e-4 at the first position, where attention returns it.
    """
    s, get = decoder.shape, lambda name: decoder.weights[name].double()
    rotation = position if rotation is None else rotation
    angles = rotation * decoder.weights["rotary.inv_freq"]  # in fp32, as in the graph
    cosine, sine = angles.double().cos(), angles.double().sin()
    x = embedding.double()
    for i in range(s.layers):
        at = f"layers.{i}."
        qkv = norm(x, get(f"{at}input_layernorm.weight")) @ get(f"{at}self_attn.qkv_proj.weight")
        qkv = (qkv + get(f"{at}self_attn.qkv_proj.bias")).reshape(-1, s.head_dim)
        first, second = qkv[: s.heads + s.kv_heads].chunk(2, -1)
        rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
        keys, values = cache[2 * i : 2 * i + 2]
        keys[:, position] = rotated[s.heads :].half()
        values[:, position] = qkv[s.heads + s.kv_heads :].half()
        query = rotated[: s.heads].reshape(s.kv_heads, -1, s.head_dim) * s.head_dim**-0.5
        keys, values = (keys, values) if own is None else own[2 * i : 2 * i + 2]
        seen = slice(0, position + 1)
        weights = (query @ keys[:, seen].double().transpose(1, 2)).softmax(-1)
        x = x + (weights @ values[:, seen].double()).reshape(-1) @ get(f"{at}self_attn.o_proj.weight")
        y = norm(x, get(f"{at}post_attention_layernorm.weight"))
        gate = torch.nn.functional.silu(y @ get(f"{at}mlp.gate_proj.weight"))
        x = x + (gate * (y @ get(f"{at}mlp.up_proj.weight"))) @ get(f"{at}mlp.down_proj.weight")
    return norm(x, get("norm.weight")) @ get("lm_head.weight")[:, : s.vocabulary]


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def check_next(decoder, position, rotation):
    """The step of a token that was found is that of its embedding, to the bit; stop tokens and others have none.

    On a GPU the token is found long after the step has been enqueued.
    """
    found = torch.zeros(1, dtype=torch.int32)
    found = found.pin_memory() if decoder.device == "cuda" else found
    table, stop = torch.from_numpy(decoder.words().table).to(decoder.device), (7, 49)
    for token in (0, 31, 48):
        wanted = decoder.step(table[token], position, rotation)
        rows = [row[:, position].clone() for row in decoder.cache]
        for row in decoder.cache:
            row[:, position] = torch.nan
        found[0] = token
        for _ in range(2):
            given, logits = decoder.next(found, position, rotation, decoder.words(stop))
            assert given == token
            assert torch.equal(logits, wanted)
            assert decoder.greatest() == (int(wanted.argmax()), float(wanted.max()))
            assert all(torch.equal(row[:, position], old) for row, old in zip(decoder.cache, rows, strict=True))
    for token in (*stop, -1, 50, 1 << 30):
        found[0] = token
        given, logits = decoder.next(found, position, rotation, decoder.words(stop))
        assert given is None
        assert logits.isnan().all()


def check_step(decoder, position, rotation=None):
    """Compares a step's logits and new rows with fp64, and that no other row is written; then restores the rows.

    The greatest logit is to be the greatest of the step's own.
    """
    before, cache = [rows.clone() for rows in decoder.cache], [rows.clone() for rows in decoder.cache]
    embedding = decoder.embedding()
    found = decoder.step(embedding, position, rotation)
    wanted = reference(decoder, embedding, position, cache, rotation, decoder.cache)
    assert error(found, wanted) < LIMIT, position
    assert decoder.greatest() == (int(found.argmax()), float(found.max())), position
    for rows, like, old in zip(decoder.cache, cache, before, strict=True):
        assert error(rows[:, position], like[:, position].double()) < 1e-3, position
        rows[:, position] = old[:, position]
        assert torch.equal(rows, old), position
