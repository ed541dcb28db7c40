"""Makes a small bundle whose heads are the released checkpoints', where torch and transformers are:

python -m tests.gpu.runtime.heads FOLDER

writes FOLDER/heads, for test_device_graphs_on_gpu.py. Which kernel computes an attention depends on them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

#: Two heads of 72 in the tower, 14 of 64 over 2 in the decoder, as in the 0.5B.
HEADS = {"vision_width": 144, "vision_heads": 2, "width": 896, "heads": 14, "kv_heads": 2, "intermediate": 256}


def write(folder: Path) -> Path:
    """A bundle in fp16, with the outliers that are planted in small checkpoints."""
    from examples.make_checkpoint import Shape, make
    from tango_export.export import Request, export

    work = folder / "heads.work"
    work.mkdir(parents=True)
    llava, siglip = make(work, "llava-hf", Shape(**HEADS, image=112))
    made = export(Request(checkpoint=str(llava), salience=str(siglip), output=folder / "heads", context=4096))
    shutil.rmtree(work)
    return made


if __name__ == "__main__":
    write(Path(sys.argv[1]))
