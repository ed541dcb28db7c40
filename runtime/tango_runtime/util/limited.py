"""What a stranger wrote, read by a process with limits: it may have no end, or take all memory.

This file is also the program of that process, which imports nothing else of tango-edge but the file that replies: it
starts fast.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def limited_reply(file: Path, request: object, *, processor_s: int, in_all_s: int, memory: int) -> Any:
    """What ``reply(request)`` of a Python file gives.

    Args:
        file: The file.
        request: What it is asked, as JSON has it; so is what it gives.
        processor_s: Most seconds of processor time.
        in_all_s: Most seconds until it has replied.
        memory: Most bytes of address space.

    Raises:
        subprocess.TimeoutExpired, subprocess.CalledProcessError: It did not reply within its limits.
    """
    # Isolated, without site-packages' hooks: what is imported comes from the path of this process alone.
    program = [sys.executable, "-I", "-S", __file__, str(file), str(processor_s), str(memory)]
    given = json.dumps({"path": [folder for folder in sys.path if folder], "request": request})
    done = subprocess.run(program, input=given, capture_output=True, text=True, timeout=in_all_s, check=True)
    return json.loads(done.stdout)


def limit_this_process(limits: Mapping[int, int]) -> None:
    """Sets limits by their number in :mod:`resource`; one that is lower already stays."""
    for kind, most in limits.items():
        allowed = resource.getrlimit(kind)[1]
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(kind, (most, most))


def main() -> None:
    """Replies to one request on standard input: ``limited.py FILE SECONDS BYTES``."""
    file, seconds, size = sys.argv[1:]
    limit_this_process({resource.RLIMIT_CPU: int(seconds), resource.RLIMIT_AS: int(size), resource.RLIMIT_CORE: 0})
    given = json.load(sys.stdin)
    sys.path[:] = given["path"]
    found: dict[str, Any] = {"__name__": Path(file).stem}
    exec(compile(Path(file).read_bytes(), file, "exec"), found)
    json.dump(found["reply"](given["request"]), sys.stdout)


if __name__ == "__main__":
    main()
