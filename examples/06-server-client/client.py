"""Ask a server with OpenAI's client, about a file and about frames: python client.py URL MODEL FOLDER

The server reads clip.mp4 under its --media-root; the frames of FOLDER (JPEGs named by milliseconds) are sent along.
"""

import base64
import sys
from pathlib import Path

from openai import OpenAI

QUESTION = {"type": "text", "text": "What is the shape of the yellow object?"}

url, model, folder = sys.argv[1:]
client = OpenAI(base_url=url, api_key="none")

# A video that the server reads, at another retention ratio, answered piece by piece.
video = {"type": "video_url", "video_url": {"url": "file:clip.mp4"}}
pieces = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": [video, QUESTION]}],
    max_tokens=32,
    stream=True,
    extra_body={"retention_ratio": 0.05, "frames": 16},
)
for piece in pieces:
    if piece.choices:
        print(piece.choices[0].delta.content or "", end="", flush=True)
print()

# Frames that the client sends, each with its time.
frames = [
    {
        "type": "image_url",
        "image_url": {
            "url": "data:image/jpeg;base64," + base64.b64encode(file.read_bytes()).decode(),
            "seconds": int(file.stem) / 1000,
        },
    }
    for file in sorted(Path(folder).glob("*.jpg"))
]
answer = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": [*frames, QUESTION]}], max_tokens=32
)
print(answer.choices[0].message.content)
print(f"kept {answer.tango['kept_tokens']} tokens of {len(frames)} frames")
