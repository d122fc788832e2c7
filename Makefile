# make demo   fine-tune a small CLIP on real pictures in several ways and write a report
# make test   run the tests
# make bench  run all benchmarks that this machine can run
# make gpu    check and measure everything on this machine's GPU, on one page
# Each first sets up what it needs below $(VENV). `make help` lists the other commands.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup demo test bench bench-check gpu docs lint format lock clean

help:
	@echo "make demo [ARGS='--seeds 1']   compare the methods in runs/demo/report.html; all options: make demo ARGS=--help"
	@echo "make test [ARGS='-k data']     run the tests, a process per core; ARGS go to pytest"
	@echo "make bench                     run the benchmarks and rewrite benchmarks/results and the README's tables"
	@echo "make bench-check               compare with the committed results; ARGS=--exact leaves out times"
	@echo "make docs                      build the browsable site in build/site, and check every link between its pages"
	@echo "make gpu                       check everything on this machine's GPU and measure it: runs/gpu/page.md"
	@echo "make setup                     create the virtual environment, as the commands above do when needed"
	@echo "make lint                      check with ruff and mypy"
	@echo "make format                    mend with ruff what it can"
	@echo "make lock                      pin the newest versions within setup.py's ranges"
	@echo "make clean                     remove the virtual environment and the runs"

setup: $(READY)

# Install this checkout (editable), and its dependencies at the pinned versions.
$(READY): requirements.lock setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: Python 3.10 or newer is needed ($$($(PYTHON) --version 2>&1) found): make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "error: Python's venv module is missing: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV): about 6 GB, a few minutes on the first time"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --progress-bar on -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(READY)

demo: $(READY)
	$(BIN)/tracer demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -p no:benchmark -n logical --maxprocesses 8 --dist loadfile $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

bench-check: $(READY)
	$(BIN)/python -m benchmarks.check $(ARGS)

docs: $(READY)
	$(BIN)/python docs/site.py

gpu: $(READY)
	$(BIN)/python -m benchmarks.card $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch, torchvision and triton are pinned as a set that is known to work together on a machine without a GPU.
lock: $(READY)
	$(BIN)/pip install --quiet uv
	printf 'torch==2.14.1\ntorchvision==0.29.1\n' > $(VENV)/pins.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --constraint $(VENV)/pins.txt \
	    --extra train --extra dali --extra test --extra bench --extra dev --extra docs \
	    --custom-compile-command "make lock" --output-file requirements.lock setup.py

clean:
	rm -rf $(VENV) runs build *.egg-info
