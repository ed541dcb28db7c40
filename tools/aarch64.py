"""Runs the aarch64 wheel under qemu, and compares what it does with the x86_64 wheel.

    python tools/aarch64.py BUNDLE FOLDER --frames 8 [--wheels dist]

FOLDER holds videos and a questions.jsonl. Needs qemu-user-static and mmdebstrap (both of Debian), uv, and a package
index, but neither root nor binfmt: Debian's interpreter is unpacked and not configured, and uv installs for another
machine. The emulated CPU is a Cortex-A76, of those that every qemu has the closest to Orin's. Everything is kept in
build/aarch64.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tango_runtime.bundle import Bundle
from tango_runtime.video import sample

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build/aarch64"
UV = Path(sys.executable).with_name("uv")
#: Debian's interpreters. It has no 3.10 and no 3.12, which JetPack 6 and 7 have.
SUITES = {"bookworm": "3.11", "trixie": "3.13"}
CPU = "cortex-a76"
#: What a kernel on the emulated CPU would report: with the host's own report, ONNX Runtime crashes.
CPUINFO = """processor\t: {}
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0b
CPU revision\t: 1

"""
#: What may differ. FFmpeg converts colors with different code on each machine, so frames of a file differ by about one
#: level, and a few tokens at the margin differ with them.
OWN = {"machine", "python", "seconds", "number of kept tokens of a file", "kept tokens of a file"}
#: What may differ, too, of an fp16 bundle: on x86-64 ONNX Runtime computes it in fp32, on aarch64 it has fp16 kernels.
OWN_IN_FP16 = {"number of kept tokens of decoded frames", "kept tokens of decoded frames"}


def main() -> None:
    """Compares the machines; exits with 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--wheels", type=Path, default=ROOT / "dist")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    args = parser.parse_args()
    asked = (args.bundle, args.folder, decoded(args.folder, args.frames))

    native = "{}.{}".format(*sys.version_info)
    wanted = observe(sys.executable, install(args.wheels, "x86_64", native), asked)
    own = OWN | OWN_IN_FP16 if Bundle.load(args.bundle).manifest.dtype == "float16" else OWN
    differences = []
    for suite in args.suites:
        found = observe(emulated(suite), install(args.wheels, "aarch64", SUITES[suite]), asked)
        differences += [f"{suite}: {key}" for key in wanted if key not in own and wanted[key] != found[key]]
    if differences:
        raise SystemExit(f"not as on x86_64: {', '.join(differences)}")
    print("aarch64 does what x86_64 does")


def decoded(folder: Path, count: int) -> Path:
    """Frames of the first video that is asked about, uint8 [F, H, W, 3] in a .npy, as this machine decodes them."""
    first = json.loads((folder / "questions.jsonl").read_text().partition("\n")[0])["video"]
    WORK.mkdir(parents=True, exist_ok=True)
    file = WORK / "decoded.npy"
    np.save(file, np.stack([frame for _, frame in sample(folder / first, count)]))
    return file


def emulated(suite: str) -> Path:
    """A script that runs Debian's interpreter for arm64, which is unpacked with the libraries that our wheels need."""
    root = WORK / suite
    if not root.is_dir():
        packages = f"python{SUITES[suite]},libstdc++6,libgcc-s1"
        partial = root.with_name(f"{suite}.partial")
        options = ["--quiet", "--architectures=arm64", "--variant=extract", f"--include={packages}"]
        run("mmdebstrap", *options, suite, partial, "http://deb.debian.org/debian")
        if not (partial / "lib").exists():  # base-files, which is not unpacked, links it
            (partial / "lib").symlink_to("usr/lib")
        (partial / "proc").mkdir(exist_ok=True)  # qemu opens a file of the host where the folder has none
        processors = (CPUINFO.format(index) for index in range(os.cpu_count() or 1))
        (partial / "proc/cpuinfo").write_text("".join(processors))
        partial.rename(root)
    script = WORK / f"python-{suite}"
    script.write_text(f'#!/bin/sh\nexec qemu-aarch64-static -L {root} {root}/usr/bin/python{SUITES[suite]} "$@"\n')
    script.chmod(0o755)
    return script


def install(wheels: Path, machine: str, python: str) -> Path:
    """Installs the wheel, ONNX Runtime and their dependencies, as pinned in constraints.txt, into a folder."""
    (wheel,) = wheels.glob(f"tango_edge-*_{machine}.whl")
    site = WORK / f"site-{machine}-{python}"
    target = ["--python-version", python, "--python-platform", f"{machine}-manylinux_2_36", "--target", site]
    options = ["--only-binary", ":all:", "--constraint", ROOT / "constraints.txt"]
    run(UV, "pip", "install", "--quiet", "--reinstall-package", "tango-edge", *target, *options, f"{wheel}[cpu]")
    return site


def observe(python: object, site: Path, asked: tuple[object, ...]) -> dict[str, Any]:
    """What aarch64_observed.py prints on a machine."""
    began = time.monotonic()
    environment = {"PATH": os.environ["PATH"], "HOME": str(WORK), "PYTHONPATH": str(site), "QEMU_CPU": CPU}
    observed = json.loads(
        run(
            python, Path(__file__).with_name("aarch64_observed.py"), *asked, "--python", python, env=environment
        ).splitlines()[-1]
    )
    observed["seconds"] = round(time.monotonic() - began)
    print(json.dumps(observed), flush=True)
    return observed


def run(*command: object, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that succeeds."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(str(part) for part in command)} failed with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
