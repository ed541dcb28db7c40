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
from pathlib import Path
from typing import Any

from tango_plugins import PruneParams, TangoError, structs
from tango_plugins.native_library import load, search
from tango_plugins.pruner import CudaPruner
from tango_runtime import VideoLLM


def main() -> None:
    """Prints what it observes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--python", default=sys.executable, help="starts this interpreter again (default: itself)")
    args = parser.parse_args()
    sys.executable = args.python
    observed = {"machine": platform.machine(), "python": platform.python_version()}
    print(json.dumps(observed | _library() | _answers(args.bundle, args.folder, args.frames)))


def _answers(bundle: str, folder: Path, frames: int) -> dict[str, Any]:
    """The token ids of each answer, from a tenth of the video's tokens and from all of them."""
    llm, kept, ids = VideoLLM(bundle), [], []
    asked = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for ratio in (0.1, 1.0):
        with llm.session(folder / asked[0]["video"], frames=frames, retention_ratio=ratio) as session:
            answers = [session.ask(question["question"], max_new_tokens=8) for question in asked]
        kept += [answer.kept for answer in answers]
        ids += [answer.ids for answer in answers]
    return {"backend": llm.backend, "kept tokens": kept, "ids": ids}


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
