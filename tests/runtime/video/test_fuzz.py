"""Damaged and malicious files end in frames or in a TangoError: no crash, no other error, no hang, bounded memory."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest

from tango_plugins import TangoError
from tango_runtime.server.decoders import Decoders
from tango_runtime.util.processes import Child
from tango_runtime.video import open_source
from tests.runtime.video import corpus

#: Most seconds of a file, which takes a tenth of one: a hang is found, however busy the machine is.
_PATIENCE = 120.0

#: Most address space of the process that reads, and most that files of 64×48 or claimed pixels may make it use.
_ADDRESSES, _MEMORY = 8 << 30, 1 << 30

#: What the server asks of a decoder, but for the bundle and the file.
_REQUEST = {
    **{"images": False, "seconds": None, "frames": None, "fps": None},
    **{"max_pixels": None, "most": 32, "fixed": None},
}


def _open_reader() -> Callable[[str], tuple[str, int]]:
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return _read


def _read(path: str) -> tuple[str, int]:
    """(what reading a file ends with, most bytes of memory so far)."""
    try:
        found = _sample(path)
    except TangoError as error:
        found = "error" if error.message and error.hint else f"an error that says nothing: {error!r}"
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"
    return found, _most_memory()


def _most_memory() -> int:
    """Most bytes that this process had in memory; getrusage counts the process that started it, too."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) << 10


def _sample(path: str) -> str:
    source = open_source(path)
    chosen = source.sample(min(4, len(source.sample_at(1e6))))
    frames = list(source.read(chosen))
    times = [seconds for seconds, _ in frames]
    if len(frames) != len(chosen) or times != sorted(times):
        return f"{len(frames)} frames of {len(chosen)} at {times}"
    return "frames" if all(rgb.dtype == np.uint8 and rgb.shape[2:] == (3,) for _, rgb in frames) else "no RGB frames"


class Reader:
    """A process that reads files, begun anew where one ends it."""

    def __init__(self) -> None:
        self._child, self.memory = Child(_open_reader), 0

    def read(self, path: str) -> str:
        """What becomes of a file."""
        self._child.send(path)
        try:
            if wait([self._child.pipe], _PATIENCE):
                found, self.memory = self._child.receive()
                return str(found)
            problem = "hang"
        except (EOFError, ConnectionError):
            problem = "crash"
        self.close()
        self._child = Child(_open_reader)
        return problem

    def close(self) -> None:
        """Ends it."""
        self._child.kill()


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return corpus.make_seeds(tmp_path_factory.mktemp("seeds"))


@pytest.fixture
def reader():
    reader = Reader()
    yield reader
    reader.close()


def read_all(files, reader, folder):
    """Counts of what became of files; every problem with its file."""
    found, problems = Counter[str](), {}
    for i, (how, name, data) in enumerate(files):
        path = folder / str(i) / name
        path.parent.mkdir()
        path.write_bytes(data)
        outcome = reader.read(str(path.parent if corpus.is_image(name) else path))
        found[outcome] += 1
        if outcome not in ("frames", "error"):
            problems[f"{i}: {name}, {how}"] = outcome
    assert not problems
    return found


def test_some_changed_files(seeds, reader, tmp_path):
    files = [file for i, file in enumerate(corpus.make_corpus(seeds, 1)) if i % 7 == 0]
    found = read_all(files, reader, tmp_path)
    assert found["frames"] > 5
    assert found["error"] > 5
    assert reader.memory < _MEMORY


@pytest.mark.slow
def test_a_corpus_of_changed_files(seeds, reader, tmp_path):
    files = list(corpus.make_corpus(seeds, 10))
    assert len(files) > 2000
    found = read_all(files, reader, tmp_path)
    assert found["frames"] > 500
    assert found["error"] > 500
    assert reader.memory < _MEMORY


@pytest.mark.slow
def test_the_servers_decoder_survives_them(seeds, tiny_bundle, tmp_path):
    """Files of strangers are decoded in a process of limited memory, which neither they nor its limit end."""
    decoders = Decoders(1, _PATIENCE, 4 << 30)

    def decode(path):
        return decoders.decode({**_REQUEST, "bundle": str(tiny_bundle), "paths": [str(path)]}).frames

    try:
        (process,) = decoders._all
        for how, name, data in corpus.make_corpus(seeds, 2):
            if corpus.is_image(name):
                continue
            (tmp_path / name).write_bytes(data)
            said = ""
            try:
                assert len(decode(tmp_path / name)) > 0
            except TangoError as error:
                said = error.message
            assert "made the decoder fail" not in said, how
            assert str(tmp_path) not in said
        assert decoders._all == {process}
        assert len(decode(seeds["h264.mp4"])) == 4
    finally:
        decoders.close()
