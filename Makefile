# Every target works from a fresh clone: `setup` runs first and is instant once the lock is installed.
PYTHON   ?= python3
VENV     ?= .venv
CHAPTERS ?=
DATASET  ?= digits
PROFILE  ?= quick
SEED     ?= 0
SEEDS    ?= 0 1 2 3 4
# Two lessons at once share the cores: faster than one after the other, as small networks leave cores idle.
JOBS     ?= 2
RUN_FLAGS ?=
LAB_FLAGS ?=
FILES    ?=
# Where torch and torchvision come from, if not from where the other packages do; remembered in the environment.
TORCH_INDEX ?= $(shell cat $(VENV)/torch-index 2>/dev/null)

ifeq ($(OS),Windows_NT)
PY := $(VENV)/Scripts/python
else
PY := $(VENV)/bin/python
endif
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# What the torch of another index brings itself, if it needs it.
OF_TORCH := ^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==

# Threads that wait soon sleep: beside anything else, busy waiting makes a training several times slower.
export GOMP_SPINCOUNT ?= 3000

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev course lab fresh practice test lint format notebooks readme replicate bench demo book slides lock clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# A lock names every package: nothing is resolved. Its copy is written last, so an interrupted install is never mistaken for a finished one.
setup:  ## create .venv and install what a learner needs (instant when nothing changed); TORCH_INDEX=<address> for another torch
	@{ cmp -s requirements.lock $(VENV)/installed.lock && test "$(TORCH_INDEX)" = "$$(cat $(VENV)/torch-index 2>/dev/null)"; } || { \
	  $(PYTHON) -c 'import sys; sys.exit("This course needs Python 3.11 or newer; make PYTHON=python3.12 setup picks another." if sys.version_info < (3, 11) else 0)' && \
	  rm -f $(VENV)/installed.lock $(VENV)/installed-dev.lock && \
	  { test -x $(PY) || $(PYTHON) -m venv $(VENV); } && \
	  if test -n "$(TORCH_INDEX)"; then \
	    echo "installing torch and torchvision from $(TORCH_INDEX), the rest from the lock, into $(VENV) ..." && \
	    grep -E '^(torch|torchvision)==' requirements.lock > $(VENV)/torch.lock && \
	    grep -vE '$(OF_TORCH)' requirements.lock > $(VENV)/rest.lock && \
	    $(PIP) --no-deps -r $(VENV)/rest.lock && \
	    $(PIP) --index-url "$(TORCH_INDEX)" -r $(VENV)/torch.lock && \
	    printf '%s' "$(TORCH_INDEX)" > $(VENV)/torch-index; \
	  else \
	    echo "installing the locked packages into $(VENV) (about 5 GB on Linux, once; README tells how to need less) ..." && \
	    rm -f $(VENV)/torch-index && $(PIP) --no-deps -r requirements.lock; \
	  fi && \
	  $(PIP) --no-deps --no-build-isolation --editable . && \
	  cp requirements.lock $(VENV)/installed.lock; }

setup-dev: setup
	@cmp -s requirements-dev.lock $(VENV)/installed-dev.lock || { \
	  echo "installing the developer's tools into $(VENV) ..." && \
	  rm -f $(VENV)/installed-dev.lock && $(PIP) --no-deps -r requirements-dev.lock && \
	  cp requirements-dev.lock $(VENV)/installed-dev.lock; }

course: setup  ## execute the lessons; CHAPTERS="02 05.1" DATASET=mnist PROFILE=full JOBS=1 SEED=1 narrow or widen it
	@$(PY) -m course_lib run $(CHAPTERS) --dataset $(DATASET) --profile $(PROFILE) --seed $(SEED) --jobs $(JOBS) $(RUN_FLAGS)

lab: setup  ## open JupyterLab on work/, your own copy of the lessons; LAB_FLAGS="--no-browser --port 9000" goes to JupyterLab
	@$(PY) -m course_lib lab $(LAB_FLAGS)

fresh: setup  ## bring notebooks of work/ back, such as FILES="02.1 02_pruning/practice"; asks, and keeps yours beside them
	@$(PY) -m course_lib fresh $(FILES)

demo: setup-dev  ## write docs/demo.html anew: a page without a network on which a drawn digit meets six networks
	@$(PY) -m course_lib.classroom.demo docs/demo.html

practice: setup  ## make the practice notebooks anew from their solutions
	@$(PY) -m course_lib practice generate

# nbval: every lesson and every solution once more in a kernel of its own; what does not depend on the machine is compared.
test: setup-dev lint  ## ruff, then pytest with coverage on tests/, then nbval on the lessons
	@mkdir -p build && rm -f build/test-*.xml
	@$(PY) -m pytest tests -n 2 --dist loadfile --cov --cov-report=term --junitxml=build/test-library.xml
	@lessons="$$($(PY) -m course_lib list --paths)" && OMP_NUM_THREADS=1 COURSE_UNATTENDED=1 $(PY) -m pytest -p no:cacheprovider \
	  --nbval-lax --nbval-cell-timeout 300 --nbval-current-env -n 2 --dist loadfile --junitxml=build/test-lessons.xml $$lessons notebooks/solutions/*.ipynb
	@$(PY) tests/say_what_ran.py

lint: setup-dev  ## check style and formatting with ruff
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: setup-dev  ## let ruff rewrite style and formatting
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

notebooks: setup  ## execute the lessons, store their outputs in notebooks/, and bring README.md up to date
	@$(PY) -m course_lib run $(CHAPTERS) --store
	@$(PY) -m course_lib readme

readme: setup  ## put a picture and one claim of each chapter into README.md, from the stored lessons
	@$(PY) -m course_lib readme

replicate: setup  ## run the lessons under SEEDS="0 1 2 3 4" on DATASET and tell in docs/claims.md which claims held
	@$(PY) -m course_lib replicate $(CHAPTERS) --seeds "$(SEEDS)" --dataset $(DATASET) --profile $(PROFILE) --jobs $(JOBS)

bench: setup  ## time our batched training and our loss against the usual ways, side by side
	@$(PY) -m course_lib bench

book: setup-dev  ## web pages from the stored lessons, without a network: build/book/index.html
	@$(PY) docs/book/build.py build/book

slides: setup-dev  ## a deck for a beamer from each stored lesson, without a network: build/slides/index.html
	@$(PY) docs/book/slides.py build/slides

# The second lock holds what the developer's tools add to the first.
lock: setup-dev  ## resolve both locks anew from pyproject.toml, for Linux, macOS and Windows
	@$(PY) -m uv pip compile pyproject.toml --universal --python-version 3.11 --upgrade \
	  --no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.lock
	@$(PY) -m uv pip compile pyproject.toml --universal --python-version 3.11 --extra dev --constraint requirements.lock --upgrade \
	  --no-emit-index-url --no-annotate --no-header --quiet --output-file build-all.lock
	@grep -vxFf requirements.lock build-all.lock > requirements-dev.lock; rm -f build-all.lock

clean:  ## remove what the targets above made (.venv and build/), never a data set
	@rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* *.egg-info
