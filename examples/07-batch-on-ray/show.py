"""Print the answers of tango batch, in order of their ids: python show.py ANSWERS.jsonl"""

import json
import sys
from pathlib import Path

lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
for row in sorted(map(json.loads, lines), key=lambda row: (row["id"], row["retention_ratio"])):
    print(f"{row['id']} at {row['retention_ratio']}: {row['answer']}  ({row['kept']} of {row['total']} tokens)")
