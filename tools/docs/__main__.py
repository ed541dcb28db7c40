"""Writes the generated parts of docs/; with ``--check`` only says which are stale."""

from __future__ import annotations

import argparse
import sys

from tools.docs.pages import ROOT, generated, stale


def main() -> int:
    """Writes or checks the pages; returns 1 if a check found a stale one."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    check = parser.parse_args().check
    found = stale()
    for page in found:
        print(f"{'stale' if check else 'wrote'} {page.relative_to(ROOT)}")
        if not check:
            page.write_text(generated(page), encoding="utf-8")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
