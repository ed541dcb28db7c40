"""Output files and folders: complete or absent, never half-written."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import threading
from functools import partial
from pathlib import Path

import pytest

from tango_plugins import TangoError
from tango_runtime.util.files import (
    AppendedFile,
    atomic_write,
    check_apart,
    check_file,
    is_plain_name,
    require_links_inside,
    require_space,
    staged_file,
    staged_folder,
)

bundle_folder = partial(staged_folder, holding="bundle.json")


def write(folder, text):
    (folder / "bundle.json").write_text(text)


def bundle(path, text="old"):
    path.mkdir()
    write(path, text)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with bundle_folder(tmp_path / "out") as folder:
        write(folder, "new")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out/bundle.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(error), bundle_folder(tmp_path / "a/b/out"):
        raise error
    assert names(tmp_path) == []


def test_a_failure_keeps_parent_folders_that_existed(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), bundle_folder(tmp_path / "a/b/out"):
        raise RuntimeError
    assert names(tmp_path) == ["a"]


def test_an_existing_folder_is_not_replaced(tmp_path):
    bundle(tmp_path / "out")
    with pytest.raises(TangoError, match="out already exists"), bundle_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


def test_overwrite_replaces_the_folder_at_the_end(tmp_path):
    final = bundle(tmp_path / "out")
    with bundle_folder(final, overwrite=True) as folder:
        write(folder, "new")
        assert (final / "bundle.json").read_text() == "old"
    assert (final / "bundle.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_failed_overwrite_keeps_the_old_folder(tmp_path):
    final = bundle(tmp_path / "out")
    with pytest.raises(RuntimeError), bundle_folder(final, overwrite=True):
        raise RuntimeError
    assert (final / "bundle.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder of something else"])
def test_overwrite_replaces_nothing_but_a_bundle(tmp_path, kind):
    final = tmp_path / "out"
    if kind == "file":
        final.write_text("mine")
    else:
        final.mkdir()
        (final / "thesis.tex").write_text("mine")
    with (
        pytest.raises(TangoError, match=r"out.*bundle"),
        bundle_folder(final, overwrite=True) as folder,
    ):
        write(folder, "new")
    assert "mine" in (final.read_text() if final.is_file() else (final / "thesis.tex").read_text())


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/half").touch()
    (tmp_path / ".out.lock").touch()
    with bundle_folder(tmp_path / "out") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["out"]


def test_a_kill_between_the_two_renames_of_an_overwrite_loses_nothing(tmp_path):
    bundle(tmp_path / ".out.old")  # the old bundle is moved aside, and then the power fails
    with pytest.raises(RuntimeError), bundle_folder(tmp_path / "out"):
        raise RuntimeError
    assert "old" in [path.read_text() for path in tmp_path.rglob("bundle.json")]


def test_an_old_folder_set_aside_is_removed_at_the_end(tmp_path):
    bundle(tmp_path / ".out.old")
    with bundle_folder(tmp_path / "out") as folder:
        write(folder, "new")
    assert names(tmp_path) == ["out"]


def test_a_second_writer_is_rejected_and_the_first_continues(tmp_path):
    with bundle_folder(tmp_path / "out") as folder:
        write(folder, "first")
        with (
            pytest.raises(TangoError, match="another process is writing"),
            bundle_folder(tmp_path / "out"),
        ):
            pass
    assert (tmp_path / "out/bundle.json").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_a_lock_file_that_was_removed_meanwhile_does_not_lock(tmp_path, monkeypatch):
    flock = fcntl.flock

    def removed_meanwhile(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / ".out.lock").unlink()  # as the writer before does when it ends
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with (
        pytest.raises(TangoError, match="another process is writing"),
        bundle_folder(tmp_path / "out"),
    ):
        pass
    with bundle_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(tmp_path, number):
    with pytest.raises(TangoError, match="no space left"), bundle_folder(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO, errno.EFBIG])
def test_other_disk_errors_are_named(tmp_path, number):
    with (
        pytest.raises(TangoError, match=re.escape(os.strerror(number))),
        bundle_folder(tmp_path / "out"),
    ):
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


def test_required_space(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(TangoError, match=r"no space left: the bundle needs 1000000000000\.0 MB"):
        require_space(tmp_path, 10**18)


def test_a_file_appears_when_it_is_renamed(tmp_path):
    final = tmp_path / "out"
    with staged_file(final) as (aside, _):
        aside.write_text("new")
        assert not final.exists()
        aside.rename(final)
    assert names(tmp_path) == ["out"]
    assert final.read_text() == "new"


def test_a_file_that_is_not_renamed_is_removed(tmp_path):
    with staged_file(tmp_path / "out") as (aside, _):
        aside.write_text("half")
    assert names(tmp_path) == []


def test_a_second_writer_of_a_file_waits_and_sees_the_first_result(tmp_path):
    final, waiting, seen = tmp_path / "out", threading.Event(), []

    def second():
        with staged_file(final, waiting.set) as (aside, _):
            seen.append((final.read_text(), aside.read_text()))

    with staged_file(final) as (aside, _):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(60)
        aside.write_text("first")
        aside.rename(final)
    thread.join(60)
    assert seen == [("first", "")]
    assert names(tmp_path) == ["out"]


def test_atomic_write_replaces_a_file(tmp_path):
    (tmp_path / "out").write_text("old")
    atomic_write(tmp_path / "out", lambda file: file.write(b"new"))
    assert (tmp_path / "out").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_failed_atomic_write_keeps_the_old_file(tmp_path):
    (tmp_path / "out").write_text("old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        atomic_write(tmp_path / "out", fail)
    assert (tmp_path / "out").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        atomic_write(pipe, lambda file: file.write(b"new"))
        assert os.read(reader, 100) == b"new"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_a_symbolic_link_is_written_through_and_not_replaced(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    atomic_write(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


@pytest.mark.parametrize("path", ["none/out", "."])
def test_a_path_that_cannot_be_written_is_named(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TangoError, match=f"{re.escape(path)} cannot be written"):
        atomic_write(Path(path), lambda file: file.write(b"new"))
    assert names(tmp_path) == []


def test_a_pipe_that_nobody_reads_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TangoError, match="pipe cannot be written"):
        atomic_write(tmp_path / "pipe", lambda file: file.write(b"new"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes devices")
def test_a_device_is_written_to_and_not_replaced(tmp_path):
    os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, Path("/dev/null").stat().st_rdev)
    check_file(tmp_path / "null")
    atomic_write(tmp_path / "null", lambda file: file.write(b"new"))
    assert (tmp_path / "null").is_char_device()


def test_a_full_device_is_named():
    with pytest.raises(TangoError, match="no space left on the disk of /dev"):
        atomic_write(Path("/dev/full"), lambda file: file.write(b"new"))


# What is checked before any work.


@pytest.fixture
def zoo(tmp_path):
    """A folder with a file, a folder, a pipe, and links to a file, to a device, to nothing and to itself."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    links = {"link": "file", "device": "/dev/null", "broken": "new", "astray": "none/new", "loop": "loop"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    return tmp_path


