"""Functions applied to many items: in this process, or spread over several.

A ``ProcessPoolExecutor`` cannot be ended at once. It waits for running items, which take minutes here. If its children
are killed and one was sending a result, it waits forever, since they share one pipe whose other end it keeps open.
Here each child has a pipe of its own, so a dead child is the end of its file.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from tango_plugins import TangoError
from tango_runtime.util.console import OnProgress, progress

#: Where the BLAS libraries that NumPy is built with read their number of threads.
BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_with_progress(title: str, function: Callable[..., Result], *arguments: Sequence[Any]) -> list[Result]:
    """Maps a function over one or several sequences of equal length, and shows how much is done."""
    results = []
    with progress(title, len(arguments[0])) as on_progress:
        for items in zip(*arguments, strict=True):
            results.append(function(*items))
            on_progress(1)
    return results


def map_in_processes(
    open_worker: Callable[[], Callable[[Item], Result]], items: Sequence[Item], on_progress: OnProgress, *, jobs: int
) -> list[Result]:
    """Maps a worker over items, in several processes that each open a worker once.

    Args:
        open_worker: Opens a worker. It, the items and the results are pickled.
        items: Each goes to the next idle process.
        on_progress: Called with the number of items done since the last call.
        jobs: Number of processes; 1 works in this process.

    Returns:
        The results in the order of the items.

    Raises:
        TangoError: A worker raised it, or a process died.
    """
    results: dict[int, Result] = {}
    if jobs == 1:
        worker = open_worker()
        for i, item in enumerate(items):
            results[i] = worker(item)
            on_progress(1)
        return list(results.values())
    waiting = list(enumerate(items))[::-1]
    busy: dict[Connection, int] = {}
    with _processes(min(jobs, len(items)), open_worker) as idle:
        while waiting or busy:
            for pipe in idle[: len(waiting)]:
                busy[pipe], item = waiting.pop()
                pipe.send(item)
            idle = [pipe for pipe in wait(list(busy)) if isinstance(pipe, Connection)]
            for pipe in idle:
                results[busy.pop(pipe)] = _receive(pipe)
                on_progress(1)
    return [results[i] for i in range(len(items))]


@contextmanager
def _processes(count: int, open_worker: Callable[[], Callable[[Any], Any]]) -> Iterator[list[Connection]]:
    """Starts processes that answer each item sent to them with its result; ends them with the block."""
    context = get_context("spawn")  # a fork would copy the locks of ONNX Runtime's threads
    resource_tracker.ensure_running()  # otherwise the first spawn starts it, which unblocks SIGINT for that child
    pipes, processes = [], []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_work, args=(theirs, open_worker), daemon=True))
            with child_settings():
                processes[-1].start()
            theirs.close()
            pipes.append(ours)
        yield pipes
    except (EOFError, ConnectionError) as error:
        raise TangoError("a process has died", "it may have run out of memory: use fewer --jobs") from error
    finally:
        for process in processes:
            process.kill()
            process.join()


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
    try:
        worker = open_worker()
        while True:
            pipe.send((worker(pipe.recv()), None))
    except TangoError as error:
        pipe.send((None, (error.message, error.hint)))
    except EOFError:
        pass  # the parent has closed its end


def _receive(pipe: Connection) -> Any:
    result, error = pipe.recv()
    if error:
        raise TangoError(*error)
    return result
