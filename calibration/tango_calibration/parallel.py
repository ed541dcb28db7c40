"""Work on many items, spread over processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from tango_plugins import TangoError
from tango_runtime.util.console import OnProgress

#: Where the BLAS libraries that NumPy is built with look for their number of threads.
BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(
    open_worker: Callable[[], Callable[[Item], Result]], items: Sequence[Item], on_progress: OnProgress, *, jobs: int
) -> list[Result]:
    """Works on every item, in several processes with a worker of their own, or in this one where there is one job.

    Args:
        open_worker: Opens what works on an item; it, the items and the results are pickled.
        items: Each goes to the next process that is free.
        on_progress: Told how many more items are done.
        jobs: Processes.

    Returns:
        What the workers gave, in the order of the items.

    Raises:
        TangoError: A worker raised it, or a process has died.
    """
    results: dict[int, Result] = {}
    if jobs == 1:
        worker = open_worker()
        for i, item in enumerate(items):
            results[i] = worker(item)
            on_progress(1)
        return list(results.values())
    due = list(enumerate(items))[::-1]
    busy: dict[Connection, int] = {}
    with _processes(min(jobs, len(items)), open_worker) as free:
        while due or busy:
            for pipe in free[: len(due)]:
                busy[pipe], item = due.pop()
                pipe.send(item)
            free = [pipe for pipe in wait(list(busy)) if isinstance(pipe, Connection)]
            for pipe in free:
                results[busy.pop(pipe)] = _receive(pipe)
                on_progress(1)
    return [results[i] for i in range(len(items))]


@contextmanager
def _processes(count: int, open_worker: Callable[[], Callable[[Any], Any]]) -> Iterator[list[Connection]]:
    """Starts processes that answer each item sent to them with its result; ends them with the block."""
    context = get_context("spawn")  # a fork would share the threads' locks of an engine
    resource_tracker.ensure_running()  # else the first start does, and lets a ctrl-C through to that process
    pipes, processes = [], []
    try:
        for _ in range(count):
            here, there = context.Pipe()
            processes.append(context.Process(target=_work, args=(there, open_worker), daemon=True))
            with child_settings():
                processes[-1].start()
            there.close()
            pipes.append(here)
        yield pipes
    except (EOFError, ConnectionError) as error:
        raise TangoError("a process has died", "it may have lacked memory: use fewer --jobs") from error
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def child_settings() -> Iterator[None]:
    """A process that starts in here never sees a ctrl-C, since this one ends it, and its BLAS takes one core."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    before = {name: os.environ.get(name) for name in BLAS_THREADS}
    os.environ |= dict.fromkeys(BLAS_THREADS, "1")  # read when NumPy is loaded: there is no later way to say it
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
    try:
        worker = open_worker()
        while True:
            pipe.send((worker(pipe.recv()), None))
    except TangoError as error:
        pipe.send((None, (error.message, error.hint)))
    except EOFError:
        pass  # the one who asked is gone


def _receive(pipe: Connection) -> Any:
    result, error = pipe.recv()
    if error:
        raise TangoError(*error)
    return result
