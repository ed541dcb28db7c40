"""Ask several questions about one video, and continue a chat: python ask_many.py BUNDLE VIDEO"""

import sys

from tango_runtime import VideoLLM

QUESTIONS = ["What is the shape of the yellow object?", "What is the colour of the cross?"]

llm = VideoLLM(sys.argv[1])
video = llm.encode(sys.argv[2], frames=16)  # decoded and encoded once, for any number of sessions

# Every session prunes at its own ratio. Its questions are independent of each other.
for ratio in (0.05, 0.2):
    with llm.session(video, retention_ratio=ratio) as session:
        print(f"{session.kept} of {session.total} tokens")
        for question in QUESTIONS:
            print(f"  {question} {session.ask(question, max_new_tokens=8).text}")

# A chat continues: the decoder sees the messages and answers before.
with llm.session(video) as session:
    first = session.chat(QUESTIONS[0], max_new_tokens=8)
    second = session.chat("How many times does it appear?", max_new_tokens=8)
    print(f"chat: {first.text} ({first.prompt_tokens} positions), {second.text} ({second.prompt_tokens} positions)")
