"""One cold start in its own process: ``python -m tango_runtime.bench.cold REQUEST``; see measure.py."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from tango_plugins import TangoError
from tango_runtime.bench.measure import Case, Setting, make_question, measurable, peak_host
from tango_runtime.bundle import Bundle
from tango_runtime.pipeline.video_llm import VideoLLM


def main() -> int:
    """Prints a line of JSON: when the import was done (monotonic, s) and the times after it (ms), or an error."""
    imported = time.monotonic()
    try:
        found = _first_token(json.loads(sys.argv[1]))
    except TangoError as error:
        found = {"error": error.message, "hint": error.hint}
    print(json.dumps({"imported": imported, **found}))
    return 0


def _first_token(request: dict[str, Any]) -> dict[str, Any]:
    setting, case = Setting(**request["setting"]), Case(**request["case"])
    start = time.monotonic()
    llm = VideoLLM(measurable(Bundle.load(request["bundle"])), request["backend"], nvdec=setting.nvdec)
    loaded = time.monotonic()
    clip, question = setting.clip_of(case, llm.bundle), make_question(llm.bundle)
    asked = time.monotonic()
    llm.generate(clip, question, **setting.of_video(llm.bundle), prune=case.prune, max_new_tokens=1)
    first = time.monotonic()
    return {"load": 1e3 * (loaded - start), "first token": 1e3 * (first - asked), "host_memory": peak_host()}


if __name__ == "__main__":
    sys.exit(main())
