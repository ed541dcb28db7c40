"""Prints, as JSON, what an installed tango-edge does with a bundle and with its CUDA library where there is no GPU.

    python aarch64_observed.py BUNDLE FOLDER --frames 8

FOLDER holds videos and a questions.jsonl. tools/aarch64.py runs it on two machines and compares the entries, except
the machine, the version of Python and the number of kept tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tango_plugins import PruneParams, TangoError, structs
from tango_plugins.native_library import load, search
from tango_plugins.pruner import CudaPruner
from tango_runtime import VideoLLM
from tango_runtime.pipeline.encoded import EncodedVideo


def main() -> None:
    """Prints what it observes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("folder", type=Path)
    parser.add_argument("decoded", type=Path)
    parser.add_argument("--python", default=sys.executable, help="starts this interpreter again (default: itself)")
    args = parser.parse_args()
    sys.executable = args.python
    observed = {"machine": platform.machine(), "python": platform.python_version()}
    llm, frames = VideoLLM(args.bundle), np.load(args.decoded)
    asked = [json.loads(line) for line in (args.folder / "questions.jsonl").read_text().splitlines()]
    questions = [each["question"] for each in asked]
    file = _answers(llm, llm.encode(args.folder / asked[0]["video"], frames=len(frames)), questions)
    decoded = _answers(llm, llm.encode(frames, frames=len(frames), fps=1.0), questions)
    observed |= _library() | {"backend": llm.backend}
    observed |= {f"{name} of a file": value for name, value in file.items()}
    observed |= {f"{name} of decoded frames": value for name, value in decoded.items()}
    print(json.dumps(observed))


def _answers(llm: VideoLLM, video: EncodedVideo, questions: Sequence[str]) -> dict[str, Any]:
    """Kept tokens and answers' token ids, at retention ratios 0.1 and 1."""
    found: dict[str, Any] = {"number of kept tokens": [], "kept tokens": [], "ids": []}
    for ratio in (0.1, 1.0):
        with llm.session(video, retention_ratio=ratio) as session:
            answers = [session.ask(question, max_new_tokens=8) for question in questions]
        found["number of kept tokens"].append(answers[0].kept)
        found["kept tokens"].append(answers[0].indices.tolist())
        found["ids"] += [answer.ids for answer in answers]
    return found


def _library() -> dict[str, Any]:
    """The results of the CUDA library's functions that need no GPU."""
    library = load()  # compares its interface and the sizes of all structs
    pruners = [CudaPruner(PruneParams(), frames, 896, precision="exact") for frames in (1, 32, 256)]
    rejected = []
    for frames, width in ((4, 63), (257, 64)):
        try:
            CudaPruner(PruneParams(), frames, width)
        except TangoError as error:
            rejected.append(error.message)
    shape = structs.TangoPruneShape(1, 1, 2, 0)
    status = library.tango_prune_enqueue(ctypes.byref(shape), None, None, None, 0, None)
    return {
        "library": search()[-1].origin,
        "version": library.tango_version().decode(),
        "sizes": {struct.__name__: library.tango_sizeof(struct.__name__.encode()) for struct in structs.STRUCTS},
        "workspaces": [(pruner.capacity, pruner.workspace_bytes) for pruner in pruners],
        "rejected": [*rejected, status, library.tango_last_error().decode()],
    }


if __name__ == "__main__":
    main()
