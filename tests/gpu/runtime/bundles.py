"""Makes the bundles that the tests on the GPU take, where torch and transformers are:

python -m tests.gpu.runtime.bundles FOLDER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests import conftest


class _Folders:
    """What the fixture asks of pytest's tmp_path_factory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def mktemp(self, name: str) -> Path:
        (self.root / name).mkdir(parents=True)
        return self.root / name


def main() -> None:
    """Writes FOLDER/fp32 and FOLDER/fp16."""
    folder = Path(sys.argv[1])
    responsive_checkpoint = conftest.responsive_checkpoint.__wrapped__(_Folders(folder / "work"))
    for dtype in ("fp32", "fp16"):
        responsive_checkpoint(dtype=dtype)[1].rename(folder / dtype)
    shutil.rmtree(folder / "work")


if __name__ == "__main__":
    main()
