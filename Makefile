# Needs python3, make and a package index; everything else is installed into .venv.

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test lint clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export,cpu,calibration,test]'
	touch $@

demo: .venv/installed
	rm -rf $(DEMO) && mkdir $(DEMO)
	$(BIN)/python examples/make_checkpoint.py $(DEMO)/checkpoint
	$(BIN)/python examples/make_video.py $(DEMO)/clip.mp4
	$(BIN)/tango-export --model llava-ov --checkpoint $(DEMO)/checkpoint/llava --siglip $(DEMO)/checkpoint/siglip \
	    --output $(DEMO)/bundle
	$(BIN)/tango run $(DEMO)/bundle $(DEMO)/clip.mp4 "What happens in the video?" --max-new-tokens 16 \
	    --temperature 4 --seed 1 --report $(DEMO)/kept.html --picture $(DEMO)/kept.png

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest --numprocesses 2

clean:
	rm -rf .venv $(DEMO)
