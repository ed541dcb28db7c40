"""Builds planned engines, each in a process of its own, so that no memory outlives its build.

An engine is written aside and renamed, its sidecar last. A lock on the file aside keeps two builds of one engine apart:
the second waits, and then finds it built.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tango_plugins import TangoError
from tango_runtime.bundle import Bundle, sha256
from tango_runtime.engines import FOLDER, FORMAT, Machine, Planned, Sidecar, read_sidecar
from tango_runtime.engines.worker import Job
from tango_runtime.system.gpu import Free
from tango_runtime.util.files import staged_file
from tango_runtime.util.units import gigabytes

#: Told what a build is doing, and how far it is from 0 to 1, None where TensorRT does not tell.
Tell = Callable[[str, "float | None"], None]

_SMALLER = "--max-frames, --max-tokens and --context with smaller numbers take less"


def build(
    bundle: Bundle,
    planned: Planned,
    machine: Machine,
    *,
    plugin: Path | None = None,
    timing_cache: Path | None = None,
    rebuild: bool = False,
    tell: Tell = lambda stage, fraction: None,
) -> bool:
    """Builds one engine, unless it is there.

    Args:
        bundle: The bundle.
        planned: The engine, of :func:`tango_runtime.engines.plan`.
        machine: This machine.
        plugin: The TensorRT plugin, for prune.
        timing_cache: File that keeps what kernels took; None takes this machine's in the bundle.
        rebuild: Build it though it is there.
        tell: Told how it goes.

    Returns:
        Whether it was built.

    Raises:
        TangoError: TensorRT cannot build it, the process was killed, or the disk is full.
    """
    planned.path.parent.mkdir(exist_ok=True)
    cache = timing_cache or default_timing_cache(bundle, machine)
    with staged_file(planned.path, lambda: tell("waiting for another process that builds it", None)) as (partial, lock):
        if not rebuild and is_built(planned):
            return False
        begin = time.monotonic()
        job = Job(
            recipe=planned.recipe,
            model=str(bundle.graph(planned.graph)),
            inputs=bundle.manifest.graphs[planned.graph].inputs,
            plugin=str(plugin) if plugin and planned.graph == "prune" else None,
            output=str(partial),
            timing_cache=str(cache),
            parent=os.getpid(),
        )
        peak_host = _run(job, lock, tell)
        size = partial.stat().st_size
        if size == 0:
            raise TangoError(
                f"the build of {planned.path.name} ended well and wrote nothing", "run it again with --debug"
            )
        sidecar = Sidecar(
            format=FORMAT,
            recipe=planned.recipe,
            gpu=machine.gpu,
            size=size,
            sha256=sha256(partial),
            seconds=round(time.monotonic() - begin, 1),
            peak_host=peak_host,
        )
        _install(planned.path, partial, sidecar)
    return True


def is_built(planned: Planned) -> bool:
    """Whether a planned engine stands there, whole as far as its size tells."""
    file = planned.path.with_suffix(".json")
    try:
        sidecar = read_sidecar(file)
        return sidecar.recipe == planned.recipe and planned.path.stat().st_size == sidecar.size
    except (TangoError, OSError):
        return False


def default_timing_cache(bundle: Bundle, machine: Machine) -> Path:
    """This machine's timing cache in the bundle: TensorRT takes none of another GPU or version."""
    gpu = "".join(c if c.isalnum() else "-" for c in machine.gpu)
    return bundle.path / FOLDER / f"timing-{gpu}-{machine.tensorrt}.cache"


def require_memory(planned: Planned, left: Free) -> None:
    """Refuses to begin a build that memory or disk will hardly hold.

    Raises:
        TangoError: Less is free than the estimate.
    """
    estimate = planned.estimate
    places = [("GPU's", estimate.build_device, left.device), ("host's", estimate.build_host, left.host)]
    if left.shared:
        places = [("GPU's and host's common", estimate.build_device + estimate.build_host, left.host)]
    for place, needed, free in places:
        if needed > free:
            raise TangoError(
                f"building {planned.graph} takes about {gigabytes(needed)} of the {place} memory, "
                f"{gigabytes(free)} are free",
                f"end what holds it; {_SMALLER}; --no-memory-check tries it all the same",
            )
    folder = planned.path.parent if planned.path.parent.is_dir() else planned.path.parent.parent
    disk = shutil.disk_usage(folder).free
    if estimate.weights > disk:
        raise TangoError(
            f"{planned.path.name} takes about {gigabytes(estimate.weights)}, "
            f"the disk of {folder} has {gigabytes(disk)} free",
            f"free some; engines that no longer fit: tango doctor {folder.parent if folder.name == FOLDER else folder}",
        )


def _run(job: Job, lock: int, tell: Tell) -> int:
    """Has a process do the job; gives its peak of host memory in bytes."""
    command = [sys.executable, "-m", "tango_runtime.engines.worker"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        # A session of its own: ctrl-C reaches this process alone, which then ends the other. It holds the lock too.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            pass_fds=(lock,),
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(asdict(job)))
                process.stdin.close()
            last = _follow(process.stdout, tell)
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if code != 0 or "peak_host" not in last:
            raise _failure(job, code, last, log)
    return int(last["peak_host"])


def _follow(lines: IO[str], tell: Tell) -> dict[str, Any]:
    """Passes on what the process tells; gives the last."""
    stage, message = "starting", {}
    for line in lines:
        message = json.loads(line)
        stage = message.get("stage", stage)
        if "stage" in message or "fraction" in message:
            tell(stage, message.get("fraction"))
    return message


def _failure(job: Job, code: int, last: dict[str, Any], log: IO[str]) -> TangoError:
    log.seek(0)
    lines = log.read().strip().splitlines()
    told = [line for line in lines if "[E]" in line or "Error" in line][-4:] or lines[-4:]
    what = f"building {job.recipe.graph} failed"
    if code == -9 or any("out of memory" in line.lower() for line in lines):
        killed = (
            ": its process was killed, as the kernel does when memory runs out" if code == -9 else ": out of memory"
        )
        return TangoError(what + killed, f"end what holds memory; {_SMALLER}; see: tango build --dry-run")
    reason = last.get("error", f"its process ended with {code}")
    return TangoError("\n".join([f"{what}: {reason}", *told]), "see what is missing: tango doctor")


def _install(engine: Path, partial: Path, sidecar: Sidecar) -> None:
    """Renames what is finished; the sidecar is never beside an engine that is not its own."""
    final = engine.with_suffix(".json")
    with staged_file(final) as (beside, _):
        beside.write_text(json.dumps(asdict(sidecar), indent=2) + "\n", encoding="utf-8")
        final.unlink(missing_ok=True)
        partial.rename(engine)
        beside.rename(final)
