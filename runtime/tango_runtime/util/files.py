"""Output that is written aside and renamed at the end, so that no reader ever sees half of it.

- :func:`staged_folder`: a folder that one process writes; a second one is refused.
- :func:`staged_file`: a file that several processes may want; one writes, the others wait.
- :func:`atomic_write`: one file, in one call.
- :class:`AppendedFile`: the exception, a file of lines that is gone on with, whatever ended the process before.

``check_…`` reject, before any work, what would fail or do harm at its end. :func:`is_plain_name` and
:func:`require_links_inside` hold the names in a stranger's folder inside it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tango_plugins import TangoError
from tango_runtime.util.units import megabytes


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
        TangoError: It exists, and is not to be replaced or has no file ``holding``; or its path is not UTF-8.
    """
    with _os_errors(final):
        require_utf8(_real(final))
        if not os.path.lexists(final):
            return
        if not overwrite:
            raise TangoError(f"{final} already exists", "choose another folder, or add --overwrite")
        if not (final / holding).is_file():
            raise TangoError(
                f"{final} has no {holding}",
                "--overwrite only replaces the output of this command: choose another folder",
            )


def check_file(path: Path) -> None:
    """Rejects an output file that :func:`atomic_write` could not write, before any work is done for it.

    Raises:
        TangoError: It is a folder or a named pipe, or no file can be made in its folder.
    """
    if "\0" in str(path):
        raise TangoError(f"the path {str(path)!r} has a NUL in it", "choose another file")
    with _os_errors(path):
        if path.is_dir():
            raise TangoError(f"{path} is a folder", "give a file in it")
        if os.path.lexists(path) and stat.S_ISFIFO(path.lstat().st_mode):  # to open it may wait for a reader forever
            raise TangoError(f"{path} is a named pipe", "give a file, or /dev/stdout and a pipe after the command")
        if _is_device(path):
            return
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # fails for a link that leads to itself
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise TangoError(f"there is no folder {folder}", "create it, or choose another file")
        with tempfile.TemporaryFile(dir=folder):
            pass


