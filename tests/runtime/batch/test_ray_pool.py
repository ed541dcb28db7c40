"""Which worker of a Ray cluster gets which item, and what becomes of those of a lost one; the cluster is a fake."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType

import pytest

from tango_plugins import TangoError
from tango_runtime.batch import ray_pool
from tango_runtime.batch.ray_pool import Pool, _Actor
from tests.fakes.ray_cluster import Cluster, OutOfMemoryError, RayActorError, RayTaskError


class Doubler:
    """Doubles numbers; 99 kills every node that works on it."""

    early, depth, busy, description = 1, 2, 0.0, "a doubler"
    cluster = None

    def __init__(self, of):
        self.items = []

    def load(self):
        pass

    def add(self, item):
        self.items.append(item)

    def answer_next(self):
        self.busy += 1
        item = self.items.pop(0)
        if item == 99:
            working = next(actor for actor in self.cluster.actors if actor.target._worker is self)
            self.cluster.alive.discard(working.node)
        yield 2 * item


@pytest.fixture
def cluster(monkeypatch):
    """``cluster(**nodes)``: a cluster, and a pool of doublers on it."""

    def make(per_gpu=1, **nodes):
        found = Cluster(**nodes)
        found.install(monkeypatch)
        monkeypatch.setattr(Doubler, "cluster", found)
        return found, Pool(Doubler, per_gpu=per_gpu)

    return make


def results(pool, items):
    return {done.item: done.results for done in pool.run(items)}


CORE = {"CPU": 1.0}


def test_every_item_is_done_once(cluster):
    found, pool = cluster(a=CORE, b=CORE)
    done = list(pool.run(range(20)))
    assert sorted((one.item, one.results) for one in done) == [(i, [2 * i]) for i in range(20)]
    assert (pool.workers, pool.busy) == (2, 20)
    assert [actor.node for actor in found.actors] == ["a", "b"]
    assert not any(actor.target._worker.items for actor in found.actors)


def test_workers_are_ready_from_when_they_are_open_until_they_are_lost(cluster, monkeypatch):
    now, answer = [0.0], Doubler.answer_next
    monkeypatch.setattr(ray_pool.time, "monotonic", lambda: now[0])

    def answer_in_a_second(worker):
        now[0] += 1
        return answer(worker)

    monkeypatch.setattr(Doubler, "answer_next", answer_in_a_second)
    _, pool = cluster(a=CORE, b=CORE)
    results(pool, range(20))  # the fake works on one item at a time
    assert (pool.busy, pool.ready) == (20, 40)
    now[0] += 5
    assert pool.ready == 50

    _, pool = cluster(a=CORE, b=CORE)
    with pytest.raises(TangoError, match="no node"):
        results(pool, [1, 2, 99])  # lost with the first worker, and then with the second
    assert (pool.busy, pool.ready) == (2, 3 + 4)
    now[0] += 100
    assert pool.ready == 3 + 4


def test_each_gpu_has_a_worker_and_else_each_node(cluster):
    found, pool = cluster(a={"CPU": 8.0, "GPU": 2.0}, b={"CPU": 8.0})
    results(pool, range(4))
    assert [(actor.node, actor.resources) for actor in found.actors] == [("a", {"num_gpus": 1.0, "num_cpus": 0.0})] * 2
    found, pool = cluster(a={}, b={"CPU": 4.0})
    results(pool, range(4))
    assert [(actor.node, actor.resources) for actor in found.actors] == [("b", {"num_cpus": 4.0})]


def test_several_workers_share_a_gpu(cluster):
    found, pool = cluster(per_gpu=2, a={"GPU": 2.0})
    assert results(pool, range(40)) == {i: [2 * i] for i in range(40)}
    assert [actor.resources for actor in found.actors] == [{"num_gpus": 0.5, "num_cpus": 0.0}] * 4


@pytest.mark.parametrize("error", [RayActorError, OutOfMemoryError])
def test_what_a_lost_node_had_is_done_by_another(cluster, error):
    found, pool = cluster(a=CORE, b=CORE)
    found.error = error
    done = {}
    for one in pool.run(range(20)):
        done[one.item] = one.results
        if len(done) == 5:
            found.alive.discard("b")
    assert done == {i: [2 * i] for i in range(20)}
    assert pool.workers == 1


def test_an_item_that_kills_its_workers_takes_no_other_with_it(cluster):
    found, pool = cluster(**dict.fromkeys("abcd", CORE))
    assert results(pool, [*range(10), 99, *range(10, 20)]) == {99: None} | {i: [2 * i] for i in range(20)}
    assert len(found.alive) == 1


def run_while_a_node_joins(found, pool):
    """Twenty items, with a node more after the third."""
    for one in pool.run(range(20)):
        if one.item == 2:
            found.resources["late"] = CORE
            found.alive.add("late")


def test_a_node_that_joins_is_used(cluster, monkeypatch):
    monkeypatch.setattr("tango_runtime.batch.ray_pool._LOOK_AGAIN", 0.0)
    found, pool = cluster(a=CORE)
    run_while_a_node_joins(found, pool)
    assert {actor.node for actor in found.actors} == {"a", "late"}
    assert pool.workers == 2


def test_no_node_left_is_an_error(cluster):
    found, pool = cluster(a=CORE)
    done = pool.run(range(20))
    assert next(done).item == 0
    found.alive.clear()
    with pytest.raises(TangoError, match="no node to work on"):
        list(done)
    with pytest.raises(TangoError, match="no node to work on"):
        results(cluster()[1], [1])
    assert results(cluster()[1], []) == {}


def test_a_worker_that_cannot_be_opened_is_an_error_where_none_can(cluster, monkeypatch):
    def refuse(doubler, of):
        raise TangoError("there is no bundle", "copy it")

    monkeypatch.setattr(Doubler, "__init__", refuse)
    with pytest.raises(TangoError, match="there is no bundle"):
        results(cluster(a=CORE, b=CORE)[1], [1])


@pytest.fixture
def events(monkeypatch):
    """What workers do, in order: each one's node, and the item that it is given or the word ``load``."""
    found, add, load = [], Doubler.add, Doubler.load

    def note(doubler, event):
        actors = doubler.cluster.actors
        found.append((next(actor.node for actor in actors if actor.target._worker is doubler), event))

    monkeypatch.setattr(Doubler, "add", lambda doubler, item: (note(doubler, item), add(doubler, item)))
    monkeypatch.setattr(Doubler, "load", lambda doubler: (note(doubler, "load"), load(doubler)))
    return found