@pytest.mark.parametrize("name", ["new", "file", "link", "device", "broken", "/dev/null", os.fsdecode(b"\xff")])
def test_a_file_that_can_be_written_passes(zoo, name):
    before = names(zoo)
    check_file(zoo / name)
    assert names(zoo) == before
    assert (zoo / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("folder", "folder is a folder"),
        ("pipe", "pipe is a named pipe"),
        ("none/new", "there is no folder .*none"),
        ("astray", "there is no folder .*none"),
        ("file/new", "there is no folder .*file"),
        ("loop", "loop cannot be written: Too many levels"),
        ("/proc/new", "/proc/new cannot be written"),
        ("/sys/new", "/sys/new cannot be written"),
    ],
)
def test_a_file_that_cannot_be_written_is_named(zoo, name, error):
    with pytest.raises(TangoError, match=error):
        check_file(zoo / name)


@pytest.mark.parametrize(
    ("output", "other"),
    [
        ("file", "file"),
        ("link", "file"),
        ("file", "link"),
        ("folder/../file", "file"),
        ("folder", "folder/inside"),
        (".", "folder"),
        ("folder/inside", "folder"),
        ("broken", "new"),
    ],
)
def test_an_output_that_would_replace_something_is_refused(zoo, output, other):
    for place in ("inside", "../new"):
        (zoo / "folder" / place).touch()
    with pytest.raises(TangoError, match=r"--output .* would replace the input"):
        check_apart({"--output": zoo / output}, {"the input": zoo / other})
    with pytest.raises(TangoError, match="would replace --"):
        check_apart({"--output": zoo / output, "--report": zoo / other}, {})


