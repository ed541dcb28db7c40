"""`tango`: a table of commands and where each lives, imported when used."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import NoReturn

from tango_plugins import TangoError


@dataclass(frozen=True)
class Command:
    """A command: what it takes and what it does.

    Attributes:
        configure: Adds its arguments to a parser.
        run: Does it, and gives the exit code.
    """

    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


@dataclass(frozen=True)
class _Entry:
    where: str
    extra: str
    summary: str


_COMMANDS = {
    "run": _Entry("tango_runtime.cli.run:RUN", "cpu", "answer a question about a video"),
    "inspect": _Entry("tango_runtime.cli.inspect:INSPECT", "cpu", "say what a bundle holds, and check its files"),
    "plugin": _Entry("tango_runtime.cli.plugin:PLUGIN", "cpu", "build the CUDA library and the TensorRT plugin"),
    "build": _Entry("tango_runtime.cli.build:BUILD", "tensorrt", "build a bundle's engines for this machine"),
    "doctor": _Entry(
        "tango_runtime.cli.doctor:DOCTOR", "cpu", "say what this machine has and lacks, and what mends it"
    ),
    "plan": _Entry("tango_runtime.cli.plan:PLAN", "cpu", "say whether a model fits a device, and about how fast"),
    "bench": _Entry("tango_runtime.cli.bench:BENCH", "cpu", "measure how fast a bundle is here, and its memory"),
    "export": _Entry("tango_export.cli:EXPORT", "export", "make a bundle of a checkpoint (also: tango-export)"),
    "validate": _Entry("tango_export.cli:VALIDATE", "validate", "compare a bundle with the original model"),
    "calibrate": _Entry(
        "tango_calibration.cli.calibrate:CALIBRATE", "calibration", "make a quantised bundle of a bundle"
    ),
    "evaluate": _Entry(
        "tango_calibration.cli.evaluate:EVALUATE", "calibration", "measure what pruning costs in accuracy"
    ),
}

FAILED = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TangoError(message, f"see: {self.prog} --help (behind -- an argument may begin with a dash)")


def main(argv: Sequence[str] | None = None) -> int:
    """`tango COMMAND …`; the exit code is 0, 1 for a verdict that is no, or 2 for an error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in ([], ["-h"], ["--help"]):
        print(_overview())
        return 0
    if arguments == ["--version"]:
        print(f"tango-edge {version('tango-edge')}")
        return 0
    return _guarded(arguments[0], f"tango {arguments[0]}", arguments[1:])


def main_export() -> int:
    """`tango-export …`, the same as `tango export …`."""
    return _guarded("export", "tango-export", sys.argv[1:])


def _overview() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name:<{width}}  {entry.summary}" for name, entry in _COMMANDS.items()]
    return "\n".join(
        ["usage: tango COMMAND [--help]", "", "Video LLMs on NVIDIA devices, a tenth of the video tokens.", "", *lines]
    )


def _guarded(name: str, prog: str, arguments: Sequence[str]) -> int:
    """Runs a command; what the user can mend comes out as two lines, `error:` and `hint:`."""
    if threading.current_thread() is threading.main_thread():  # no other may say what a signal does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    debug = "--debug" in arguments
    try:
        return _run(name, prog, arguments)
    except TangoError as error:
        if debug:
            raise
        return _fail(error.message, error.hint)
    except BrokenPipeError:  # who reads the answer has left, as `tango run … | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if debug:
            raise
        return _fail(str(error), "check that the path exists and that you may read or write there")
    except KeyboardInterrupt:
        return _fail("interrupted", "nothing half-written was left behind; run it again")


def _fail(message: str, hint: str) -> int:
    print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    return FAILED


def _run(name: str, prog: str, arguments: Sequence[str]) -> int:
    if name not in _COMMANDS:
        raise TangoError(f"there is no command {name!r}", f"commands are {', '.join(_COMMANDS)}")
    return _load(name).run(parser(name, prog).parse_args(arguments))


def parser(name: str, prog: str) -> argparse.ArgumentParser:
    """The parser of a command.

    Args:
        name: The command.
        prog: What its help calls it.

    Raises:
        TangoError: What the command needs is not installed. Parsing raises it too, for arguments that do not fit.
    """
    found = _Parser(prog=prog, description=f"{_COMMANDS[name].summary.capitalize()}.", allow_abbrev=False)
    _load(name).configure(found)
    found.add_argument("--debug", action="store_true", help="show a traceback for an error")
    return found


def _load(name: str) -> Command:
    entry = _COMMANDS[name]
    module, attribute = entry.where.split(":")
    try:
        with _uninterrupted():
            command: Command = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise TangoError(
            f"tango {name} needs {error.name}, which is not installed", f"pip install 'tango-edge[{entry.extra}]'"
        ) from error
    return command


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds signals back until the end: an import that is interrupted leaves broken modules, or aborts the process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


if __name__ == "__main__":
    sys.exit(main())