def test_a_worker_has_items_before_it_is_loaded(cluster, monkeypatch, events):
    monkeypatch.setattr(Doubler, "early", 2)
    assert results(cluster(a=CORE, b=CORE)[1], range(20)) == {i: [2 * i] for i in range(20)}
    assert events[:6] == [("a", 0), ("a", 1), ("a", "load"), ("b", 2), ("b", 3), ("b", "load")]


def test_a_worker_that_comes_late_has_none_before_it_is_loaded(cluster, monkeypatch, events):
    monkeypatch.setattr("tango_runtime.batch.ray_pool._LOOK_AGAIN", 0.0)
    found, pool = cluster(a=CORE)
    run_while_a_node_joins(found, pool)
    assert next(event for node, event in events if node == "late") == "load"


def test_what_a_refusing_worker_had_is_done_by_another(cluster, monkeypatch):
    """It does not count as lost, so it is not left for the end."""
    load = Doubler.load

    def refuse(doubler):
        load(doubler)
        if doubler.items[:1] == [0]:  # the first that began
            raise TangoError("there is no GPU", "see: tango doctor")

    monkeypatch.setattr(Doubler, "load", refuse)
    found, pool = cluster(a=CORE, b=CORE)
    done = list(pool.run(range(8)))
    assert sorted((one.item, one.results) for one in done) == [(i, [2 * i]) for i in range(8)]
    assert [one.item for one in done].index(0) < 7
    assert pool.workers == 1
    assert len(found.actors) == 2


