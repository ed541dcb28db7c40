# Needs python3, make and a package index; everything else is installed into .venv.

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
CHECKPOINT := models/tiny
# Versions that were tested; `make test CONSTRAINTS=/dev/null` takes the newest.
CONSTRAINTS ?= constraints.txt

# What `make wheels` compiles for: machines, and GPUs in place of all of tools/wheels.py (ARCHITECTURES="87 90a").
MACHINES := x86_64 aarch64
ARCHITECTURES :=

.PHONY: demo docs test test-slow lint wheels aarch64 clean

# The demo and the site need no torch; the tests compare with transformers. All live in one environment.
.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[export,cpu,server]'
	touch $@

# mkdocs reads the packages' sources; it runs none of them.
.venv/docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	touch $@

.venv/installed: .venv/demo
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[validate,cpu,calibration,server,docs,test]'
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
	@echo 'Ask more, in a browser:              $(BIN)/tango serve $(DEMO)/bundle'

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/codespell
	$(BIN)/hadolint containers/*.Dockerfile
	$(BIN)/mypy

# The generated parts of docs/: tables of options, limits, results, …
.PHONY: reference
reference: .venv/installed
	$(BIN)/python -m tools.docs

test: lint
	$(BIN)/pytest --numprocesses 2

# Parts of the tests that workflows run alone: a wheel in an empty environment; what nvcc compiles; a GPU.
.PHONY: test-install test-nvcc test-gpu release
test-install: .venv/installed
	$(BIN)/pytest -m "not slow" tests/packaging/test_install.py

test-nvcc: .venv/installed
	$(BIN)/pytest -m nvcc

test-gpu: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[tensorrt]'
	$(BIN)/tango plugin build
	$(BIN)/pytest -m gpu tests/gpu

# Every artifact into dist/, then a test of them in an empty environment: docs/contributing/release.md.
release: .venv/installed
	$(BIN)/python tools/release.py dist

# What takes longer (builds by nvcc, kernels in emulation, searches for races, accuracies), or asks a package index.
test-slow: .venv/installed
	$(BIN)/pytest --numprocesses 2 -m "slow or network"

# The documentation site. A link, an anchor or a page that leads nowhere is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The sdist, the pure Python wheel, and wheels with the CUDA library, into dist/. Needs nvcc of CUDA 13 and CMake, and for aarch64
# Debian's g++-aarch64-linux-gnu.
wheels: .venv/installed
	nice -n 5 $(BIN)/python tools/wheels.py --machines $(MACHINES) $(if $(ARCHITECTURES),--architectures $(ARCHITECTURES))

# The aarch64 wheel under qemu: an fp16 bundle gives the same answers as on x86-64, and an fp32 one keeps the same tokens, too. Needs
# `make wheels`, and Debian's qemu-user-static and mmdebstrap.
aarch64: demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/tango-export --checkpoint $(CHECKPOINT)/llava --salience-checkpoint $(CHECKPOINT)/siglip --sink-positions --context 12800 \
	    --dtype fp32 --no-validate --output $(DEMO)/fp32
	for bundle in fp32 bundle; do \
	    nice -n 5 $(BIN)/python tools/aarch64.py $(DEMO)/$$bundle $(DEMO)/videos --frames 2 || exit 1; done

clean:
	rm -rf .venv $(DEMO) site
