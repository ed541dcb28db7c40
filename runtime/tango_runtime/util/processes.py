"""Processes that do one piece of work after the other for this one.

A ``ProcessPoolExecutor`` cannot be ended at once. It waits for running items, which take minutes here. If its children
are killed and one was sending a result, it waits forever, since they share one pipe whose other end it keeps open.
Here each child has a pipe of its own, so a dead child is the end of its file.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from tango_plugins import TangoError

#: Where the BLAS libraries that NumPy is built with read their number of threads.
BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


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
            TangoError: The function raised it.
            EOFError, ConnectionError: The process is dead.
        """
        result, error = self.pipe.recv()
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
                pipe.send(reply)
        except TangoError as error:
            pipe.send((None, (error.message, error.hint)))
