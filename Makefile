# make demo    set up and run the main job over the sample           make check    format, lint, types, plain tests (seconds)
# make test    set up and pass all tests                             make newest   plain tests on the newest of everything
# make up      Prefect with its UI, the deployments and a worker, in the background       make down     stop them
# make docs    build the site into build/site                       make diagrams    draw docs/img again (needs Graphviz)
# make release    build the wheel and try it in an empty place      make constraints    pin the newest of everything
# make help    this list
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
# uv ignores pip's settings, so give it pip's folder of wheels.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Each process has its own Prefect server, and all tests of a file run in one process.
IN_PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder
# Prefect's database and settings, only for this checkout.
export PREFECT_HOME ?= $(CURDIR)/.prefect
# If it were set, every process would compile all packages again.
unexport PYTHONDONTWRITEBYTECODE

# Material for MkDocs warns of a successor at each build.
export NO_MKDOCS_2_WARNING := 1

.PHONY: help setup demo up down test check lint docs diagrams newest sample release constraints clean

help:
	@grep '^# make' Makefile | sed 's/^# //'

# Installed as a path entry; otherwise a script next to the checkout imports its folder, which has the package's name.
INSTALL = $(RUN)/uv pip install --quiet --python $(RUN)/python -C editable_mode=compat

# uv compiles no packages. The first import does, but not where PYTHONDONTWRITEBYTECODE is set: every process would
# take 5 to 10 s more.
COMPILE = $(RUN)/python -c 'import flows.annotate, flows.finetune, glmbatch.glm.engine.loading as loading, pandas, \
  prefect.cli._server_utils, prefect.cli.server, prefect.flow_engine, prefect.server.api.server, prefect.task_engine; \
  loading.import_engine()'

$(RUN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet 'uv>=0.9,<1'

# What a run needs; `ready` adds what the tests need.
$(VENV)/ready-to-run: pyproject.toml constraints.txt | $(RUN)/uv
	$(INSTALL) -c constraints.txt -e '.[cpu,train,view]'
	@$(COMPILE)
	@touch $@

$(VENV)/ready: pyproject.toml constraints.txt | $(RUN)/uv
	$(INSTALL) -c constraints.txt -e '.[test]'
	@$(COMPILE)
	@touch $(VENV)/ready-to-run $@

setup: $(VENV)/ready

# Exit code 3 means that rows were quarantined; the sample has some on purpose.
demo: $(VENV)/ready-to-run
	$(RUN)/glmbatch run sample_data/reviews.yaml || test $$? -eq 3

up down: $(VENV)/ready-to-run
	@$(RUN)/python -m deployments.local $@

# Three processes for two cores, because the tests wait for servers and schedules half of the time.
test: setup
	$(RUN)/python -m pytest $(IN_PARALLEL)

check: lint
	$(RUN)/python -m pytest $(IN_PARALLEL) -m "not slow and not prefect and not gpu"

lint: setup
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

# A broken link or a page outside the navigation is an error.
docs: setup
	$(RUN)/mkdocs build --strict

diagrams:
	for source in docs/diagrams/*.dot; do dot -Tsvg $$source -o docs/img/$$(basename $$source .dot).svg || exit 1; done

sample: setup
	$(RUN)/python sample_data/make.py

# torch is upgraded by hand, because it needs builds for CPU and GPU. Everything else is upgraded to the newest version.
TORCH ?= $(shell grep '^torch==' constraints.txt)

# In a separate environment, which is kept for inspection.
newest:
	$(MAKE) VENV=.venv-newest .venv-newest/bin/uv
	.venv-newest/bin/uv pip install --quiet --python .venv-newest/bin/python --upgrade -C editable_mode=compat '$(TORCH)' -e '.[test]'
	.venv-newest/bin/python -m pytest $(IN_PARALLEL) -m "not slow and not prefect and not gpu"

# The wheel and the source archive, then the wheel alone in empty environments, one for each Python in PYTHONS.
PYTHONS ?= $(PYTHON)
release: setup
	rm -rf dist
	$(RUN)/uv build --quiet
	for python in $(PYTHONS); do bash deployments/try_wheel.sh $$python || exit 1; done

constraints: | $(RUN)/uv
	@mkdir -p build && echo '$(TORCH)' > build/torch.txt
	# Without this machine's own wheels, whose local versions exist nowhere else.
	UV_FIND_LINKS= $(RUN)/uv pip compile pyproject.toml --upgrade -c build/torch.txt --universal --all-extras \
	  --python-version 3.11 --no-annotate --custom-compile-command 'make constraints' -o constraints.txt > build/constraints.log

clean:
	rm -rf $(VENV) .venv-newest .prefect sample_data/out build dist
