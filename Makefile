# Needs python3, make and a package index; everything else is installed into .venv.

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
CHECKPOINT := models/tiny

.PHONY: demo docs test test-slow lint clean

# The demo needs no torch; the tests compare with transformers. Both live in one environment.
.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export,cpu,server]'
	touch $@

.venv/installed: .venv/demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[validate,cpu,calibration,server,docs,test]'
	touch $@

demo: .venv/demo
	rm -rf $(DEMO)
	$(BIN)/tango-export --checkpoint $(CHECKPOINT)/llava --salience-checkpoint $(CHECKPOINT)/siglip --sink-positions --context 12800 \
	    --output $(DEMO)/bundle
	$(BIN)/python examples/make_clip.py $(DEMO)/videos --frames 16
	$(BIN)/python examples/quiz.py $(DEMO)/bundle $(DEMO)/videos --frames 16 \
	    --report $(DEMO)/kept.html --picture $(DEMO)/kept.png
	@echo
	@echo 'What the last answer was read from:  $(DEMO)/kept.html'
	@echo 'Ask more, in a browser:              $(BIN)/tango serve $(DEMO)/bundle --media-root $(DEMO)/videos'

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The generated parts of docs/: tables of options, limits, results, …
.PHONY: reference
reference: .venv/installed
	$(BIN)/python -m tools.docs

test: lint
	$(BIN)/pytest --numprocesses 2

# What takes longer (builds by nvcc, kernels in emulation, searches for races, accuracies), or asks a package index.
test-slow: .venv/installed
	$(BIN)/pytest --numprocesses 2 -m "slow or network"

# The documentation site. A link, an anchor or a page that leads nowhere is an error.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv $(DEMO) site
