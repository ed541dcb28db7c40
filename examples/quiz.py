"""Ask a bundle the questions of a folder, from all of the video tokens and from a tenth of them.

    python examples/quiz.py BUNDLE FOLDER --frames 16 --report kept.html --picture kept.png

FOLDER holds videos and a questions.jsonl (docs/guide/evaluate.md); `examples/make_clip.py` makes one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tango_calibration.data.dataset import read_folder
from tango_calibration.data.judging import is_correct
from tango_calibration.data.questions import Question
from tango_runtime import Answer, VideoLLM


def line(question: Question, answer: Answer) -> str:
    """What was kept, how long the stages took, and what was said."""
    stages = ", ".join(f"{name} {answer.stages[name]:.0f} ms" for name in ("prune", "prefill") if name in answer.stages)
    mark = "right" if is_correct(question, answer.text) else "wrong"
    return f"  {answer.kept:5} of {answer.total} tokens: {answer.text:14} {mark}   ({stages})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder that tango-export wrote")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, help="frames sampled of a video (default: the bundle's)")
    parser.add_argument("--retention-ratio", type=float, default=0.1, help="fraction kept (default: %(default)s)")
    parser.add_argument("--report", type=Path, metavar="OUT.html", help="what the last answer was read from")
    parser.add_argument("--picture", type=Path, metavar="OUT.png", help="the same as a picture")
    args = parser.parse_args(arguments)

    llm = VideoLLM(args.bundle)
    print(llm.backend)
    for video in read_folder(args.folder, args.frames or llm.bundle.manifest.video.frames):
        for question in video.questions:
            print(f"\n{question.text}  Truth: {question.answer}")
            for prune in (False, True):
                answer = llm.generate(
                    video.source, question.text, frames=video.frames, retention_ratio=args.retention_ratio, prune=prune
                )
                print(line(question, answer), flush=True)
    report = llm.report(answer, video.name)
    if args.report:
        report.write(args.report)
    if args.picture:
        report.picture(args.picture)


if __name__ == "__main__":
    main()
