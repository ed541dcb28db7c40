"""`tango`: the table of commands. Each command's module is imported when it is used."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from tango_plugins import TangoError
from tango_plugins.version import package_version
from tango_runtime.cli.command import Command
from tango_runtime.util.console import accept_every_character, printable, verbosity


@dataclass(frozen=True)
class Entry:
    """A line of the table of commands.

    Attributes:
        where: ``module:NAME`` of its :class:`Command`.
        extra: The extra of tango-edge that installs what it needs.
        summary: What it does, one line.
    """

    where: str
    extra: str
    summary: str


COMMANDS = {
    "run": Entry("tango_runtime.cli.run:RUN", "cpu", "answer a question about a video"),
    "chat": Entry("tango_runtime.cli.chat:CHAT", "cpu", "answer questions about a video, one after the other"),
    "watch": Entry("tango_runtime.cli.watch:WATCH", "cpu", "answer a question about a stream again and again"),
    "serve": Entry("tango_runtime.cli.serve:SERVE", "server", "answer questions over HTTP, as OpenAI's API does"),
    "batch": Entry("tango_runtime.cli.batch:BATCH", "cpu", "answer questions about many videos, into a file"),
    "inspect": Entry("tango_runtime.cli.inspect:INSPECT", "cpu", "show the contents of a bundle and check its files"),
    "plugin": Entry("tango_runtime.cli.plugin:PLUGIN", "cpu", "build the CUDA library and the TensorRT plugin"),
    "build": Entry("tango_runtime.cli.build:BUILD", "tensorrt", "build the TensorRT engines of a bundle"),
    "doctor": Entry(
        "tango_runtime.cli.doctor:DOCTOR", "cpu", "check this machine, and show how to fix what is missing"
    ),
    "plan": Entry("tango_runtime.cli.plan:PLAN", "cpu", "estimate whether a model fits a device, and its speed"),
    "bench": Entry("tango_runtime.cli.bench:BENCH", "cpu", "measure the speed and memory of a bundle on this machine"),
    "export": Entry("tango_export.cli.export:EXPORT", "export", "export a checkpoint to a bundle (also: tango-export)"),
    "validate": Entry("tango_export.cli.validate:VALIDATE", "validate", "compare a bundle with the original model"),
    "calibrate": Entry(
        "tango_calibration.cli.calibrate:CALIBRATE", "calibration", "quantize a bundle, with clips to observe"
    ),
    "evaluate": Entry(
        "tango_calibration.cli.evaluate:EVALUATE",
        "calibration",
        "measure accuracy, pruned and unpruned",
    ),
}

FAILED = 2

#: How argparse begins the errors that a question with a leading dash may cause.
_UNMATCHED = ("the following arguments are required", "unrecognized arguments")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = f"see: {self.prog} --help"
        if message.startswith(_UNMATCHED):
            hint += " (after -- an argument may start with a dash)"
        raise TangoError(message, hint)


def main(argv: Sequence[str] | None = None) -> int:
    """`tango COMMAND …`; the exit code is 0, 1 for a negative result, or 2 for an error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return _guarded(lambda: _dispatch(arguments), debug="--debug" in arguments)


def main_export() -> int:
    """`tango-export …`, the same as `tango export …`."""
    return _guarded(lambda: _run("export", "tango-export", sys.argv[1:]), debug="--debug" in sys.argv)


def parser(name: str, prog: str) -> argparse.ArgumentParser:
    """The parser of a command.

    Args:
        name: The command.
        prog: The program's name in its help text.

    Raises:
        TangoError: What the command needs is not installed. Parsing raises it too, for invalid arguments.
    """
    summary = COMMANDS[name].summary
    found = _Parser(prog=prog, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False)
    _load(name).configure(found)
    for leaf in leaves(found):
        _add_common(leaf)
    return found


def leaves(found: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of a command's subcommands, or its own if it has none."""
    nested = [action.choices for action in found._actions if isinstance(action, argparse._SubParsersAction)]
    return [leaf for choices in nested for leaf in choices.values()] or [found]


def _add_common(parser: argparse.ArgumentParser) -> None:
    """``--verbose``, ``--quiet`` and ``--debug``, which every command has."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "-v", "--verbose", action="count", default=0, help="show more of what is done; -vv shows debug messages"
    )
    group.add_argument("-q", "--quiet", action="store_true", help="show only results and errors")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _verbosity(args: argparse.Namespace) -> int:
    """-1 for ``--quiet``, else how often ``--verbose`` was given."""
    return -1 if args.quiet else int(args.verbose)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {entry.summary}" for name, entry in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tango COMMAND [--help]",
            "",
            "Video LLMs on NVIDIA devices, with a tenth of the video tokens.",
            "",
            *lines,
        ]
    )


def _guarded(action: Callable[[], int], *, debug: bool) -> int:
    """Runs a command; errors that the user can fix are printed as two lines, `error:` and `hint:`."""
    accept_every_character()
    if threading.current_thread() is threading.main_thread():  # only this thread may set signal handlers
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = action()
        print(end="", flush=True)  # an error at the interpreter's end would have no hint
        return code
    except TangoError as error:
        if debug:
            raise
        return _fail(error.message, error.hint)
    except BrokenPipeError:  # standard output was closed, as by `tango run … | head`
        _drop_output()
        return FAILED
    except OSError as error:
        if debug:
            raise
        _drop_output()
        return _fail(_os_message(error), _os_hint(error))
    except KeyboardInterrupt:
        return _fail("interrupted", "no half-written output was left behind; run it again")


def _drop_output() -> None:
    """Lets what standard output did not take go to nowhere: the interpreter would fail on it once more at its end."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, hint: str) -> int:
    # Names in a message may be a stranger's, and must not steer the terminal.
    lines = [printable(line) for line in f"error: {message}\nhint: {hint}".split("\n")]
    with suppress(OSError):  # of a standard error that is full: the exit code remains
        print(*lines, sep="\n", file=sys.stderr)
    return FAILED


def _os_message(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{error.filename}: {reason}"


def _os_hint(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space on the disk"
    if error.errno == errno.ENOMEM:
        return "stop other programs that use memory"
    if error.errno == errno.EMFILE:
        return "allow more open files: ulimit -n 4096"
    if error.filename is not None:
        return "check that the path exists and that you may read or write there"
    return "to see where it failed, add --debug"


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments in (["-h"], ["--help"]):
        print(_overview())
        return 0
    if arguments == ["--version"]:
        print(f"tango-edge {package_version()}")
        return 0
    return _run(arguments[0], f"tango {arguments[0]}", arguments[1:])


def _run(name: str, prog: str, arguments: Sequence[str]) -> int:
    if name not in COMMANDS:
        raise TangoError(f"there is no command {name!r}", f"commands are {', '.join(COMMANDS)}")
    args = parser(name, prog).parse_args(arguments)
    with verbosity(_verbosity(args)):
        return _load(name).run(args)


def _load(name: str) -> Command:
    entry = COMMANDS[name]
    module, attribute = entry.where.split(":")
    try:
        with _uninterrupted():
            command: Command = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tango_"):  # our own: a broken installation, no missing extra
            raise
        raise TangoError(
            f"tango {name} needs {error.name}, which is not installed", f"pip install 'tango-edge[{entry.extra}]'"
        ) from error
    return command


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delays signals until the end: an interrupted import leaves broken modules, or aborts the process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


if __name__ == "__main__":
    sys.exit(main())
