"""Processes that do one piece of work after the other for this one.

A ``ProcessPoolExecutor`` cannot be ended at once. It waits for running items, which take minutes here. If its children
are killed and one was sending a result, it waits forever, since they share one pipe whose other end it keeps open.
Here each child has a pipe of its own, so a dead child is the end of its file.

Large arrays of a result are handed over in memory without a name: the child writes them there once, and this process
sees them in place. Through the pipe, a video's frames took 8 ms of this process, most of them with Python's lock held.
Nothing is left of such memory when a process is killed.
"""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, reduction, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from tango_plugins import TangoError

#: Where the BLAS libraries that NumPy is built with read their number of threads.
BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

#: Bytes from which on an array of a result is handed over in memory of its own.
_LARGE = 1 << 16

#: Arrays in such memory begin at multiples of this many bytes.
_ALIGNMENT = 64


class Child:
    """A process that applies a function to each item that it is sent; it ends with this process.

    Args:
        open_worker: Called in the process, gives the function. It, the items and the results are pickled.

    Attributes:
        pipe: Readable when there is something to receive, for ``multiprocessing.connection.wait``.
    """

    def __init__(self, open_worker: Callable[[], Callable[[Any], Any]]) -> None:
        context = get_context("spawn")  # a fork would copy the locks of ONNX Runtime's threads
        resource_tracker.ensure_running()  # otherwise the first spawn starts it, which unblocks SIGINT for that child
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, open_worker), daemon=True)
        with child_settings():
            self._process.start()
        theirs.close()

    def send(self, item: Any) -> None:
        """Gives it an item.

        Raises:
            ConnectionError: It is dead.
        """
        self.pipe.send(item)

    def receive(self) -> Any:
        """Waits for the next result.

        Raises:
            TangoError: The function raised it, or there is no memory for its result.
            EOFError, ConnectionError: The process is dead.
            OSError: This process has no memory or no descriptor left; nothing more can be received.
        """
        result, error = _receive(self.pipe)
        if error:
            raise TangoError(*error)
        return result

    def kill(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.join()


@contextmanager
def child_settings() -> Iterator[None]:
    """Processes that start in this block ignore ctrl-C, since their parent ends them, and use one BLAS thread."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    before = {name: os.environ.get(name) for name in BLAS_THREADS}
    os.environ |= dict.fromkeys(BLAS_THREADS, "1")  # BLAS reads it once, when NumPy is imported
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _work(pipe: Connection, open_worker: Callable[[], Callable[[Any], Any]]) -> None:
    with suppress(EOFError, ConnectionError):  # the parent has closed its end
        try:
            worker = open_worker()
            while True:
                item = pipe.recv()
                reply: tuple[Any, tuple[str, str] | None]
                try:
                    reply = worker(item), None
                except TangoError as error:
                    reply = None, (error.message, error.hint)
                try:
                    _send(pipe, reply)
                except ConnectionError:
                    raise
                except OSError as error:  # without memory or descriptors, the next result may still find some
                    message = f"a result cannot be handed over in memory: {error.strerror}"
                    _send(pipe, (None, (message, "see the limits and what is free: ulimit -a; free -m")))
        except TangoError as error:
            _send(pipe, (None, (error.message, error.hint)))


def _send(pipe: Connection, reply: Any) -> None:
    """Sends an object; large arrays in it follow as a file descriptor of the memory that they are in."""
    large: list[memoryview] = []

    def in_pickle(buffer: pickle.PickleBuffer) -> bool:
        if (raw := buffer.raw()).nbytes < _LARGE:
            return True
        large.append(raw)
        return False

    pickled = pickle.dumps(reply, protocol=5, buffer_callback=in_pickle)
    sizes = [buffer.nbytes for buffer in large]
    if not large:
        pipe.send((pickled, sizes))
        return
    with os.fdopen(os.memfd_create("tango"), "wb") as memory:
        for buffer in large:
            memory.write(buffer)
            memory.write(bytes(-buffer.nbytes % _ALIGNMENT))
        memory.flush()
        pipe.send((pickled, sizes))  # only now: nothing but the descriptor may come after it
        reduction.send_handle(pipe, memory.fileno(), 0)


def _receive(pipe: Connection) -> Any:
    """What :func:`_send` sent; its large arrays keep their memory, which ends with the last of them."""
    pickled, sizes = pipe.recv()
    if not sizes:
        return pickle.loads(pickled)
    begins = [0]
    for size in sizes:
        begins.append(begins[-1] + size + -size % _ALIGNMENT)
    try:
        descriptor = reduction.recv_handle(pipe)
    except RuntimeError as error:  # what Python says where this process has no descriptor left for it
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from error
    try:
        memory = memoryview(mmap.mmap(descriptor, begins[-1]))
    finally:
        os.close(descriptor)
    buffers = [memory[begin : begin + size] for begin, size in zip(begins, sizes, strict=False)]
    return pickle.loads(pickled, buffers=buffers)