@pytest.mark.parametrize(
    ("output", "other"), [("new", "file"), ("folder/new", "folder"), ("device", "/dev/null"), ("new/a", "new/b")]
)
def test_an_output_beside_an_input_passes(zoo, output, other):
    check_apart({"--output": zoo / output, "--none": None}, {"the input": zoo / other, "none": None})


@pytest.mark.parametrize("name", ["/a", "../a", "a/b", "a/", "a\\b", "C:\\a", "", ".", "..", "a\0", None, 1, ["a"]])
def test_a_name_that_may_lead_elsewhere_is_not_plain(name):
    assert not is_plain_name(name)


@pytest.mark.parametrize("name", ["a", "a.b", "..a", "...", "ä", "-", " "])
def test_a_name_of_a_file_is_plain(name):
    assert is_plain_name(name)


def test_links_may_lead_to_files_of_the_folder_only(tmp_path):
    inside = tmp_path / "folder"
    (inside / "deep").mkdir(parents=True)
    (inside / "file").touch()
    (inside / "deep/link").symlink_to("../file")
    (tmp_path / "other").symlink_to("folder")
    require_links_inside(tmp_path / "other")
    (inside / "deep/out").symlink_to("../../elsewhere")
    with pytest.raises(TangoError, match="deep/out is a link that leads outside"):
        require_links_inside(inside)


# Files of lines.


def appended(path, *lines):
    with AppendedFile(path, b"{") as file:
        for line in lines:
            file.append(line)


def test_lines_are_appended(tmp_path):
    file = tmp_path / "lines"
    appended(file, b"{1}\n", b"{2}\n")
    appended(file, b"{3}\n")
    assert file.read_bytes() == b"{1}\n{2}\n{3}\n"
    assert names(tmp_path) == ["lines"]


@pytest.mark.parametrize("half", [b"{", b"{" + bytes(200_000), b"{2}", b"\0\0\0", b"{2\0\0"])
def test_half_a_line_is_cut_off(tmp_path, half):
    file = tmp_path / "lines"
    file.write_bytes(b"{1}\n" + half)
    appended(file, b"{3}\n")
    assert file.read_bytes() == b"{1}\n{3}\n"


def test_the_end_of_another_kind_of_file_is_not_cut_off(tmp_path):
    file = tmp_path / "lines"
    file.write_bytes(b"1\nnotes")
    with pytest.raises(TangoError, match="has no end"):
        AppendedFile(file, b"{")
    assert file.read_bytes() == b"1\nnotes"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda file: file.unlink(), "removed"),
        (lambda file: file.write_bytes(b""), "changed"),
        (lambda file: file.write_bytes(b"{1}\n{2}\n"), "changed"),
    ],
)
def test_a_file_that_someone_else_changes_is_not_appended_to(tmp_path, change, word):
    file = tmp_path / "lines"
    with AppendedFile(file, b"{") as appending:
        appending.append(b"{1}\n")
        change(file)
        left = file.read_bytes() if file.exists() else None
        with pytest.raises(TangoError, match=f"lines was {word} while it was written"):
            appending.append(b"{3}\n")
    assert (file.read_bytes() if file.exists() else None) == left


def test_one_process_appends(tmp_path):
    with AppendedFile(tmp_path / "lines", b"{"), pytest.raises(TangoError, match="another process is writing"):
        AppendedFile(tmp_path / "lines", b"{")
    appended(tmp_path / "lines", b"{}\n")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_half_a_line_that_fails_is_taken_back(tmp_path, monkeypatch, error):
    pwrite, calls = os.pwrite, []

    def fail(descriptor, content, offset):
        calls.append(offset)
        if len(calls) > 1:
            raise error
        return pwrite(descriptor, content[:3], offset)

    file = tmp_path / "lines"
    appended(file, b"{1}\n")
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises((TangoError, KeyboardInterrupt)):
        appended(file, b"{234}\n")
    assert calls == [4, 7]
    assert file.read_bytes() == b"{1}\n"
