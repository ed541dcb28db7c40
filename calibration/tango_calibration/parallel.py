"""Functions applied to many items: in this process, or spread over several."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from typing import Any, TypeVar

from tango_plugins import TangoError
from tango_runtime.batch.ray_pool import Pool, connected
from tango_runtime.util.console import progress
from tango_runtime.util.processes import Child

Item = TypeVar("Item")
Result = TypeVar("Result")
OnResult = Callable[[Item, Result], object]


def map_with_progress(title: str, function: Callable[..., Result], *arguments: Sequence[Any]) -> list[Result]:
    """Maps a function over one or several sequences of equal length, with a progress bar."""
    results = []
    with progress(title, len(arguments[0])) as on_progress:
        for items in zip(*arguments, strict=True):
            results.append(function(*items))
            on_progress(1)
    return results


def map_in_parallel(
    open_worker: Callable[[], Callable[[Item], Result]],
    items: Sequence[Item],
    on_result: OnResult[Item, Result],
    *,
    jobs: int,
    ray: str | None = None,
) -> list[Result]:
    """Maps a worker over items with :func:`map_in_processes`, or with :func:`map_on_ray` if an address is given."""
    if ray is None:
        return map_in_processes(open_worker, items, on_result, jobs=jobs)
    return map_on_ray(open_worker, items, on_result, ray)


def threads_of(jobs: int, ray: str | None) -> int:
    """Threads of one operator on a CPU in each worker; 0 stands for one per core."""
    return int(jobs > 1 and ray is None)


def map_in_processes(
    open_worker: Callable[[], Callable[[Item], Result]],
    items: Sequence[Item],
    on_result: OnResult[Item, Result],
    *,
    jobs: int,
) -> list[Result]:
    """Maps a worker over items in several processes, each of which opens a worker once.

    Args:
        open_worker: Opens a worker. It, the items and the results are pickled.
        items: Each goes to the next idle process.
        on_result: Called in this process with each item and its result, in the order of completion.
        jobs: Number of processes; 1 uses this process.

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
            on_result(item, results[i])
        return list(results.values())
    waiting = list(enumerate(items))[::-1]
    busy: dict[Any, tuple[Child, int]] = {}
    with _children(min(jobs, len(items)), open_worker) as idle:
        while waiting or busy:
            for child in idle[: len(waiting)]:
                i, item = waiting.pop()
                busy[child.pipe] = child, i
                child.send(item)
            idle = []
            for pipe in wait(list(busy)):
                child, i = busy.pop(pipe)
                results[i] = child.receive()
                idle.append(child)
                on_result(items[i], results[i])
    return [results[i] for i in range(len(items))]


def map_on_ray(
    open_worker: Callable[[], Callable[[Item], Result]],
    items: Sequence[Item],
    on_result: OnResult[Item, Result],
    address: str,
) -> list[Result]:
    """As :func:`map_in_processes`, on the nodes of a Ray cluster.

    Items of a lost node go to another one.

    Args:
        open_worker: Opens a worker on a node.
        items: Each goes to the next idle worker.
        on_result: Called in this process with each item and its result, in the order of completion.
        address: Address of the cluster, or ``local``.

    Raises:
        TangoError: A worker raised it, there is no cluster or no node left, or an item was lost repeatedly.
    """
    results: dict[int, Result] = {}
    pool: Pool[tuple[int, Any], Result | TangoError] = Pool(partial(_Mapper, open_worker))
    with connected(address):
        for done in pool.run(enumerate(items)):
            if done.results is None:
                raise TangoError("the workers that had an item died", "look for what ended them: dmesg, ray status")
            (result,) = done.results
            if isinstance(result, TangoError):
                raise result
            results[done.item[0]] = result
            on_result(done.item[1], result)
    return [results[i] for i in range(len(items))]


class _Mapper:
    """Applies a function to the items of a pool, one by one."""

    early, depth, busy, description = 0, 1, 0.0, ""

    def __init__(self, open_worker: Callable[[], Callable[[Any], Any]], of: int) -> None:
        self._open_worker, self._items = open_worker, deque[Any]()

    def load(self) -> None:
        self._function = self._open_worker()

    def add(self, item: tuple[int, Any]) -> None:
        self._items.append(item[1])

    def answer_next(self) -> Iterator[Any]:
        try:
            yield self._function(self._items.popleft())
        except TangoError as error:
            yield error


@contextmanager
def _children(count: int, open_worker: Callable[[], Callable[[Any], Any]]) -> Iterator[list[Child]]:
    """Starts processes, and kills them at the end of the block."""
    children: list[Child] = []
    try:
        for _ in range(count):
            children.append(Child(open_worker))
        yield list(children)
    except (EOFError, ConnectionError) as error:
        raise TangoError("a process has died", "it may have run out of memory: use fewer --jobs") from error
    finally:
        for child in children:
            child.kill()
