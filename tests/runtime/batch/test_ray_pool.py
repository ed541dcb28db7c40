"""Which worker of a Ray cluster gets which item, and what becomes of those of a lost one; the cluster is a fake."""

from __future__ import annotations

import pickle

import pytest

from tango_plugins import TangoError
from tango_runtime.batch import ray_pool
from tango_runtime.batch.ray_pool import Pool
from tests.fakes.ray_cluster import Cluster, OutOfMemoryError, RayActorError, RayTaskError


class Doubler:
    """Doubles numbers; 99 kills every node that works on it."""

    depth, busy, description = 2, 0.0, "a doubler"
    cluster = None

    def __init__(self, of):
        self.items, self.most = [], 0

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
    results(pool, range(20))  # the fake works on one item at a time, and opens the second worker after them
    assert (pool.busy, pool.ready) == (20, 20)
    now[0] += 5
    assert pool.ready == 30

    _, pool = cluster(a=CORE, b=CORE)
    with pytest.raises(TangoError, match="no node"):
        results(pool, [1, 2, 99])  # lost with the first worker, and then with the second
    assert (pool.busy, pool.ready) == (2, 4)
    now[0] += 100
    assert pool.ready == 4


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


def test_a_node_that_joins_is_used(cluster, monkeypatch):
    monkeypatch.setattr("tango_runtime.batch.ray_pool._LOOK_AGAIN", 0.0)
    found, pool = cluster(a=CORE)
    for one in pool.run(range(20)):
        if one.item == 2:
            found.resources["late"] = CORE
            found.alive.add("late")
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


def test_an_error_is_pickled_with_its_hint():
    error = pickle.loads(pickle.dumps(TangoError("what", "how")))
    assert (error.message, error.hint) == ("what", "how")
