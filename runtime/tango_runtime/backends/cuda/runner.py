"""What runs a bundle's graphs on a GPU: the protocol between the CUDA backend and ONNX Runtime or TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tango_plugins.decoder import Words
from tango_plugins.device_array import DeviceArray
from tango_runtime.backends.cuda.device import Pool
from tango_runtime.bundle import GraphName

Run = Callable[[], None]

#: Puts one token of a sequence on the stream, given its embedding [1, D], its row in the cache and its rotary position:
#: fills the logits and that row.
Step = Callable[[DeviceArray, int, int], None]


@dataclass(frozen=True)
class StepOutput:
    """What a decode step fills.

    Attributes:
        logits: fp32 [vocabulary].
        best: Address in pinned memory of index and value of the greatest, as ``logits.ARGMAX`` says.
    """

    logits: DeviceArray
    best: int


class DeviceStep(Protocol):
    """A decode step that is more than a pass of the graphs over one token."""

    def __call__(self, embedding: DeviceArray, position: int, rotation: int, to: StepOutput) -> None:
        """As of ``Step``, with an output that is filled."""

    def after(self, words: Words, found: int, position: int, rotation: int, to: StepOutput) -> int | None:
        """Waits for the stream, then puts the step of a token on it that the stream's work has found.

        Args:
            words: Gives the token its embedding.
            found: Address of the token in pinned memory.
            position: The token's row in the cache.
            rotation: The token's rotary position.
            to: What is to be filled.

        Returns:
            The token; None if it ends the sequence, so that there is no step.
        """


@dataclass(frozen=True)
class SequenceRow:
    """What steps of several sequences need of one of them.

    Attributes:
        caches: Addresses of its keys and values, as :func:`tango_plugins.decoder.cache_table` gives them.
        logits: fp32 [vocabulary].
    """

    caches: DeviceArray
    logits: DeviceArray


@dataclass(frozen=True)
class Token:
    """One sequence's part of a step of several sequences.

    Attributes:
        embedding: Its embedding, [1, D].
        position: Row of the token in the cache.
        rotation: Rotary position of the token.
        capacity: Positions of the cache.
        row: What the step needs of the sequence.
    """

    embedding: DeviceArray
    position: int
    rotation: int
    capacity: int
    row: SequenceRow


class BatchedStep(Protocol):
    """Steps of up to ``MAX_SEQUENCES`` sequences, each of which reads the weights once."""

    def new_row(self, cache: Sequence[DeviceArray], pool: Pool) -> SequenceRow:
        """What a step needs of a sequence, in memory that lives as long as its cache."""

    def __call__(self, tokens: Sequence[Token]) -> None:
        """Puts a step on the stream: fills each sequence's logits and its row of the cache."""


class GraphRunner(Protocol):
    """Runs the bundle's graphs on tensors in device memory."""

    @property
    def description(self) -> str:
        """The backend, in one line."""

    @property
    def steps_at_once(self) -> int | None:
        """Most steps of frames of one pass, where frames have one size; None for all."""

    @property
    def fuses_vision(self) -> bool:
        """Whether the vision graph keeps no scores of its attention in memory."""

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """(height, width) of the only frames that it takes; None for any that the bundle allows."""

    @property
    def tokens_at_once(self) -> int:
        """Most tokens of one pass of the decoder or the embedding."""

    @property
    def capacity(self) -> int | None:
        """Positions of every key/value cache, where the runner fixes them."""

    @property
    def in_place(self) -> bool:
        """Whether the decoder itself puts new rows into the cache; of positions it then takes the last alone."""

    def dtype(self, graph: GraphName, tensor: str) -> str:
        """The dtype that it takes for a tensor, by NumPy's name: TensorRT 8 has int32 where the graph has int64."""

    def bind(self, graph: GraphName, tensors: Mapping[str, DeviceArray], *, replay: bool = False) -> Run:
        """Prepares a graph to read and write these tensors.

        Args:
            graph: Which.
            tensors: Its inputs and outputs.
            replay: The same tensors will be run many times. One such binding of a graph is in use at a time, and its
                inputs must be valid already: it may be run while it is made.

        Returns:
            A function that puts one run on the stream. Without ``replay`` it lasts until the graph is bound again.

        Raises:
            TangoError: The shapes are outside of what the runner was built for. The function raises it too, where a
                run fails.
        """

    def step(self, cache: Sequence[DeviceArray], pool: Pool) -> DeviceStep | None:
        """A decode step that is more than a pass of the graphs over one token; None where there is none.

        Args:
            cache: Keys and values of each layer in turn, [heads, capacity, head_dim] each.
            pool: Gives the memory that it needs, for as long as the cache lives.

        Raises:
            TangoError: There is one, but not for this bundle or machine.
        """

    def batched_step(self, pool: Pool) -> BatchedStep | None:
        """Steps of several sequences; None where there are none.

        Args:
            pool: Gives the memory that they need.

        Raises:
            TangoError: There are some, but not for this bundle or machine.
        """
