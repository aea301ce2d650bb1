# A fresh machine with Python >= 3.11 and make needs nothing else: every target first makes .venv from constraints.txt.
.PHONY: demo test lint format budgets wheel nnunet bench clean
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp-installed
FRESH := build/wheel-venv
NNUNET := build/nnunet-venv
# The first of these that is 3.11 or newer; `make PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
# Tests run one worker per core, so each computes with one thread. PYTEST adds options: make test PYTEST="-k store".
JOBS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 BLOSC_NTHREADS=1
PYTEST ?=

demo: $(STAMP)
	$(BIN)/volssl demo --out demo --overwrite

test: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/check_budgets.py volssl tools

budgets: $(STAMP)
	$(BIN)/python tools/check_budgets.py volssl tools

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What a user gets from the wheel alone: installed into an empty environment, away from the checkout.
wheel: $(STAMP)
	rm -rf dist $(FRESH)
	$(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/python -m venv $(FRESH)
	$(FRESH)/bin/python -m pip install -q -c constraints.txt dist/volssl-*.whl
	cd $(FRESH) && bin/python -I $(CURDIR)/tools/check_wheel.py

# An export in the hands of stock nnU-Net, which has an environment of its own.
nnunet: $(STAMP) $(NNUNET)/.stamp-installed
	$(ONE_THREAD) $(BIN)/python tools/check_nnunet.py --python $(NNUNET)/bin/python

$(NNUNET)/.stamp-installed: tools/nnunet_requirements.txt tools/nnunet_packages.txt constraints.txt
	test -x $(NNUNET)/bin/python || $(PYTHON) -m venv $(NNUNET)
	$(NNUNET)/bin/python -m pip install -q -c constraints.txt -r tools/nnunet_requirements.txt
	$(NNUNET)/bin/python -m pip install -q --no-deps -r tools/nnunet_packages.txt
	@touch $@

bench: $(STAMP)
	@for b in tools/bench_*.py; do [ -e "$$b" ] || { echo "no bench yet"; break; }; echo "== $$b"; $(BIN)/python "$$b" || exit 1; done

clean:
	rm -rf $(VENV) build dist demo

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "volssl needs Python 3.11 or newer on PATH; found none; install it, or give make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	@touch $@
