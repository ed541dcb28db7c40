"""Workers on the machines of a Ray cluster: one or several for each GPU, or one for each node where no node has any.

A worker gets its items ahead of the one that it works on, so it can decode the next. What a lost node had goes to the
others, at the end and one item at a time: an item that kills its worker then takes no other with it. Nodes that join
get workers, too.

Until a worker is ready, those that are loading get as many items as they can begin meanwhile. No item waits for them:
one that is ready and has nothing left to do gets what one of them had, which is then done without.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from tango_plugins import TangoError
from tango_runtime.util.errors import first_line

Item = TypeVar("Item")
Result = TypeVar("Result")
_Given = TypeVar("_Given", contravariant=True)
_Gives = TypeVar("_Gives", covariant=True)

#: Workers that an item may outlive, and that a place may lose before they say anything.
_LOSSES = 3

#: Seconds after which new nodes are looked for.
_LOOK_AGAIN = 5.0

#: The main module of an actor's process.
_RAY_MAIN = "default_worker.py"

#: Items whose results a worker owes at a time: with one more it does not wait for this process in between.
_OWED = 2


class QueueWorker(Protocol[_Given, _Gives]):
    """What works on a node.

    Attributes:
        early: Items that it can begin before it is loaded.
        depth: Items to give it before it is asked for the results of the first.
        busy: Seconds that it worked.
    """

    early: int
    depth: int
    busy: float

    def load(self) -> None:
        """Loads what it works with.

        Raises:
            TangoError: It cannot.
        """

    @property
    def description(self) -> str:
        """What it is, in one line, once it is loaded."""

    def add(self, item: _Given) -> None:
        """Takes an item."""

    def answer_next(self) -> Iterator[_Gives]:
        """The results of the item that was added first."""


@dataclass(frozen=True)
class Done(Generic[Item, Result]):
    """An item and its results, or None for one that was lost with its worker again and again."""

    item: Item
    results: list[Result] | None


class Pool(Generic[Item, Result]):
    """A cluster's workers.

    Args:
        open_worker: Called on a node with the number of workers there. It, items and results are pickled.
        on_open: Called with a worker's description.
        per_gpu: Workers that share a GPU.

    Attributes:
        busy: Seconds that all workers worked.
        workers: Number of workers that are ready.
    """

    def __init__(
        self,
        open_worker: Callable[[int], QueueWorker[Item, Result]],
        on_open: Callable[[str], None] = lambda description: None,
        per_gpu: int = 1,
    ) -> None:
        self.busy, self.workers, self._was_ready = 0.0, 0, 0.0
        self._open_worker, self._on_open, self._per_gpu = open_worker, on_open, per_gpu
        self._members: dict[_Place, _Member[Item]] = {}
        self._refusals: dict[_Place, int] = {}
        self._why: TangoError | None = None
        self._items: deque[Item] = deque()
        self._lost: deque[tuple[Item, int]] = deque()

    @property
    def ready(self) -> float:
        """Seconds that all workers were ready, added up; those of lost ones, too."""
        now = time.monotonic()
        return self._was_ready + sum(now - member.since for member in self._members.values() if member.is_ready)

    def run(self, items: Iterable[Item]) -> Iterator[Done[Item, Result]]:
        """Works on items; they are given back in the order in which they are done.

        Raises:
            TangoError: No worker is left, or none could be opened.
        """
        import ray

        self._items.extend(items)
        look_again = 0.0
        while True:
            if (self._items or self._lost) and (not self._members or time.monotonic() > look_again):
                self._start_workers()
                look_again = time.monotonic() + _LOOK_AGAIN
            if not (self._items or self._lost or any(member.items for member in self._members.values())):
                return
            waiting = {member.promises[0]: place for place, member in self._members.items() if member.promises}
            ready, _ = ray.wait(list(waiting), timeout=_LOOK_AGAIN)
            for promise in ready:
                yield from self._take(waiting[promise])

    def _take(self, place: _Place) -> Iterator[Done[Item, Result]]:
        """What a member has done, after which it gets more to do."""
        import ray

        member = self._members[place]
        try:
            reply = ray.get(member.promises.popleft())
        except ray.exceptions.RayTaskError:  # the worker's own
            raise
        except ray.exceptions.RayError as error:  # RayActorError, or that it was killed for memory, or has no node
            yield from self._lose(place, error)
            return
        if isinstance(reply, TangoError):  # it cannot be opened there
            self._why, self._refusals[place] = reply, _LOSSES
            self._do_without(place)
        elif not member.depth:
            early, member.depth = reply
            if not self.workers:
                self._give(member, early)
            member.promises.append(member.actor.load.remote())
        elif not member.is_ready:
            member.is_ready, member.since = True, time.monotonic()
            self.workers += 1
            self._on_open(reply)
            self._feed(member)
        else:
            results, busy = reply
            self.busy += busy
            yield Done(member.items.popleft()[0], results)
            self._feed(member)

    def _give(self, member: _Member[Item], most: int) -> None:
        """Gives a member items until it has so many."""
        while self._items and len(member.items) < most:
            member.give(self._items.popleft(), 0)

    def _feed(self, member: _Member[Item]) -> None:
        """Gives a member that is ready items, and asks for the results of as many as it owes at a time."""
        self._give(member, member.depth + 1)
        if self._lost and not member.items:
            member.give(*self._lost.popleft())
        if not member.items:
            late = (place for place, other in self._members.items() if other.items and not other.is_ready)
            if (place := next(late, None)) is not None:
                self._do_without(place)
                self._give(member, member.depth + 1)
        while len(member.promises) < min(_OWED, len(member.items)):
            member.promises.append(member.actor.answer.remote())

    def _do_without(self, place: _Place) -> None:
        """Ends a worker that is not ready; nothing that it had is done."""
        member = self._members.pop(place)
        self._items.extendleft(item for item, _ in reversed(member.items))

    def _lose(self, place: _Place, error: Exception) -> Iterator[Done[Item, Result]]:
        """A member is gone: what it had is to be done by others."""
        member = self._members.pop(place)
        if member.is_ready:
            self.workers -= 1
            self._was_ready += time.monotonic() - member.since
        else:
            self._refusals[place] = self._refusals.get(place, 0) + 1
            self._why = TangoError(f"no worker could start: {first_line(error)}", "look for what ended it: ray status")
        for item, losses in member.items:
            if losses + 1 < _LOSSES:
                self._lost.append((item, losses + 1))
            else:
                yield Done(item, None)
        for other in [other for other in self._members.values() if other.is_ready]:  # which may be idle
            self._feed(other)

    def _start_workers(self) -> None:
        """Starts workers in the places that have none.

        Raises:
            TangoError: There are none to start, and none at work.
        """
        for place in _places(self._per_gpu):
            if place not in self._members and self._refusals.get(place, 0) < _LOSSES:
                self._members[place] = _Member(place.start(self._open_worker))
        if not self._members:
            raise self._why or TangoError("the Ray cluster has no node to work on", "start one: ray start --address …")


@dataclass(frozen=True)
class _Place:
    """Where a worker can be: a GPU of a node, a share of one, or a node."""

    node: str
    number: int
    of: int
    resources: tuple[tuple[str, float], ...] = field(compare=False)

    def start(self, open_worker: Callable[[int], Any]) -> Any:
        """Starts a worker here; it is not waited for."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(node_id=self.node, soft=False)
        actor = ray.remote(_Actor).options(scheduling_strategy=here, **dict(self.resources))
        return actor.remote(open_worker, self.of)


