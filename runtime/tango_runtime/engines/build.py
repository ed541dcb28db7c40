"""Builds planned engines, each in its own process. docs/design/engine-builds.md explains why.

An engine is written to a partial file and renamed, its sidecar last. A lock on the partial file serializes two builds
of one engine: the second build waits, and then finds the engine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tango_plugins import TangoError
from tango_runtime.bundle import Bundle, sha256
from tango_runtime.engines import FOLDER, FORMAT, EnginePlan, Sidecar, Target, read_sidecar
from tango_runtime.engines.worker import Job
from tango_runtime.system.gpu import Free
from tango_runtime.util.console import OnStatus
from tango_runtime.util.files import staged_file
from tango_runtime.util.units import gigabytes

_USE_LESS = "smaller --max-frames, --max-tokens and --context take less"


def build(
    bundle: Bundle,
    planned: EnginePlan,
    target: Target,
    *,
    plugin: Path | None = None,
    timing_cache: Path | None = None,
    rebuild: bool = False,
    on_status: OnStatus = lambda stage, fraction: None,
) -> bool:
    """Builds one engine, unless it exists.

    Args:
        bundle: The bundle.
        planned: The engine, from :func:`tango_runtime.engines.plan_engines`.
        target: This machine.
        plugin: The library of the TensorRT plugins, for an engine that has some.
        timing_cache: File of measured kernel times; None takes this machine's file in the bundle.
        rebuild: Build the engine even if it exists.
        on_status: Receives the progress.

    Returns:
        True if this call built it, False if it existed.

    Raises:
        TangoError: TensorRT cannot build it, its process was killed, or the disk is full.
    """
    planned.path.parent.mkdir(exist_ok=True)
    cache = timing_cache or default_timing_cache(bundle, target)
    with staged_file(planned.path, lambda: on_status("waiting for another build of it", None)) as (partial, lock):
        if not rebuild and is_built(planned):
            return False
        start = time.monotonic()
        job = Job(
            spec=planned.spec,
            model=str(bundle.engine_graph(planned.graph, planned.spec.form)),
            inputs=bundle.manifest.graphs[planned.graph].inputs,
            plugin=str(plugin) if plugin and planned.spec.plugin is not None else None,
            output=str(partial),
            timing_cache=str(cache),
            parent=os.getpid(),
        )
        peak_host = _run(job, lock, on_status)
        size = partial.stat().st_size
        if size == 0:
            raise TangoError(
                f"the build of {planned.path.name} succeeded and wrote nothing", "run it again with --debug"
            )
        sidecar = Sidecar(
            format=FORMAT,
            spec=planned.spec,
            gpu=target.gpu,
            size=size,
            sha256=sha256(partial),
            seconds=round(time.monotonic() - start, 1),
            peak_host=peak_host,
        )
        _install(planned.path, partial, sidecar)
    return True


def is_built(planned: EnginePlan) -> bool:
    """Whether a planned engine exists with its sidecar and has the size that the sidecar says."""
    file = planned.path.with_suffix(".json")
    try:
        sidecar = read_sidecar(file)
        return sidecar.spec == planned.spec and planned.path.stat().st_size == sidecar.size
    except (TangoError, OSError):
        return False


def default_timing_cache(bundle: Bundle, target: Target) -> Path:
    """This machine's timing cache in the bundle: TensorRT ignores the cache of another GPU or version."""
    gpu = "".join(c if c.isalnum() else "-" for c in target.gpu)
    return bundle.path / FOLDER / f"timing-{gpu}-{target.tensorrt}.cache"


def require_memory(planned: EnginePlan, left: Free) -> None:
    """Rejects a build that probably exceeds the free memory or disk space.

    Raises:
        TangoError: Less is free than the estimate.
    """
    needs = planned.memory
    pools = [("GPU", needs.build_device, left.device), ("host", needs.build_host, left.host)]
    if left.shared:
        pools = [("shared", needs.build_device + needs.build_host, left.host)]
    for pool, needed, free in pools:
        if needed > free:
            raise TangoError(
                f"building {planned.graph} takes about {gigabytes(needed)} of {pool} memory, "
                f"{gigabytes(free)} are free",
                f"stop other processes that use it; {_USE_LESS}; --no-memory-check tries it anyway",
            )
    folder = planned.path.parent if planned.path.parent.is_dir() else planned.path.parent.parent
    disk = shutil.disk_usage(folder).free
    if needs.file > disk:
        raise TangoError(
            f"{planned.path.name} takes about {gigabytes(needs.file)}, the disk of {folder} has {gigabytes(disk)} free",
            f"free some; to list unused engines: tango doctor {folder.parent if folder.name == FOLDER else folder}",
        )


def _run(job: Job, lock: int, on_status: OnStatus) -> int:
    """Runs the job in a process; returns that process's peak resident set in bytes."""
    command = [sys.executable, "-m", "tango_runtime.engines.worker"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        # In a new session, ctrl-C reaches only this process, which then kills the worker. Both hold the lock.
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
            last = _follow(process.stdout, on_status)
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if code != 0 or "peak_host" not in last:
            raise _failure(job, code, last, log)
    return int(last["peak_host"])


def _follow(lines: IO[str], on_status: OnStatus) -> dict[str, Any]:
    """Forwards the worker's messages; returns the last."""
    stage, message = "starting", {}
    for line in lines:
        message = json.loads(line)
        stage = message.get("stage", stage)
        if "stage" in message or "fraction" in message:
            on_status(stage, message.get("fraction"))
    return message


def _failure(job: Job, code: int, last: dict[str, Any], log: IO[str]) -> TangoError:
    log.seek(0)
    lines = log.read().strip().splitlines()
    excerpt = [line for line in lines if "[E]" in line or "Error" in line][-4:] or lines[-4:]
    failed = f"building {job.spec.graph} failed"
    if code == -9 or any("out of memory" in line.lower() for line in lines):
        cause = "its process was killed, as the kernel does when memory runs out" if code == -9 else "out of memory"
        return TangoError(
            f"{failed}: {cause}", f"stop other processes that use memory; {_USE_LESS}; see: tango build --dry-run"
        )
    reason = last.get("error", f"its process exited with status {code}")
    return TangoError("\n".join([f"{failed}: {reason}", *excerpt]), "see what is missing: tango doctor")


def _install(engine: Path, partial: Path, sidecar: Sidecar) -> None:
    """Renames the finished files in an order that never leaves a sidecar beside an engine it does not describe."""
    final = engine.with_suffix(".json")
    with staged_file(final) as (beside, _):
        beside.write_text(json.dumps(asdict(sidecar), indent=2) + "\n", encoding="utf-8")
        final.unlink(missing_ok=True)
        partial.rename(engine)
        beside.rename(final)
