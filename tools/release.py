"""Makes the artifacts of a release, and checks them where nothing else of the project is: `make release`.

    python tools/release.py dist [--dirty]

writes the sdist, the pure wheel, the platform wheels (`make wheels`), the bundle of models/tiny with a clip, and their
checksums. Then each wheel that this machine can install is installed into an environment of its own, and asked.
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

#: The clip of the archive, and how it is asked.
FRAMES, OPTIONS = 16, ("--frames", 16, "--max-new-tokens", 8)
#: Its first question, whose answer is its truth; a test that a release must pass, not a measurement.
QUESTION = 0


def main(arguments: list[str] | None = None) -> None:
    """Makes and checks everything; exits with a message at the first thing that is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the artifacts; it must not hold any yet")
    parser.add_argument("--dirty", action="store_true", help="allow changes that are not committed, for a try")
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
        if output != ROOT / "dist" or not build_wheels():
            build_packages(scratch, output)
        answer = build_bundle(scratch, output / f"tango-edge-tiny-{version}.tar.gz")
        (output / "SHA256SUMS").write_text(checksums(output))
        for index, wheel in enumerate(installable(output)):
            check(wheel, output / f"tango-edge-tiny-{version}.tar.gz", answer, version, scratch / f"check{index}")
            print(f"{wheel.name}: installed, and answered as recorded")
    print((output / "SHA256SUMS").read_text(), end="")


def run(*command: object, cwd: Path | None = None) -> str:
    """Standard output of a command that succeeds, in an environment that knows of the checkout its time alone."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TANGO_LIBRARY")}
    clean["SOURCE_DATE_EPOCH"] = commit_time()  # for the times of files in a wheel
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
    """The sdist, and the pure wheel from it: so nothing that a build needs can be missing there."""
    source = scratch / "source"
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # not one that was deleted
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(BIN / "uv", "build", "--quiet", "--out-dir", output, source)
    (output / ".gitignore").unlink(missing_ok=True)  # uv's


def build_wheels() -> bool:
    """The same, and wheels with the CUDA library inside, into dist/; False if the Makefile has no target for them."""
    known = subprocess.run(["make", "--question", "wheels"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if "No rule to make target" in known.stderr:
        print("no target `wheels`: no wheels with the CUDA library")
        return False
    run("make", "wheels", cwd=ROOT)
    return True


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
    """Installs a wheel into an environment of its own, and asks the archive's bundle its question."""
    run(BIN / "uv", "venv", "--quiet", "--no-python-downloads", "--python", sys.executable, folder / "venv")
    python, tango = folder / "venv/bin/python", folder / "venv/bin/tango"
    install = (BIN / "uv", "pip", "install", "--quiet", "--python", python, "--constraint", ROOT / "constraints.txt")
    run(*install, f"tango-edge[cpu] @ {wheel.as_uri()}")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    tiny = folder / "tango-edge-tiny"
    question = json.loads((tiny / "question.json").read_text())["question"]
    expect(run(tango, "--version", cwd=folder), f"tango-edge {version}\n")
    ready = json.loads(run(tango, "doctor", tiny / "bundle", "--verify", "--json", "-", cwd=folder))["ready"]
    expect("ort-cpu" in ready, True)
    expect(run(tango, "run", tiny / "bundle", tiny / "clip.mp4", question, *OPTIONS, cwd=folder), f"{answer}\n")


def expect(found: object, wanted: object) -> None:
    """Stops where something is not as it must be."""
    if found != wanted:
        sys.exit(f"{found!r} is not {wanted!r}")


if __name__ == "__main__":
    main()
