# make train [CONFIG=config/digits.yaml] [NPROC=4] [ARGS="--use_amp key=value ..."]   train and evaluate; NPROC GPUs
# make test                                                                           lint, types and tests
# make test-long                                                                      the tests that take minutes
# All set up .venv by themselves. PYTHON names another interpreter (3.11 or newer).

CONFIG ?= config/digits.yaml
NPROC ?= 1
ARGS ?=
PYTHON ?= python3
LAUNCH = .venv/bin/$(if $(filter 1,$(NPROC)),python,torchrun --standalone --nproc_per_node=$(NPROC))

.PHONY: train test test-long clean
.DELETE_ON_ERROR:

train: .venv/requirements.done
	$(LAUNCH) train.py --config $(CONFIG) $(ARGS)

test: .venv/requirements-dev.done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest

test-long: .venv/requirements-dev.done
	.venv/bin/python -m pytest -m long

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.11: install Python 3.11, or name it: make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "error: no venv module: apt-get install python3-venv" >&2; exit 2; }

.venv/requirements.done: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -r $<
	touch $@

.venv/requirements-dev.done: requirements-dev.txt requirements.txt | .venv/requirements.done
	.venv/bin/python -m pip install --quiet -r $<
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
