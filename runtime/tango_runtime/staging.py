"""Folders and files that are made aside and renamed, so that what stands under its name is whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tango_plugins import TangoError


@contextmanager
def staged_folder(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a folder beside ``final`` to write into, and renames it to ``final`` when the block ends well.

    When the block fails or is interrupted, the folder is removed. What a killed process left is removed by the next
    one that writes the same ``final``; a lock tells it from one that is still being written.

    Args:
        final: Where the folder will stand.
        overwrite: Replace a folder that stands there already.

    Raises:
        TangoError: ``final`` exists and may not be replaced, another process is writing it, or the disk is full.
    """
    if final.exists() and not overwrite:
        raise TangoError(f"{final} exists already", "name another --output, or add --overwrite")
    partial = final.with_name(f".{final.name}.partial")
    with _os_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(final, partial.with_suffix(".lock"))
    try:
        with _os_errors(final):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            _replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        partial.with_suffix(".lock").unlink(missing_ok=True)
        os.close(lock)


def _lock(final: Path, file: Path) -> int:
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise TangoError(f"another process is writing {final}", "wait for it, or name another --output") from error
    return descriptor


def _replace(partial: Path, final: Path) -> None:
    if not final.exists():
        partial.rename(final)
        return
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    final.rename(old)
    partial.rename(final)
    shutil.rmtree(old)


@contextmanager
def _os_errors(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TangoError(
                f"no space left on the disk of {final.parent}", "free some, or name another --output"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise TangoError(
                f"{error.filename or final} cannot be opened: {error.strerror}", "name a folder that you may write to"
            ) from error
        raise


def require_space(folder: Path, needed: int) -> None:
    """Refuses to begin what the disk cannot hold.

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
            "free some, or name another --output",
        )