def check_apart(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Rejects outputs that would replace what is read, or one another.

    Args:
        outputs: Files and folders to be written, by what to call them; None is left out.
        inputs: Files and folders that are read.

    Raises:
        TangoError: An output is, or holds, an input or another output; or it is a file of an input's folder.
    """
    written = {name: _real(path) for name, path in outputs.items() if path is not None and not _is_device(path)}
    read = {name: _real(path) for name, path in inputs.items() if path is not None and path.exists()}
    for name, path in written.items():
        for other, place in (written | read).items():
            replaced = place.is_relative_to(path) or (path.is_file() and path.is_relative_to(place))
            if other != name and replaced:
                raise TangoError(f"{name} {outputs[name]} would replace {other}", f"choose another path for {name}")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _is_device(path: Path) -> bool:
    """Whether a path is something that a rename would spoil: a device, or a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def require_utf8(path: Path) -> None:
    """Rejects a path that libraries written in other languages cannot open.

    Raises:
        TangoError: It is not valid UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise TangoError(f"the path {path} is not valid UTF-8", "rename it, or choose another") from error


def is_plain_name(name: object) -> bool:
    """Whether a name that was read from a file is that of a file in one folder, and can lead nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(c in name for c in "/\\\0")


def require_links_inside(folder: Path) -> None:
    """Rejects a folder with a symbolic link to somewhere else.

    Raises:
        TangoError: There is one; the message names it.
    """
    root = _real(folder)
    for path in folder.rglob("*"):
        if path.is_symlink() and not _real(path).is_relative_to(root):
            raise TangoError(
                f"{path} is a link that leads outside of {folder}", f"if you trust it: cp -rL {folder} COPY"
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
    a rename would replace it. A named pipe has to have its reader already.

    Args:
        path: The file.
        write: Writes the content to the binary stream that it is given.

    Raises:
        TangoError: The file cannot be written.
    """
    try:
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            # Without O_NONBLOCK, to open a named pipe that nobody reads would wait forever.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o666)
            os.set_blocking(descriptor, True)
            with os.fdopen(descriptor, "wb") as stream:
                write(stream)
            return
        with staged_file(path) as (partial, _):
            with partial.open("wb") as stream:
                write(stream)
            partial.replace(path)
    except OSError as error:
        raise _os_error(path, error) from error


class AppendedFile:
    """A file of lines to which one process appends, and which holds whole lines only.

    A line is there once :meth:`append` has returned, even if the process is then killed. Half a line that a killed
    process left is cut off when the file is opened; half of one that a full disk took is cut off at once.

    Args:
        path: The file; it is made if there is none.
        begins: What each of its lines begins with: a last line without an end that begins otherwise is not cut off.

    Raises:
        TangoError: It is no regular file or cannot be written, another process appends to it, or its last line has no
            end and is none of those that are appended here.
    """

    def __init__(self, path: Path, begins: bytes) -> None:
        check_file(path)
        if _is_device(path):
            raise TangoError(f"{path} is not a file that can be gone on with", "give the path of a file")
        self.path = path
        with _os_errors(path):
            try:
                self._descriptor = _try_lock(path)
            except BlockingIOError as error:
                raise TangoError(f"another process is writing {path}", "wait for it, or choose another file") from error
            try:
                self._end = self._cut_half_line(begins)
            except BaseException:
                self.close()
                raise

    def lines(self) -> Iterator[bytes]:
        """The lines that are there."""
        with self.path.open("rb") as stream:
            yield from stream

    def append(self, line: bytes) -> None:
        """Adds a line, which ends with a newline.

        Raises:
            TangoError: It cannot be written; the file is as before. Or someone else removed or changed the file.
        """
        with _os_errors(self.path):
            found = os.fstat(self._descriptor)
            if not found.st_nlink or found.st_size != self._end:
                done = "changed" if found.st_nlink else "removed"
                hint = "run it again, and keep other programs from the file"
                raise TangoError(f"{self.path} was {done} while it was written", hint)
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.pwrite(self._descriptor, rest, self._end + len(line) - len(rest)) :]
            except BaseException:  # an interrupt, too, may come in the middle of a line
                os.ftruncate(self._descriptor, self._end)
                raise
        self._end += len(line)

    def clear(self) -> None:
        """Removes all lines."""
        with _os_errors(self.path):
            os.ftruncate(self._descriptor, 0)
        self._end = 0

    def close(self) -> None:
        """Lets other processes append."""
        os.close(self._descriptor)

    def __enter__(self) -> AppendedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _cut_half_line(self, begins: bytes) -> int:
        """Cuts off what follows the last newline; returns the size that is left."""
        size = end = os.fstat(self._descriptor).st_size
        tail = b""
        while end and b"\n" not in tail:
            step = min(end, 1 << 16)
            end -= step
            tail = os.pread(self._descriptor, step, end) + tail
        half = tail.rpartition(b"\n")[2]
        whole = size - len(half)
        if half:
            ours = half.strip(b"\0")  # which a power cut may leave in the place of what was on its way to the disk
            if not (ours.startswith(begins) or begins.startswith(ours)):
                raise TangoError(f"the last line of {self.path} has no end", "choose another file, or end the line")
            os.ftruncate(self._descriptor, whole)
        return whole


def require_space(folder: Path, needed: int) -> None:
    """Checks that a disk has enough free space.

    Args:
        folder: The folder that is being written.
        needed: Bytes that will be written.

    Raises:
        TangoError: Less is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TangoError(
            f"no space left: the bundle needs {megabytes(needed, 1)}, {folder.parent} has {megabytes(free, 1)} free",
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
        if not _is_at(descriptor, file):
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(file))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file still has its name, which another process may take away at any moment."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


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
