"""Print a table that asks questions about every video of a folder: python make_questions.py FOLDER QUESTION …"""

import json
import sys
from pathlib import Path

folder, questions = Path(sys.argv[1]), sys.argv[2:]
for video in sorted(folder.glob("*.mp4")):
    for number, question in enumerate(questions, 1):
        row = {"id": f"{video.stem}-{number}", "video": video.name, "question": question}
        print(json.dumps(row, ensure_ascii=False))
