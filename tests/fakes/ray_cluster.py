"""A Ray cluster in this process: its actors work when their results are taken, and die when they are told to.

Those whose results are waited for take turns.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class RayTaskError(RayError):
    pass


class OutOfMemoryError(RayError):
    """Ray killed an actor where its node's memory ran out; it is no RayActorError."""


class Cluster:
    """Stands in for the module ``ray``.

    Args:
        nodes: Name of each node → its resources.

    Attributes:
        error: What calls of a dead actor raise.
    """

    error = RayActorError

    def __init__(self, **nodes):
        self.resources, self.alive, self.actors = nodes, set(nodes), []

    def install(self, monkeypatch):
        ray = ModuleType("ray")
        ray.remote, ray.nodes, ray.wait, ray.get = self._remote, self._nodes, self._wait, lambda call: call()
        ray.init, ray.shutdown = lambda **options: None, lambda: None
        ray.exceptions = SimpleNamespace(
            RayError=RayError, RayActorError=RayActorError, RayTaskError=RayTaskError, OutOfMemoryError=OutOfMemoryError
        )
        strategies = ModuleType("ray.util.scheduling_strategies")
        strategies.NodeAffinitySchedulingStrategy = SimpleNamespace
        for name, module in (("ray", ray), ("ray.util", ModuleType("util")), (strategies.__name__, strategies)):
            monkeypatch.setitem(sys.modules, name, module)

    def _nodes(self):
        return [
            {"NodeID": name, "Resources": found, "Alive": name in self.alive} for name, found in self.resources.items()
        ]

    def _wait(self, calls, timeout):
        first = min(calls, key=lambda call: call.actor.taken)
        return [first], [call for call in calls if call is not first]

    def _remote(self, kind):
        def options(scheduling_strategy, **resources):
            def start(*arguments):
                actor = Actor(self, scheduling_strategy.node_id, resources, kind(*arguments))
                self.actors.append(actor)
                return actor

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)


class Actor:
    """An actor; its calls are made in their order, each when it or a later one is taken."""

    def __init__(self, cluster, node, resources, target):
        self.cluster, self.node, self.resources, self.target = cluster, node, resources, target
        self.calls, self.taken = [], 0

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *arguments: self._call(name, arguments))

    def _call(self, name, arguments):
        call = Call(self, name, arguments)
        self.calls.append(call)
        return call


class Call:
    def __init__(self, actor, name, arguments):
        self.actor, self.name, self.arguments = actor, name, arguments

    def __call__(self):
        calls = self.actor.calls
        self.actor.taken += 1
        while self in calls:
            call = calls.pop(0)
            if self.actor.node not in self.actor.cluster.alive:
                raise self.actor.cluster.error
            call.result = getattr(self.actor.target, call.name)(*call.arguments)
            if self.actor.node not in self.actor.cluster.alive:  # the work killed it
                raise self.actor.cluster.error
        return self.result
