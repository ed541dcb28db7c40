"""One file that several processes may want to write: one writes, the others wait."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def staged_file(final: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[tuple[Path, int]]:
    """Holds the file beside ``final`` that is to be written and then renamed to it, for this process alone.

    Another that holds it is waited for. What was not renamed is removed at the end; what a killed process left is
    written over.

    Args:
        final: What will be written.
        waiting: Told when another process holds it.

    Yields:
        The file aside, empty, and the descriptor that holds its lock.
    """
    partial = final.with_name(f".{final.name}.partial")
    descriptor = _lock(partial, waiting)
    try:
        os.ftruncate(descriptor, 0)
        yield partial, descriptor
    finally:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), partial.stat()):
                partial.unlink()
        os.close(descriptor)


def _lock(partial: Path, waiting: Callable[[], None]) -> int:
    while True:
        descriptor = os.open(partial, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            _flock(descriptor, waiting)
            with suppress(FileNotFoundError):  # who held it has renamed or removed it meanwhile
                if os.path.samestat(os.fstat(descriptor), partial.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, waiting: Callable[[], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
