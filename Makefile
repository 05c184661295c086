# make demo    set up and run the main job over the sample           make check    format, lint, types, plain tests (seconds)
# make test    set up and pass all tests                             make help     this list
# make up      Prefect with its UI, the deployments and a worker, in the background       make down     stop them
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
# uv does not read pip's settings; a folder of wheels given to pip is given to uv too.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# A file's tests stay together in one process, each of which has a Prefect server of its own.
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder
# Prefect's database and settings for this checkout alone.
export PREFECT_HOME ?= $(CURDIR)/.prefect
# With it set, every process would compile all packages again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo up down test check lint sample constraints clean

help:
	@grep '^# make' Makefile | sed 's/^# //'

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet 'uv>=0.9,<1'
	# As a path: else a script beside the checkout takes the checkout's folder for the package, which has the same name.
	$(RUN)/uv pip install --quiet --python $(RUN)/python -c constraints.txt \
	  -C editable_mode=compat -e '.[test]'
	@touch $@

# Exit code 3 says that rows were quarantined: the sample holds some on purpose.
demo: setup
	$(RUN)/glmbatch run sample_data/reviews.yaml || test $$? -eq 3

up down: setup
	@$(RUN)/python -m deployments.local $@

# Two processes: the suite waits for servers and schedules about as long as it computes.
test: setup
	$(RUN)/python -m pytest $(IN_TWO)

check: lint
	$(RUN)/python -m pytest $(IN_TWO) -m "not slow and not prefect and not gpu"

lint: setup
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

sample: setup
	$(RUN)/python sample_data/make.py

constraints: setup
	$(RUN)/uv pip compile pyproject.toml --universal --all-extras --python-version 3.11 --no-annotate --no-header \
	  --no-emit-find-links -o constraints.txt

clean:
	rm -rf $(VENV) .prefect sample_data/out
