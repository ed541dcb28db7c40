"""A folder is whole or absent."""

from __future__ import annotations

import errno
import fcntl
import os
import re

import pytest

from tango_plugins import TangoError
from tango_runtime.util.files import require_space, staged_folder


def write(folder, text):
    (folder / "bundle.json").write_text(text)


def bundle(path, text="old"):
    path.mkdir()
    write(path, text)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_it_is_whole(tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        write(folder, "new")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out/bundle.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error), staged_folder(tmp_path / "a/b/out"):
        raise error
    assert names(tmp_path) == []


def test_failure_leaves_the_folders_above_that_were_there(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "a/b/out"):
        raise RuntimeError
    assert names(tmp_path) == ["a"]


def test_existing_output_is_refused(tmp_path):
    bundle(tmp_path / "out")
    with pytest.raises(TangoError, match="out exists already"), staged_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


def test_overwrite_replaces_in_the_end(tmp_path):
    final = bundle(tmp_path / "out")
    with staged_folder(final, overwrite=True) as folder:
        write(folder, "new")
        assert (final / "bundle.json").read_text() == "old"
    assert (final / "bundle.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_failed_overwrite_keeps_the_old(tmp_path):
    final = bundle(tmp_path / "out")
    with pytest.raises(RuntimeError), staged_folder(final, overwrite=True):
        raise RuntimeError
    assert (final / "bundle.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder of something else"])
def test_overwrite_refuses_what_is_no_bundle(tmp_path, kind):
    final = tmp_path / "out"
    if kind == "file":
        final.write_text("mine")
    else:
        final.mkdir()
        (final / "thesis.tex").write_text("mine")
    with pytest.raises(TangoError, match=r"out.*bundle"), staged_folder(final, overwrite=True) as folder:
        write(folder, "new")
    assert "mine" in (final.read_text() if final.is_file() else (final / "thesis.tex").read_text())


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/half").touch()
    (tmp_path / ".out.lock").touch()
    with staged_folder(tmp_path / "out") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["out"]


def test_a_kill_between_the_two_renames_of_an_overwrite_loses_nothing(tmp_path):
    bundle(tmp_path / ".out.old")  # the old bundle is moved aside, and then the power fails
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out"):
        raise RuntimeError
    assert "old" in [path.read_text() for path in tmp_path.rglob("bundle.json")]


def test_what_was_set_aside_is_removed_in_the_end(tmp_path):
    bundle(tmp_path / ".out.old")
    with staged_folder(tmp_path / "out") as folder:
        write(folder, "new")
    assert names(tmp_path) == ["out"]


def test_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        write(folder, "first")
        with pytest.raises(TangoError, match="another process is writing"), staged_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out/bundle.json").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    flock = fcntl.flock

    def removed_meanwhile(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / ".out.lock").unlink()  # as the writer before does when it ends
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with pytest.raises(TangoError, match="another process is writing"), staged_folder(tmp_path / "out"):
        pass
    with staged_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path, number):
    with pytest.raises(TangoError, match="no space left"), staged_folder(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO, errno.EFBIG])
def test_other_faults_of_the_disk_are_told(tmp_path, number):
    with pytest.raises(TangoError, match=re.escape(os.strerror(number))), staged_folder(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


def test_space_that_is_there_is_enough(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(TangoError, match="no space left: the bundle needs 1000000000000 MB"):
        require_space(tmp_path, 10**18)
