"""Folders and files that are made aside and renamed, so that what stands under its name is whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tango_plugins import TangoError
from tango_runtime.bundle import MANIFEST


@contextmanager
def staged_folder(final: Path, *, overwrite: bool = False, holding: str = MANIFEST) -> Iterator[Path]:
    """Gives a folder beside ``final`` to write into, and renames it to ``final`` when the block ends well.

    When the block fails or is interrupted, the folder is removed. What a killed process left is removed by the next
    one that writes the same ``final``; a lock tells it from one that is still being written.

    Args:
        final: Where the folder will stand.
        overwrite: Replace a folder that stands there already, if it holds such a file.
        holding: The file by which a folder is known as one that may be replaced: a bundle's by default.

    Raises:
        TangoError: ``final`` exists and may not be replaced, another process is writing it, or it cannot be written.
    """
    check_output(final, overwrite=overwrite, holding=holding)
    with _os_errors(final):
        place = final.resolve()  # "." has no name of its own
        missing = [folder for folder in place.parents if not folder.exists()]
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _locked(final, place.with_name(f".{place.name}.lock")):
                yield from _staged(place, final, overwrite, holding)
        finally:
            for folder in missing:
                with suppress(OSError):  # it holds the output, if all went well
                    folder.rmdir()


def check_output(final: Path, *, overwrite: bool, holding: str = MANIFEST) -> None:
    """Refuses an output that may not be written, before any work is done for it.

    Raises:
        TangoError: It exists, and is not to be replaced, or does not hold the file ``holding``.
    """
    with _os_errors(final):
        if not os.path.lexists(final):
            return
        if not overwrite:
            raise TangoError(f"{final} exists already", "name another --output, or add --overwrite")
        if not (final / holding).is_file():
            raise TangoError(
                f"{final} holds no {holding}",
                "--overwrite replaces only what this command makes: name another --output",
            )


def _staged(place: Path, final: Path, overwrite: bool, holding: str) -> Iterator[Path]:
    partial, old = (place.with_name(f".{place.name}.{state}") for state in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        check_output(final, overwrite=overwrite, holding=holding)
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        partial.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(final: Path, file: Path) -> Iterator[None]:
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one who held it may have removed it after it was opened here; another may hold a new one by now.
        if not (file.exists() and os.path.samestat(os.fstat(descriptor), file.stat())):
            raise BlockingIOError
    except BlockingIOError as error:
        os.close(descriptor)
        raise TangoError(f"another process is writing {final}", "wait for it, or name another --output") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def _os_errors(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TangoError(
                f"no space left on the disk of {final.parent}", "free some, or name another --output"
            ) from error
        raise TangoError(
            f"{final} cannot be written: {error.strerror or error}", "name an --output that you may write to"
        ) from error


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
