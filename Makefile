# The KAMAL Workbook. Every target is one of these lines, which also work where there is no make
# (Windows, Colab), in an environment with Python >= 3.11:
#
#   install     python -m venv .venv, activate it, then:  pip install -c constraints.txt -e .[dev]
#               laptops without a GPU may first take PyTorch's smaller CPU wheels:
#               pip install -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch torchvision
#   report      python -m kamal_lib.report --data rooms --profile quick --seed 0 --out report
#   study       python -m kamal_lib.report --study NAME --profile quick
#   lint        python -m ruff check .     and     python -m ruff format --check .
#   types       python -m basedpyright
#   floors      lint-imports
#   unit        python -m pytest tests
#   lessons     python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=1200
#                 --nbval-sanitize-with=tests/nbval_sanitize.cfg notebooks --ignore=notebooks/studies
#   studies     the same with KAMAL_PROFILE=smoke in the environment, on notebooks/studies
#   notebooks   python -m kamal_lib.report --in-place
#   lab         python -m jupyterlab notebooks
#
# Variables of `report` and `study`; those that are not set keep the notebook's own default:
#   DATA=rooms|nyuv2|camvid|cityscapes  DATA_ROOT=path  PROFILE=smoke|quick|gpu  SEED=number  OUT=folder  STUDY=name
#   LESSONS="06 07": these only
# KAMAL_STORE names the folder of trained models and rooms (default: data/store).

# Threads soon fall asleep while they wait: with a second program on the same two cores, those that wait awake
# made training 15 times slower (5 against 68 images/s); with nothing beside it, this costs about a fifth.
export GOMP_SPINCOUNT := 1000
# glibc gives freed memory back to the system at once, and every step of a training asks for it again: page
# faults, which on a busy virtual machine took most of the time. So it keeps what it has. Elsewhere no effect.
export MALLOC_TRIM_THRESHOLD_ := 2000000000
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TOP_PAD_ := 67108864

PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
NBVAL := KAMAL_QUIET=1 $(PY) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=1200 \
	--nbval-sanitize-with=tests/nbval_sanitize.cfg
OPTIONS = $(if $(DATA),--data "$(DATA)") $(if $(DATA_ROOT),--data-root "$(DATA_ROOT)") \
	$(if $(PROFILE),--profile "$(PROFILE)") $(if $(SEED),--seed "$(SEED)") $(if $(OUT),--out "$(OUT)")

.PHONY: help install report study test lint types floors unit lessons studies notebooks lab clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  f"Python >= 3.11 is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

install: .venv/.ready  ## make .venv and install what the workbook needs

report: .venv/.ready  ## run the lessons: executed notebooks, HTML, results and index in report/
	$(PY) -m kamal_lib.report $(LESSONS) $(OPTIONS)

study: .venv/.ready  ## run one study: make study STUDY=ka_options PROFILE=quick
	$(PY) -m kamal_lib.report --study "$(STUDY)" $(OPTIONS)

test: lint types floors unit lessons studies  ## everything that must hold before a change is done

lint: .venv/.ready  ## style of code and notebooks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: .venv/.ready  ## static types of the library
	$(PY) -m basedpyright

floors: .venv/.ready  ## imports point downwards
	$(BIN)/lint-imports

unit: .venv/.ready  ## unit tests
	$(PY) -m pytest tests

lessons: .venv/.ready  ## execute every lesson and compare its checked cells
	$(NBVAL) notebooks --ignore=notebooks/studies

studies: .venv/.ready  ## execute every study at the smoke profile
	$(if $(wildcard notebooks/studies/*.ipynb),KAMAL_PROFILE=smoke $(NBVAL) notebooks/studies,@echo no studies yet)

notebooks: .venv/.ready  ## regenerate the committed outputs of the lessons, at the quick profile
	$(PY) -m kamal_lib.report --in-place

lab: .venv/.ready  ## open the lessons in JupyterLab
	$(PY) -m jupyterlab notebooks

clean:  ## remove the environment, reports and caches; keeps the trained models in data/
	rm -rf .venv report build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find kamal_lib tests notebooks benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
