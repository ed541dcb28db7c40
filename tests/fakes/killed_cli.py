"""``tango`` that is killed, as by kill -9, when so many bytes of a line have been appended to a file of lines.

python -m tests.fakes.killed_cli LINE BYTES COMMAND…
"""

from __future__ import annotations

import os
import signal
import sys

from tango_runtime.util.files import AppendedFile


def die_in(line: int, size: int) -> None:
    """Lets the process die in the append of a line, counted from 0, after so many of its bytes; -1 for all of them."""
    appended, append = 0, AppendedFile.append

    def count(file: AppendedFile, content: bytes) -> None:
        nonlocal appended
        if appended == line:
            append(file, content if size < 0 else content[:size])
            os.kill(os.getpid(), signal.SIGKILL)
        appended += 1
        append(file, content)

    AppendedFile.append = count  # type: ignore[method-assign]


if __name__ == "__main__":
    from tango_runtime.cli.main import main

    die_in(int(sys.argv[1]), int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
