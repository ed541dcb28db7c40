"""A batch on a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys

import pytest

from tango_runtime.batch import ray_pool
from tango_runtime.batch.ray_pool import Pool, connected
from tango_runtime.cli.main import main

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # the cluster takes ten seconds to start

VIDEOS = 6


@pytest.fixture
def folder(tmp_path, clip):
    with (tmp_path / "questions.jsonl").open("w") as file:
        for i in range(VIDEOS):
            shutil.copy(clip, tmp_path / f"{i}.mp4")
            for text in ("What happens?", "Who comes in?"):
                file.write(json.dumps({"video": f"{i}.mp4", "question": text}) + "\n")
    return tmp_path


@pytest.fixture
def batch(tiny_bundle, folder, capsys):
    def call(output, *options):
        command = ["batch", tiny_bundle, folder / "questions.jsonl", "--output", folder / output]
        code = main([*map(str, command), "--max-new-tokens", "4", "--decoders", "0", *map(str, options)])
        return code, capsys.readouterr().err

    return call


def lines(file):
    return sorted(file.read_text().splitlines())


def test_videos_are_decoded_while_models_load(batch, folder, ray_cluster):
    """The answers are the same, and an error is that of one machine."""
    assert batch("alone.jsonl")[0] == 0
    assert batch("answers.jsonl", "--ray", ray_cluster.address, "--decoders", 1)[0] == 0
    assert lines(folder / "answers.jsonl") == lines(folder / "alone.jsonl")
    wanted = batch("none.jsonl", "--backend", "ort-cpu", "--gpu-decoders", 1)
    assert wanted[0] == 2
    code, err = batch("none.jsonl", "--backend", "ort-cpu", "--gpu-decoders", 1, "--ray", ray_cluster.address)
    assert (code, err.splitlines()[-2:]) == (2, wanted[1].splitlines()[-2:])


def test_the_main_module_of_an_actor_is_known(ray_cluster):
    """Processes of a worker are to do without it: it imports Ray."""
    with connected(ray_cluster.address):
        found = ray.get(ray.remote(num_cpus=1)(lambda: sys.modules["__main__"].__file__).remote())
    assert found.endswith(ray_pool._RAY_MAIN)


def test_a_node_is_lost_midway_and_the_run_is_resumed(batch, folder, ray_cluster, monkeypatch):
    assert batch("alone.jsonl")[0] == 0
    feed, lose, lost = Pool._feed, Pool._lose, []

    def kill_the_second(pool, member):
        if pool.workers < 2 and not lost:  # nothing is done before both are ready
            return
        if lost:
            feed(pool, member)
            return
        place = next(place for place, each in pool._members.items() if each is member)
        process = ray.get(member.actor.__ray_call__.remote(lambda actor: os.getpid()))
        os.kill(process, signal.SIGSTOP)  # so that what it gets now is not done when its node goes away
        for each in pool._members.values():
            feed(pool, each)
        lost.append(place.node)
        ray_cluster.remove_node(next(n for n in ray_cluster.nodes if n.node_id == place.node), allow_graceful=False)
        os.kill(process, signal.SIGKILL)

    monkeypatch.setattr(Pool, "_feed", kill_the_second)
    monkeypatch.setattr(Pool, "_lose", lambda pool, place, why: (lost.append(place.node), lose(pool, place, why))[1])
    code, err = batch("answers.jsonl", "--ray", ray_cluster.address)
    assert code == 0
    assert err.count("worker: ONNX Runtime") == 2
    assert lost[0] in lost[1:]
    assert lines(folder / "answers.jsonl") == lines(folder / "alone.jsonl")

    monkeypatch.undo()
    kept = (folder / "answers.jsonl").read_text().splitlines(keepends=True)[:5]
    (folder / "answers.jsonl").write_text("".join(kept) + '{"id": "half')
    code, err = batch("answers.jsonl", "--ray", ray_cluster.address)
    assert code == 0
    assert f"{2 * VIDEOS - 5} answers to give" in err
    assert lines(folder / "answers.jsonl") == lines(folder / "alone.jsonl")
