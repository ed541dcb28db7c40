"""Makes the artifacts of a release, and checks them in empty environments: `make release`.

    python tools/release.py dist [--dirty]

writes the sdist, the pure wheel, the platform wheels (`make wheels`, for dist/ only), the bundle of models/tiny with a
clip, and their checksums. Then each wheel that this machine can install is installed into a new environment, and must
answer the clip's question.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TINY = ROOT / "models/tiny"

#: Frames of the archive's clip, and the options of `tango run` on it.
FRAMES, OPTIONS = 16, ("--frames", 16, "--max-new-tokens", 8)
#: The question to ask, which the model answers correctly. It is a test of the release, not a measurement.
QUESTION = 0


def main(arguments: list[str] | None = None) -> None:
    """Makes and checks everything; exits with a message at the first failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the artifacts, which must be empty")
    parser.add_argument("--dirty", action="store_true", help="allow uncommitted changes, for a trial run")
    args = parser.parse_args(arguments)
    output = args.output.resolve()
    if output.exists() and any(output.iterdir()):
        sys.exit(f"{args.output} is not empty: remove it first")
    if not args.dirty and run("git", "status", "--porcelain", cwd=ROOT):
        sys.exit("the checkout has changes: commit them first, or try with --dirty")
    version = project_version()
    if not args.dirty and changelog_version() != version:
        sys.exit(f"CHANGELOG.md begins with {changelog_version()}, pyproject.toml has {version}")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if output == ROOT / "dist":  # where `make wheels` writes
            run("make", "wheels", cwd=ROOT)
        else:
            build_packages(scratch, output)
        answer = build_bundle(scratch, output / f"tango-edge-tiny-{version}.tar.gz")
        (output / "SHA256SUMS").write_text(checksums(output))
        for index, wheel in enumerate(installable(output)):
            check(wheel, output / f"tango-edge-tiny-{version}.tar.gz", answer, version, scratch / f"check{index}")
            print(f"{wheel.name}: installed, and answered as recorded")
    print((output / "SHA256SUMS").read_text(), end="")


def run(*command: object, cwd: Path | None = None) -> str:
    """Standard output of a command that succeeds, with no environment variable that points into the checkout."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TANGO_LIBRARY")}
    clean["SOURCE_DATE_EPOCH"] = commit_time()  # the time of all files in a wheel
    done = subprocess.run([str(part) for part in command], cwd=cwd, stdout=subprocess.PIPE, text=True, env=clean)
    if done.returncode != 0:
        sys.exit(f"`{' '.join(map(str, command))}` failed with {done.returncode}:\n{done.stdout}")
    return done.stdout


@cache
def commit_time() -> str:
    """Seconds since 1970 of the commit that is released."""
    return subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def project_version() -> str:
    """The version in pyproject.toml."""
    found = re.search(r'(?m)^version = "(.+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return found[1]


def changelog_version() -> str:
    """The version of the changelog's first section, or ``Unreleased``."""
    found = re.search(r"(?m)^## \[?([^]\s]+)", (ROOT / "CHANGELOG.md").read_text())
    assert found is not None
    return found[1]


def build_packages(scratch: Path, output: Path) -> None:
    """Builds the sdist, and the pure wheel from it, which shows that the sdist is complete."""
    source = scratch / "source"
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # git also lists deleted files
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(BIN / "uv", "build", "--quiet", "--out-dir", output, source)
    (output / ".gitignore").unlink(missing_ok=True)  # uv's


def build_bundle(scratch: Path, archive: Path) -> str:
    """Writes the archive of a bundle, a clip and a question about it; returns the answer that it records."""
    folder = scratch / "tango-edge-tiny"
    source = ("--checkpoint", TINY / "llava", "--salience-checkpoint", TINY / "siglip", "--sink-positions")
    run(BIN / "tango-export", *source, "--context", 4096, "--no-validate", "--output", folder / "bundle")
    run(sys.executable, ROOT / "examples/make_clip.py", scratch / "clip", "--frames", FRAMES, cwd=ROOT)
    shutil.copy(scratch / "clip/clip.mp4", folder / "clip.mp4")
    record = json.loads((scratch / "clip/questions.jsonl").read_text().splitlines()[QUESTION])
    (folder / "question.json").write_text(json.dumps({key: record[key] for key in ("question", "answer")}) + "\n")
    pack(folder, archive)
    return str(record["answer"])


def pack(folder: Path, archive: Path) -> None:
    """A folder as .tar.gz, without owners and times, which differ from one machine and day to the next."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    with gzip.GzipFile(archive, "wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for path in [folder, *sorted(folder.rglob("*"))]:
            tar.add(path, path.relative_to(folder.parent), recursive=False, filter=plain)


def checksums(folder: Path) -> str:
    """Lines for `sha256sum --check`."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "SHA256SUMS")
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)


def installable(output: Path) -> list[Path]:
    """The wheels that this machine can install."""
    machine = platform.machine()
    return [path for path in sorted(output.glob("*.whl")) if path.stem.endswith(("-any", f"_{machine}"))]


def check(wheel: Path, archive: Path, answer: str, version: str, folder: Path) -> None:
    """Installs a wheel into a new environment, and asks the archive's bundle its question."""
    run(BIN / "uv", "venv", "--quiet", "--no-python-downloads", "--python", sys.executable, folder / "venv")
    python, tango = folder / "venv/bin/python", folder / "venv/bin/tango"
    install = (BIN / "uv", "pip", "install", "--quiet", "--python", python, "--constraint", ROOT / "constraints.txt")
    run(*install, f"tango-edge[cpu] @ {wheel.as_uri()}")
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2, of Debian 12, has none
        tar.extractall(folder)
    tiny = folder / "tango-edge-tiny"
    question = json.loads((tiny / "question.json").read_text())["question"]
    expect(run(tango, "--version", cwd=folder), f"tango-edge {version}\n")
    ready = json.loads(run(tango, "doctor", tiny / "bundle", "--verify", "--json", "-", cwd=folder))["ready"]
    expect("ort-cpu" in ready, True)
    expect(run(tango, "run", tiny / "bundle", tiny / "clip.mp4", question, *OPTIONS, cwd=folder), f"{answer}\n")


def expect(found: object, wanted: object) -> None:
    """Exits with a message if a value is not the expected one."""
    if found != wanted:
        sys.exit(f"{found!r} is not {wanted!r}")


if __name__ == "__main__":
    main()
