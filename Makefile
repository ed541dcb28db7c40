# Needs python3, make and a package index; everything else is installed into .venv.

PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
CHECKPOINT := models/tiny

# What `make wheels` compiles for: machines, and GPUs in place of all of tools/wheels.py (ARCHITECTURES="87 90a").
MACHINES := x86_64 aarch64
ARCHITECTURES :=

.PHONY: demo test test-slow lint wheels aarch64 clean

# The demo needs no torch; the tests compare with transformers. Both live in one environment.
.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export,cpu]'
	touch $@

.venv/installed: .venv/demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[validate,cpu,calibration,server,test]'
	touch $@

demo: .venv/demo
	rm -rf $(DEMO)
	$(BIN)/tango-export --checkpoint $(CHECKPOINT)/llava --salience-checkpoint $(CHECKPOINT)/siglip --sink-positions --context 12800 \
	    --output $(DEMO)/bundle
	$(BIN)/python examples/make_clip.py $(DEMO)/videos --frames 16
	$(BIN)/python examples/quiz.py $(DEMO)/bundle $(DEMO)/videos --frames 16 \
	    --report $(DEMO)/kept.html --picture $(DEMO)/kept.png

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest --numprocesses 2

# What takes longer (builds by nvcc, kernels in emulation, searches for races, accuracies), or asks a package index.
test-slow: .venv/installed
	$(BIN)/pytest --numprocesses 2 -m "slow or network"

# The sdist, the pure Python wheel, and wheels with the CUDA library, into dist/. Needs nvcc of CUDA 13 and CMake, and for aarch64
# Debian's g++-aarch64-linux-gnu.
wheels: .venv/installed
	nice -n 5 $(BIN)/python tools/wheels.py --machines $(MACHINES) $(if $(ARCHITECTURES),--architectures $(ARCHITECTURES))

# The aarch64 wheel under qemu: the same answers as on x86_64. Needs `make wheels`, and Debian's qemu-user-static and mmdebstrap.
aarch64: demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	nice -n 5 $(BIN)/python tools/aarch64.py $(DEMO)/bundle $(DEMO)/videos --frames 8

clean:
	rm -rf .venv $(DEMO)
