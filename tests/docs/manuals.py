"""What the tests of the documents share: Markdown files, and the commands, code and links in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs/guide").rglob("*.md"))

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)

#: What separates the programs of a shell's script, and redirections.
_PUNCTUATION = "|&;<>()\n"


def documents() -> list[Path]:
    """All Markdown files of the repository, but for those of installed packages."""
    folders = ("docs", "plugins", "benchmarks", "models", "examples", "tests", "containers", ".github")
    nested = [file for folder in folders for file in (ROOT / folder).rglob("*.md")]
    return sorted([*ROOT.glob("*.md"), *nested])


def name(document: Path) -> str:
    """Its path in the repository."""
    return document.relative_to(ROOT).as_posix()


@cache
def text(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def blocks(document: Path, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    return [body for _, language, body in _FENCE.findall(text(document)) if language in languages]


def prose(document: Path) -> str:
    """The text outside of code."""
    return re.sub(r"`[^`\n]*`", "``", _FENCE.sub("", text(document)))


def shell_commands(document: Path) -> list[list[str]]:
    """The programs that its shell blocks start, each with its arguments."""
    return [words for block in blocks(document, "bash", "sh") for words in _programs(block)]


def tango_commands(document: Path) -> list[list[str]]:
    """The arguments of `tango` in its shell blocks and indented blocks."""
    indented = re.findall(r"^    (tango.*)$", _FENCE.sub("", text(document)), re.MULTILINE)
    programs = [*shell_commands(document), *(words for line in indented for words in _programs(line))]
    return [_arguments(words) for words in programs if words[0] in ("tango", "tango-export")]


def mentioned_commands(document: Path) -> list[list[str]]:
    """The same of code between backticks, which may be a part of a command."""
    inline = re.findall(r"`(tango[ -][^`\n]+)`", _FENCE.sub("", text(document)))
    programs = [words for line in inline if "…" not in line for words in _programs(line)]
    return [_arguments(words) for words in programs if words[0] in ("tango", "tango-export")]


def _arguments(words: list[str]) -> list[str]:
    return ["export", *words[1:]] if words[0] == "tango-export" else words[1:]


def _programs(block: str) -> Iterator[list[str]]:
    """The programs that a shell would start, without variables before them, redirections and text of their input."""
    script = re.sub(r"<<\s*'?(\w+)'?(.*?)\n.*?^\1$", r"\2", block, flags=re.DOTALL | re.MULTILINE)
    script = re.sub(r"(?:^|\s)#\s.*$", "", script, flags=re.MULTILINE)
    script = re.sub(r"(?<=\|)\n\s*", " ", script.replace("\\\n", " "))
    lexer = shlex.shlex(script, posix=True, punctuation_chars=_PUNCTUATION)
    lexer.whitespace_split, lexer.whitespace, lexer.commenters = True, " \t", ""
    words: list[str] = []
    redirected = False
    for word in [*lexer, ";"]:
        if word and set(word) <= set("<>"):
            redirected = True
        elif word and set(word) <= set(_PUNCTUATION):
            while words and re.match(r"\w+=", words[0]):
                words = words[1:]
            if words:
                yield words
            words, redirected = [], False
        elif not redirected:
            words.append(word)


def links(document: Path) -> list[str]:
    """Targets of its links and pictures inside of the repository."""
    found = re.findall(r"\]\(<?([^)\s>]+)>?\)", prose(document))
    found += re.findall(r"^\[[^\]]+\]: (\S+)$", prose(document), re.MULTILINE)
    return [target for target in found if not re.match(r"\w+:", target)]


@cache
def anchors(document: Path) -> frozenset[str]:
    """What links to a part of it may name: its headings, as GitHub and the site write them, and named places."""
    found = set(re.findall(r'<\w+ (?:id|name)="([^"]+)"', text(document)))
    for heading in re.findall(r"^#+ +(.*?)\s*#*$", _FENCE.sub("", text(document)), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = base = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        count = 0
        while slug in found:
            count += 1
            slug = f"{base}_{count}"
        found.add(slug)
    return frozenset(found)