def test_workers_that_all_refuse_are_an_error_that_says_why(cluster, monkeypatch):
    def refuse(doubler):
        raise TangoError("there is no GPU", "see: tango doctor")

    monkeypatch.setattr(Doubler, "load", refuse)
    with pytest.raises(TangoError, match="there is no GPU"):
        results(cluster(a=CORE, b=CORE)[1], range(8))


def test_what_a_worker_had_that_died_while_loading_is_done_by_another(cluster, monkeypatch):
    def load(doubler):
        if doubler.items[:1] == [0]:
            doubler.cluster.alive.discard("a")

    monkeypatch.setattr(Doubler, "load", load)
    _, pool = cluster(a=CORE, b=CORE)
    done = list(pool.run(range(8)))
    assert sorted((one.item, one.results) for one in done) == [(i, [2 * i]) for i in range(8)]
    assert [one.item for one in done][-1] == 0
    assert pool.workers == 1


def test_workers_that_die_while_loading_are_an_error_that_says_why(cluster, monkeypatch):
    def killed(doubler):
        raise OutOfMemoryError("the node ran low on memory\nmore")

    monkeypatch.setattr(Doubler, "load", killed)
    found, pool = cluster(a=CORE, b=CORE)
    with pytest.raises(TangoError, match=r"no worker could start: the node ran low on memory \(look for"):
        results(pool, range(8))
    assert len(found.actors) == 6


def test_no_item_waits_for_a_worker_that_is_loading(cluster, monkeypatch):
    """It is done without when another has nothing left to do; nor is the end held up by one without items."""
    found, pool = cluster(a=CORE, b=CORE, c=CORE)
    wait = sys.modules["ray"].wait

    def slow(calls, timeout):
        """``b`` begins and never is ready, ``c`` does not even begin."""
        others = [call for call in calls if call.actor.node == "a" or (call.actor.node, call.name) == ("b", "begin")]
        return wait(others, timeout)

    monkeypatch.setattr(sys.modules["ray"], "wait", slow)
    done = list(pool.run(range(8)))
    assert sorted((one.item, one.results) for one in done) == [(i, [2 * i]) for i in range(8)]
    assert pool.workers == 1
    assert [actor.node for actor in found.actors] == ["a", "b", "c"]


def test_workers_that_cannot_start_are_an_error_that_says_why(cluster, monkeypatch):
    def killed(doubler, of):
        raise OutOfMemoryError("the node ran low on memory\nmore")

    monkeypatch.setattr(Doubler, "__init__", killed)
    with pytest.raises(TangoError, match=r"no worker could start: the node ran low on memory \(look for"):
        results(cluster(a=CORE, b=CORE)[1], [1])


def test_an_error_of_a_worker_itself_is_not_taken_for_its_loss(cluster, monkeypatch):
    def wrong(doubler):
        raise RayTaskError("a fault of the program")

    monkeypatch.setattr(Doubler, "answer_next", wrong)
    with pytest.raises(RayTaskError):
        results(cluster(a=CORE, b=CORE)[1], [1])


@pytest.mark.parametrize(("main", "kept"), [("/ray/workers/default_worker.py", False), ("/home/me/program.py", True)])
def test_processes_of_a_worker_do_not_import_ray(monkeypatch, main, kept):
    """As they would with the main module of an actor's process; any other stays as it is."""
    module = ModuleType("__main__")
    module.__file__ = main
    monkeypatch.setitem(sys.modules, "__main__", module)
    assert _Actor(Doubler, 1).begin() == (Doubler.early, Doubler.depth)
    assert hasattr(module, "__file__") == kept


def test_an_error_is_pickled_with_its_hint():
    error = pickle.loads(pickle.dumps(TangoError("what", "how")))
    assert (error.message, error.hint) == ("what", "how")
