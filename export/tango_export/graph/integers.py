"""Arithmetic on integers of a graph, written as arithmetic: where each patch of a frame of any size is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tango_export.graph.builder import GraphBuilder


@dataclass(frozen=True)
class Integers:
    """An int64 scalar or vector of a graph, nowhere negative. Each operator of Python's is a node.

    Attributes:
        g: The graph.
        name: Name of the value.
        scope: What the names of its nodes begin with.
        numbers: What they end with.
    """

    g: GraphBuilder
    name: str
    scope: str
    numbers: Iterator[int]

    def __add__(self, other: Integers | int) -> Integers:
        return self._node("Add", other)

    def __sub__(self, other: Integers | int) -> Integers:
        return self._node("Sub", other)

    def __mul__(self, other: Integers | int) -> Integers:
        return self._node("Mul", other)

    def __floordiv__(self, other: Integers | int) -> Integers:
        return self._node("Div", other)

    def __mod__(self, other: Integers | int) -> Integers:
        return self - self // other * other  # TensorRT 8 has no Mod

    def least(self, other: Integers) -> Integers:
        """The smaller of the two."""
        return self._node("Min", other)

    def below(self, other: Integers) -> str:
        """Where they are smaller, bool."""
        return self._node("Less", other).name

    def range(self) -> Integers:
        """0, 1 … up to a scalar."""
        ends = [self.g.constant(0), self.name, self.g.constant(1)]
        return self._named(self.g.node("Range", ends, self._next("range")))

    def _node(self, op: str, other: Integers | int) -> Integers:
        second = self.g.constant(other) if isinstance(other, int) else other.name
        return self._named(self.g.node(op, [self.name, second], self._next(op.lower())))

    def _next(self, kind: str) -> str:
        return f"{self.scope}.{kind}.{next(self.numbers)}"

    def _named(self, name: str) -> Integers:
        return replace(self, name=name)


def integers(g: GraphBuilder, scope: str, *names: str) -> list[Integers]:
    """Values of a graph as :class:`Integers`, whose nodes are numbered together."""
    numbers = itertools.count()
    return [Integers(g, name, scope, numbers) for name in names]
