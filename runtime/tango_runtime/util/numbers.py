"""What counts as a number where a caller gives one; true and false do not."""

from __future__ import annotations

from numbers import Integral, Real


def is_integer(value: object) -> bool:
    """Whether a value is an integer, Python's or NumPy's."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number, Python's or NumPy's."""
    return isinstance(value, Real) and not isinstance(value, bool)
