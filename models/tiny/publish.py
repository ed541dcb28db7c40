"""Copies the results of score.py into docs/evaluation.md, and their picture beside it.

    python models/tiny/publish.py RESULTS/all docs/evaluation.md

The text between the document's two marks is replaced; do not edit it by hand.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from tango_calibration.evaluation.results import PICTURE

BEGIN, END = "<!-- results: models/tiny/publish.py -->", "<!-- end of results -->"

#: Tables of types and tags are shown for this ratio only.
RATIO = "0.1"

#: Times mean nothing when many processes share a GPU.
HIDDEN = "Tokens and time"

ALT = "Accuracy kept over the share of tokens kept, and Tango's lead over each method"


def shown_sections(results: str) -> str:
    """The conditions and the shown sections of a results.md, one heading level lower."""
    conditions, *sections = results.split("\n## ")
    _, _, facts = conditions.partition("\n")
    shown = [section for section in sections if _is_shown(section.split("\n", 1)[0])]
    return "\n".join([facts.strip(), "", *(f"### {section.strip()}\n" for section in shown)])


def _is_shown(title: str) -> bool:
    return title != HIDDEN and (" of question at " not in title or title.endswith(f" at {RATIO}"))


def publish(folder: Path, document: Path) -> None:
    """Writes a folder of results into the document and copies its picture.

    Raises:
        ValueError: The document does not have the marks.
    """
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{document} does not have {BEGIN} and {END}")
    tables = shown_sections((folder / "results.md").read_text(encoding="utf-8"))
    shutil.copyfile(folder / PICTURE, document.parent / PICTURE)
    body = f"{begin}\n\n![{ALT}]({PICTURE})\n\n{tables}\n{end}"
    document.write_text(before + body + after, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Copy results into a document.")
    parser.add_argument("results", type=Path, help="folder with results.md and its picture")
    parser.add_argument("document", type=Path)
    args = parser.parse_args(arguments)
    publish(args.results, args.document)


if __name__ == "__main__":
    main()
