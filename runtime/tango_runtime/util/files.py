"""Output that is written aside and renamed at the end, so that no reader ever sees half of it.

- :func:`staged_folder`: a folder that one process writes; a second one is refused.
- :func:`staged_file`: a file that several processes may want; one writes, the others wait.
- :func:`atomic_write`: one file, in one call.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tango_plugins import TangoError


@contextmanager
def staged_folder(final: Path, *, holding: str, overwrite: bool = False) -> Iterator[Path]:
    """Yields a folder beside ``final``, and renames it to ``final`` when the block succeeds.

    When the block fails or is interrupted, the folder is removed. What a killed process left is removed by the next
    one that writes the same ``final``; a lock distinguishes it from a folder that is still being written.

    Args:
        final: The output folder.
        holding: Name of the file that every such folder contains. Only a folder that has it may be replaced.
        overwrite: Replace an existing folder.

    Raises:
        TangoError: ``final`` exists and may not be replaced, another process is writing it, or it cannot be written.
    """
    check_output(final, overwrite=overwrite, holding=holding)
    with _os_errors(final):
        target = final.resolve()  # "." has no name of its own
        missing = [folder for folder in target.parents if not folder.exists()]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _only_writer(final, target.with_name(f".{target.name}.lock")):
                yield from _staged(target, final, overwrite, holding)
        finally:
            for folder in missing:
                with suppress(OSError):  # it contains the output if all went well
                    folder.rmdir()


def check_output(final: Path, *, holding: str, overwrite: bool) -> None:
    """Rejects an output folder that may not be written, before any work is done for it.

    Raises:
        TangoError: It exists, and is not to be replaced or has no file ``holding``.
    """
    with _os_errors(final):
        if not os.path.lexists(final):
            return
        if not overwrite:
            raise TangoError(f"{final} already exists", "choose another folder, or add --overwrite")
        if not (final / holding).is_file():
            raise TangoError(
                f"{final} has no {holding}",
                "--overwrite only replaces the output of this command: choose another folder",
            )


@contextmanager
def staged_file(final: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[tuple[Path, int]]:
    """Locks the file beside ``final`` that is to be written and then renamed to it.

    A process that holds the lock is waited for. At the end the file is removed unless it was renamed; what a killed
    process left is overwritten.

    Args:
        final: The file to write.
        on_wait: Called when another process holds the lock.

    Yields:
        The file aside, empty, and the descriptor that holds its lock.
    """
    partial = final.with_name(f".{final.name}.partial")
    descriptor = _open_locked(partial, on_wait)
    try:
        os.ftruncate(descriptor, 0)
        yield partial, descriptor
    finally:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), partial.stat()):
                partial.unlink()
        os.close(descriptor)


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that a reader sees the old content or all of the new.

    A path that exists and is no regular file, such as ``/dev/null``, a pipe or a symbolic link, is written to directly:
    a rename would replace it.

    Args:
        path: The file.
        write: Writes the content to the binary stream that it is given.

    Raises:
        TangoError: The file cannot be written.
    """
    try:
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            with path.open("wb") as stream:
                write(stream)
            return
        with staged_file(path) as (partial, _):
            with partial.open("wb") as stream:
                write(stream)
            partial.replace(path)
    except OSError as error:
        raise _os_error(path, error) from error


def require_space(folder: Path, needed: int) -> None:
    """Checks that a disk has enough free space.

    Args:
        folder: A folder on that disk.
        needed: Bytes that will be written.

    Raises:
        TangoError: Less is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TangoError(
            f"no space left: the bundle needs {needed / 1e6:.0f} MB, {folder} has {free / 1e6:.0f} MB free",
            "free some space, or choose another --output",
        )


def _staged(target: Path, final: Path, overwrite: bool, holding: str) -> Iterator[Path]:
    partial, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        check_output(final, overwrite=overwrite, holding=holding)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _only_writer(final: Path, lock: Path) -> Iterator[None]:
    try:
        descriptor = _try_lock(lock)
    except BlockingIOError as error:
        raise TangoError(f"another process is writing {final}", "wait for it, or choose another folder") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(file: Path, on_wait: Callable[[], None]) -> int:
    """Waits for a file's lock; returns the descriptor that holds it."""
    try:
        return _try_lock(file)
    except BlockingIOError:
        on_wait()
    while True:
        with suppress(BlockingIOError):
            return _try_lock(file, fcntl.LOCK_EX)


def _try_lock(file: Path, operation: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> int:
    """Opens and locks a file.

    Raises:
        BlockingIOError: Another process holds the lock, or has renamed or removed the file meanwhile.
    """
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, operation)
        if not (file.exists() and os.path.samestat(os.fstat(descriptor), file.stat())):
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(file))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _os_errors(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _os_error(final, error) from error


def _os_error(path: Path, error: OSError) -> TangoError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TangoError(f"no space left on the disk of {path.parent}", "free some space, or write to another disk")
    return TangoError(f"{path} cannot be written: {error.strerror or error}", "choose a path that you may write to")
