"""Answer a question about a video file: python ask.py BUNDLE VIDEO QUESTION"""

import sys

from tango_runtime import TangoError, VideoLLM


def main() -> None:
    bundle, video, question = sys.argv[1:]
    llm = VideoLLM(bundle)
    with llm.stream(video, question, frames=16, max_new_tokens=32) as pieces:
        for text in pieces:
            print(text, end="", flush=True)
        print()
    answer = pieces.answer
    print(f"kept {answer.kept} of {answer.total} video tokens")


if __name__ == "__main__":
    try:
        main()
    except TangoError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
