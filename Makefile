# Every target works from a fresh clone: `setup` runs first and is instant once the lock is installed.
PYTHON   ?= python3
VENV     ?= .venv
DATASET  ?= digits
PROFILE  ?= quick
JOBS     ?= 1
CHAPTERS ?=
SEED     ?= 0
RUN_FLAGS ?=

ifeq ($(OS),Windows_NT)
PY := $(VENV)/Scripts/python
else
PY := $(VENV)/bin/python
endif

.DEFAULT_GOAL := help
.PHONY: help setup course test lint format notebooks readme lab bench lock clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# The copy of the lock is written last, so an interrupted install is never mistaken for a finished one.
setup:  ## create .venv and install the locked packages (instant when nothing changed)
	@cmp -s requirements.lock $(VENV)/installed.lock || { \
	  $(PYTHON) -c 'import sys; sys.exit("This course needs Python 3.11 or newer; make PYTHON=python3.12 setup picks another." if sys.version_info < (3, 11) else 0)' && \
	  rm -f $(VENV)/installed.lock && \
	  { test -x $(PY) || $(PYTHON) -m venv $(VENV); } && \
	  echo "installing the locked packages into $(VENV) (about 5 GB on Linux, once) ..." && \
	  $(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock && \
	  $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . && \
	  cp requirements.lock $(VENV)/installed.lock; }

course: setup  ## execute the chapters; CHAPTERS="02 05" DATASET=mnist PROFILE=full JOBS=2 SEED=1 narrow or widen it
	@$(PY) -m course_lib run $(CHAPTERS) --dataset $(DATASET) --profile $(PROFILE) --seed $(SEED) --jobs $(JOBS) $(RUN_FLAGS)

test: setup lint  ## ruff, then pytest with coverage on tests/, then nbval on notebooks/
	@$(PY) -m pytest tests -n 2 --dist loadfile --cov --cov-report=term
	@cd notebooks && OMP_NUM_THREADS=1 ../$(PY) -m pytest -p no:cacheprovider -c ../pyproject.toml --rootdir .. --nbval-lax --nbval-cell-timeout 300 --nbval-current-env -n 2 --dist loadfile .

lint: setup  ## check style and formatting with ruff
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: setup  ## let ruff rewrite style and formatting
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

notebooks: setup  ## re-execute the chapters, store their outputs in notebooks/, and bring README.md up to date
	@$(PY) -m course_lib run $(CHAPTERS) --store --jobs $(JOBS)
	@$(PY) -m course_lib readme

readme: setup  ## put the stored chapters' Pareto figure and claims into README.md and docs/
	@$(PY) -m course_lib readme

lab: setup  ## open JupyterLab on the first chapter
	@$(PY) -m jupyterlab notebooks/00_start_here.ipynb

bench: setup  ## time our batched training against the usual loop, side by side
	@$(PY) -m course_lib bench

lock: setup  ## resolve requirements.lock anew from pyproject.toml, for Linux, macOS and Windows
	@$(PY) -m uv pip compile pyproject.toml --universal --python-version 3.11 --extra dev \
	  --upgrade --no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.lock

clean:  ## remove what the targets above made (.venv and build/), never a data set
	@rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* *.egg-info
