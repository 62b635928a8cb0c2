# Everything runs in its own virtual environment: make demo, make test. Another Python: make PYTHON=…
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One process per core, a file's tests in one of them; each needs up to 4 GB.
PARALLEL ?= -n auto --maxprocesses=4 --dist=loadfile

KERNEL := olmoe_jax/grouped_matmul/cpu_kernel

.PHONY: help install demo compare test test-all lint

help:
	@echo "make install   virtual environment $(VENV) with requirements.txt; the CPU kernel where a C++ compiler is"
	@echo "make demo      train the demo model and draw what it learnt (runs/demo)"
	@echo "make compare   train a dense model, upcycle it, and the same from scratch; which leads, and how long (runs/compare)"
	@echo "make test      all tests but the slow ones"
	@echo "make test-all  all tests"
	@echo "make lint      ruff"

install: $(VENV)/kernel

demo: install
	$(BIN)/python -m experiments.demo --config=experiments/configs/demo.py --workdir=runs/demo

compare: install
	$(BIN)/python -m experiments.compare_upcycling --workdir=runs/compare --seeds=1

test: $(VENV)/installed-test $(VENV)/kernel
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: $(VENV)/installed-test $(VENV)/kernel
	$(BIN)/python -m pytest $(PARALLEL)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	  "error: Python 3.11 to 3.13 is needed, $(PYTHON) is %d.%d; name another: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

# Optional: without a compiler, or on another processor, this does nothing and says so.
$(VENV)/kernel: $(wildcard $(KERNEL)/*.cc $(KERNEL)/*.py) | $(VENV)/installed
	$(BIN)/python -m olmoe_jax.grouped_matmul.cpu_kernel
	@touch $@

$(VENV)/installed-test: requirements-test.txt requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	@touch $@ $(VENV)/installed
