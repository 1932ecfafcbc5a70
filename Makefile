# Two commands matter: `make demo` (see it work) and `make test` (is it whole?). Both start from
# nothing but Python >= 3.11 and make; every target creates what it stands on.

# The first Python that is new enough; `make PYTHON=/path/to/python3.12 install` overrides it.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
KILLS ?= 200
OUT ?= runs/demo

# Every pip below, also those that pip starts itself, keeps to the pinned versions: one loose
# dependency on torchvision would otherwise replace torch by another build (CONTRIBUTING.md).
# A relative name, because pip splits this variable at spaces.
export PIP_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

TORCHVISION := import importlib.util as u; u.find_spec("torchvision") and __import__("torchvision")

.DEFAULT_GOAL := help
.PHONY: help install tools test torture check format demo demo-smoke clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## the environment alone, in .venv

tools: $(VENV)/.tools  ## the environment with test and lint tools

test: $(VENV)/.tools  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) \
		--dist loadfile --no-loadscope-reorder --durations 10 $(ARGS)

torture: $(VENV)/.tools  ## 200 kills, ten minutes of fuzzing, two machines: docs/reliability.md
	$(BIN)/python -m pip install -q atheris || echo "no atheris for this Python: not fuzzed"
	OMP_NUM_THREADS=1 ERW_TORTURE=$(KILLS) $(BIN)/python -m pytest -s -q tests/torture

check: $(VENV)/.tools  ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.tools  ## let ruff put format and imports right
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(VENV)/.installed  ## the quickstart study on real images, fitted to 10 minutes of this machine
	$(BIN)/erw study demo --out $(OUT)

demo-smoke: $(VENV)/.installed  ## the same path in tiny, a minute or two; checks that it holds, not how good
	OMP_NUM_THREADS=1 $(BIN)/erw study smoke --out $(if $(filter runs/demo,$(OUT)),runs/demo-smoke,$(OUT))

clean:  ## remove the environment and tool caches; runs stay
	rm -rf $(VENV) build src/erw.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: erw needs Python 3.11 or newer and found none on PATH; \
	install it, or run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "error: $(PYTHON) is \
	not Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot create a virtual \
	environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }

# Stamps: a second `make` does nothing until a pinned version or a dependency changes.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@$(BIN)/python -c '$(TORCHVISION)' || { echo "error: the torchvision in $(VENV) does not fit its \
	torch; run: $(BIN)/pip uninstall torchvision" >&2; exit 2; }
	@touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,dev]"
	$(BIN)/python -m pip install -q --no-deps torch-fidelity  # it would bring torchvision
	@touch $@
