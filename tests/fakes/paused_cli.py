"""``tango`` that waits after a certain line, so a test can interrupt it there however slow the machine is.

python -m tests.fakes.paused_cli LINE COMMAND…
"""

from __future__ import annotations

import sys
from typing import Any


class PausingStream:
    """A text stream that waits for the end of standard input after a line is written.

    Args:
        stream: The stream.
        line: The start of the line.
    """

    def __init__(self, stream: Any, line: str) -> None:
        self._stream, self._line = stream, line

    def write(self, text: str) -> int:
        count: int = self._stream.write(text)
        if text.startswith(self._line):
            self._stream.flush()
            sys.stdin.read()
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


if __name__ == "__main__":
    from tango_runtime.cli.main import main

    sys.stderr = PausingStream(sys.stderr, sys.argv[1])
    sys.exit(main(sys.argv[2:]))
