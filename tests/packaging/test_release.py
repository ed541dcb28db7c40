"""`make release`: artifacts that answer where nothing else of the project is."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.packaging.installs import run
from tools import release


@pytest.mark.network  # uv asks a package index
def test_artifacts_are_made_and_checked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    release.main([str(tmp_path / "dist"), "--dirty"])
    version = release.project_version()
    names = {path.name for path in (tmp_path / "dist").iterdir()}
    wheel = f"tango_edge-{version}-py3-none-any.whl"
    assert names >= {f"tango_edge-{version}.tar.gz", wheel, f"tango-edge-tiny-{version}.tar.gz", "SHA256SUMS"}
    assert f"{wheel}: installed, and answered as recorded" in capfd.readouterr().out
    assert "FAILED" not in run("sha256sum", "--check", "SHA256SUMS", cwd=tmp_path / "dist")


def test_an_archive_is_the_same_wherever_it_is_made(tmp_path: Path) -> None:
    for side in ("a", "b"):
        folder = tmp_path / side / "tiny"
        folder.mkdir(parents=True)
        (folder / "z").write_text("z")
        (folder / "a").write_text("a")
        (folder / "a").chmod(0o600 if side == "a" else 0o644)
        release.pack(folder, tmp_path / side / "tiny.tar.gz")
    packed = [(tmp_path / side / "tiny.tar.gz").read_bytes() for side in ("a", "b")]
    assert packed[0] == packed[1]
    with tarfile.open(tmp_path / "a/tiny.tar.gz") as tar:
        assert tar.getnames() == ["tiny", "tiny/a", "tiny/z"]
        assert {member.mtime for member in tar} == {0}


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"wheel")
    (tmp_path / "SHA256SUMS").write_text(release.checksums(tmp_path))
    assert subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path, capture_output=True).returncode == 0


def test_a_folder_with_artifacts_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "old.whl").touch()
    with pytest.raises(SystemExit, match="is not empty"):
        release.main([str(tmp_path), "--dirty"])
    assert [path.name for path in tmp_path.iterdir()] == ["old.whl"]


def test_what_is_not_as_it_must_be_stops_a_release() -> None:
    with pytest.raises(SystemExit, match="'two' is not 'three'"):
        release.expect("two", "three")
    with pytest.raises(SystemExit, match="failed with 1"):
        release.run("false")
