"""Makes small bundles of Qwen2.5-VL and LLaVA-Video whose heads are the released checkpoints'.

python -m tests.gpu.runtime.families FOLDER

where torch and transformers are, writes FOLDER/qwen, FOLDER/video and FOLDER/inner (with inner pruning) in fp16, and
FOLDER/inner-fp32, for tests/gpu/runtime/test_family_graphs.py.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from tests import conftest

NAMES = ("qwen", "video", "inner")

#: What ``inner`` is compared with.
EXACT = "inner-fp32"

#: Heads of 80 in the tower, 4 of 128 over 2 in the decoder; an MLP whose rows are filled up, as the released one's are.
QWEN = {
    **{"vision_width": 160, "vision_heads": 2, "vision_intermediate": 180},
    **{"width": 512, "heads": 4, "kv_heads": 2, "sections": (16, 24, 24), "intermediate": 256},
}

#: Heads of 72 in the tower, 4 of 128 over 2 in the decoder.
VIDEO = {
    **{"vision_width": 144, "vision_heads": 2, "image": 126},
    **{"width": 512, "heads": 4, "kv_heads": 2, "intermediate": 256, "layers": 4},
}


def write(folder: Path) -> None:
    """Writes the bundles."""
    from examples.make_checkpoint import VIDEO_LAYOUT
    from examples.make_checkpoint import Shape as VideoShape
    from examples.make_checkpoint import make as make_video
    from examples.make_qwen_checkpoint import Shape as QwenShape
    from examples.make_qwen_checkpoint import make as make_qwen
    from tango_export.export import Request, export
    from tango_runtime.bundle import InnerPruning

    work = folder / "families.work"
    work.mkdir(parents=True)
    qwen = make_qwen(work / "qwen", shape=QwenShape(**QWEN), outliers=False)
    video, siglip = make_video(work, VIDEO_LAYOUT, VideoShape(**VIDEO), outliers=False)
    for checkpoint in (qwen, video):
        conftest._make_responsive(checkpoint, outliers=False)
    export(Request("qwen2.5-vl", str(qwen), output=folder / "qwen", frames=8, context=4096))
    plain = Request("llava-video", str(video), str(siglip), frames=8, context=4096)
    export(replace(plain, output=folder / "video"))
    for name, dtype in (("inner", "fp16"), (EXACT, "fp32")):
        export(replace(plain, output=folder / name, dtype=dtype, inner=InnerPruning(2, 0.5)))
    shutil.rmtree(work)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
