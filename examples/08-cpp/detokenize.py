"""Make text of token ids from standard input: python detokenize.py BUNDLE < ids.txt"""

import sys
from pathlib import Path

from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(str(Path(sys.argv[1]) / "tokenizer.json"))
print(tokenizer.decode([int(token) for token in sys.stdin.read().split()]))
