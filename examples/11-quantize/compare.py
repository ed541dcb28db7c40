"""Ask two bundles the same questions: python compare.py BUNDLE QUANTIZED FOLDER

FOLDER holds videos and a questions.jsonl.
"""

import json
import sys
from pathlib import Path

import numpy as np

from tango_runtime import VideoLLM

folder = Path(sys.argv[3])
models = [VideoLLM(path) for path in sys.argv[1:3]]
for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    first, second = (
        llm.generate(folder / row["video"], row["question"], frames=16, max_new_tokens=8) for llm in models
    )
    same = len(np.intersect1d(first.indices, second.indices)) / first.kept
    print(row["question"])
    print(f"  {first.text}, quantized: {second.text}  ({same:.0%} of the kept tokens are the same)")
