"""The commands, from their parsers. argparse's own help is laid out differently by different versions of Python."""

from __future__ import annotations

import argparse
import re

from tango_runtime.cli.main import COMMANDS, leaves, parser
from tools.docs.markdown import code, table

#: Options that every command has; the page describes them once.
COMMON = ("help", "verbose", "quiet", "debug")

_DEFAULT = re.compile(r"^(?P<text>.*?) \((?:(?P<note>.*); )?default: (?P<default>.*)\)$", re.DOTALL)


def reference() -> str:
    """A section for each command: a line of usage, its arguments and its options."""
    return "\n".join(_section(leaf) for name in COMMANDS for leaf in leaves(parser(name, f"tango {name}")))


def common_options() -> str:
    """The options of every command."""
    leaf = parser("run", "tango run")
    found = [action for action in leaf._actions if action.dest in COMMON]
    return table(("option", "meaning"), [(_names(action), _help(action, leaf)) for action in found])


def _section(leaf: argparse.ArgumentParser) -> str:
    found = [action for action in leaf._actions if action.dest not in COMMON]
    arguments = [action for action in found if not action.option_strings]
    options = [action for action in found if action.option_strings]
    usage = " ".join([leaf.prog, *map(_usage, arguments), *(["[OPTIONS]"] if options else [])])
    blocks = [
        f"## {leaf.prog}\n",
        f"{_summary(leaf)}\n",
        f"```text\n{usage}\n```\n",
        table(("argument", "meaning"), [(code(_metavar(each)), _help(each, leaf)) for each in arguments]),
        table(("option", "value", "default", "meaning"), [_option(each, leaf) for each in options]),
        *(f"{note}\n" for note in _exclusive(leaf)),
    ]
    return "\n".join(filter(None, blocks))


def _summary(leaf: argparse.ArgumentParser) -> str:
    """What a command does; of a subcommand, what its parent says of it."""
    if leaf.description:
        return leaf.description
    _, name, action = leaf.prog.split()
    parent = parser(name, f"tango {name}")
    for found in parent._actions:
        for choice in found._get_subactions() if isinstance(found, argparse._SubParsersAction) else ():
            if choice.dest == action and choice.help:
                return f"{choice.help[0].upper()}{choice.help[1:]}."
    raise ValueError(f"{leaf.prog} has no summary")


def _option(action: argparse.Action, leaf: argparse.ArgumentParser) -> tuple[str, str, str, str]:
    text, default = _help(action, leaf), "required" if action.required else ""
    if found := _DEFAULT.match(text):
        text, default = found["text"] + (f" ({found['note']})" if found["note"] else ""), found["default"]
    return _names(action), _value(action), default, text


def _help(action: argparse.Action, leaf: argparse.ArgumentParser) -> str:
    return (action.help or "") % {**vars(action), "prog": leaf.prog}


def _names(action: argparse.Action) -> str:
    return ", ".join(map(code, action.option_strings))


def _value(action: argparse.Action) -> str:
    """What follows the option; a flag has nothing."""
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        several = "one or more of " if action.nargs == "+" else ""
        return several + ", ".join(code(str(choice)) for choice in action.choices)
    return code(_with_count(action, _metavar(action)))


def _usage(action: argparse.Action) -> str:
    return _with_count(action, _metavar(action))


def _with_count(action: argparse.Action, name: str) -> str:
    return {None: name, "?": f"[{name}]", "+": f"{name} …", "*": f"[{name} …]"}[action.nargs]  # type: ignore[index]


def _metavar(action: argparse.Action) -> str:
    found = action.metavar if isinstance(action.metavar, str) else action.dest
    return found if action.option_strings and action.metavar else found.upper()


def _exclusive(leaf: argparse.ArgumentParser) -> list[str]:
    groups = [group._group_actions for group in leaf._mutually_exclusive_groups]
    names = [" and ".join(code(action.option_strings[0]) for action in group) for group in groups]
    shown = [name for name, group in zip(names, groups, strict=True) if group[0].dest not in COMMON]
    return [f"{name} are mutually exclusive." for name in shown]
