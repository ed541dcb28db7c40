"""Version strings as numbers, to compare them."""

from __future__ import annotations


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``8.6.0`` → (8, 6, 0), ``10.3rc1`` → (10,)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
