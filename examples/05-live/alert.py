"""Watch a stream, and ask more when an answer is the expected one: python alert.py BUNDLE SOURCE QUESTION ALERT

SOURCE is a file, or rtsp://…, http://…, or - for standard input.
"""

import sys

from tango_runtime import VideoLLM

FOLLOW_UP = "What is the colour of the cross?"

bundle, source, question, alert = sys.argv[1:]
with VideoLLM(bundle).live(source, window=8, fps=2) as live:
    for answer in live.watch(question, step=2, max_new_tokens=8):
        begin, end = answer.live.begin, answer.live.end
        print(f"{begin:4.1f} to {end:4.1f} s: {answer.text}", flush=True)
        if alert in answer.text.split():
            # The window is as it was: this costs the question's own tokens only.
            print(f"ALERT: {live.ask(FOLLOW_UP, max_new_tokens=8).text}", flush=True)
            break
