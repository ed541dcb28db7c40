"""Work in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from tango_calibration.evaluation.evaluate import (
    evaluate,
    evaluate_in_parallel,
)
from tango_plugins import TangoError
from tango_runtime.util.processes import BLAS_THREADS, child_settings
from tests.fakes.evaluator import PARAMS, TRIALS, VIDEOS, Counter, untimed
from tests.fakes.ray_cluster import Cluster


@pytest.mark.parametrize("jobs", [1, 2])
def test_several_processes_give_the_same_records(jobs):
    done, opened = [], []
    found = evaluate_in_parallel(Counter, VIDEOS, TRIALS, PARAMS, done.append, jobs=jobs, opened=opened.append)
    assert untimed(found) == untimed(evaluate(Counter(), VIDEOS, TRIALS, PARAMS))
    assert (sum(done), opened) == (len(VIDEOS), ["a counter"])
    assert not multiprocessing.active_children()


def test_a_cluster_gives_the_same_records(monkeypatch):
    cluster, done = Cluster(a={"CPU": 2.0}, b={"CPU": 2.0}), []
    cluster.install(monkeypatch)
    found = evaluate_in_parallel(Counter, VIDEOS, TRIALS, PARAMS, done.append, jobs=1, ray="local")
    assert untimed(found) == untimed(evaluate(Counter(), VIDEOS, TRIALS, PARAMS))
    assert (sum(done), len(cluster.actors)) == (len(VIDEOS), 2)
    with pytest.raises(TangoError, match=r"no room \(make some\)"):
        evaluate_in_parallel(refuse, VIDEOS, TRIALS, PARAMS, jobs=1, ray="local")


def refuse():
    raise TangoError("no room", "make some")


def test_an_error_in_a_process_is_raised():
    with pytest.raises(TangoError, match=r"no room \(make some\)"):
        evaluate_in_parallel(refuse, VIDEOS, TRIALS, PARAMS, jobs=2)
    assert not multiprocessing.active_children()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_is_an_error():
    with pytest.raises(TangoError, match="a process has died"):
        evaluate_in_parallel(die, VIDEOS, TRIALS, PARAMS, jobs=2)


def test_processes_block_interrupts():
    """Also the first, with which Python's resource tracker starts: hence a new interpreter."""
    code = "import functools, signal; from tango_calibration.parallel import map_in_processes; "
    code += "blocked_signals = functools.partial(functools.partial, signal.pthread_sigmask, signal.SIG_BLOCK); "
    code += "blocked = map_in_processes(blocked_signals, [(), ()], lambda item, result: None, jobs=2); "
    code += "print(blocked == [{signal.SIGINT}] * 2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_only_blas_threads_are_set(monkeypatch):
    name, other = BLAS_THREADS[:2]
    monkeypatch.setenv(name, "7")
    monkeypatch.delenv(other, raising=False)
    with child_settings():
        assert (os.environ[name], os.environ[other]) == ("1", "1")
        monkeypatch.setenv("OF_ANOTHER_THREAD", "stays")
    assert (os.environ[name], os.environ.get(other)) == ("7", None)
    assert os.environ["OF_ANOTHER_THREAD"] == "stays"