class _Member(Generic[Item]):
    """A worker, as this process sees it.

    Attributes:
        actor: The actor.
        depth: Its depth, 0 until it has begun.
        is_ready: Whether it is loaded.
        since: When it was ready, of the monotonic clock.
        items: What it was given and has not done, with how often each was lost before.
        promises: Replies to come.
    """

    def __init__(self, actor: Any) -> None:
        self.actor, self.depth, self.is_ready, self.since = actor, 0, False, 0.0
        self.items: deque[tuple[Item, int]] = deque()
        self.promises: deque[Any] = deque([actor.begin.remote()])

    def give(self, item: Item, losses: int) -> None:
        """Gives it an item."""
        self.items.append((item, losses))
        self.actor.add.remote(item)


class _Actor:
    """A worker in a process of its own on a node."""

    def __init__(self, open_worker: Callable[[int], Any], of: int) -> None:
        self._open_worker, self._of = open_worker, of

    def begin(self) -> tuple[int, int] | TangoError:
        main = sys.modules["__main__"]  # which each process that a worker starts would import, and with it Ray
        if (getattr(main, "__file__", None) or "").endswith(_RAY_MAIN):
            del main.__file__
        try:
            self._worker = self._open_worker(self._of)
        except TangoError as error:
            return error
        return self._worker.early, self._worker.depth

    def load(self) -> str | TangoError:
        try:
            self._worker.load()
        except TangoError as error:
            return error
        description: str = self._worker.description
        return description

    def add(self, item: Any) -> None:
        self._worker.add(item)

    def answer(self) -> tuple[list[Any], float]:
        before = self._worker.busy
        return list(self._worker.answer_next()), self._worker.busy - before


def _places(per_gpu: int) -> list[_Place]:
    """Where workers can be, so many on each GPU, in the cluster as it is now."""
    import ray

    nodes = [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    gpus = {name: int(found.get("GPU", 0)) for name, found in nodes}
    if any(gpus.values()):
        one, counts = (("num_gpus", 1 / per_gpu), ("num_cpus", 0.0)), {name: n * per_gpu for name, n in gpus.items()}
        return [_Place(name, i, count, one) for name, count in counts.items() for i in range(count)]
    cores = {name: int(found.get("CPU", 0)) for name, found in nodes}
    return [_Place(name, 0, 1, (("num_cpus", float(count)),)) for name, count in cores.items() if count]


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connects to a cluster, or starts one on this machine for ``local``.

    Raises:
        TangoError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise TangoError("Ray is not installed", "pip install 'tango-edge[ray]'") from error
    quiet = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "include_dashboard": False if address == "local" else None,
    }
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise TangoError(
            f"there is no Ray cluster at {address} that takes this process",
            "give the address that ray start printed, or local; one that asks for a token needs RAY_AUTH_TOKEN_PATH",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
