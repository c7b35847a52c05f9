# make train [CONFIG=config/digits.yaml] [NPROC=4] [ARGS="--use_amp key=value ..."] [REPORT=1]
#     Trains and evaluates a model, with NPROC processes (one per GPU). REPORT=1 also writes a report; it is the default
#     for config/digits.yaml.
# make lint
#     Checks the code style and the types.
# make test
#     Does the same, and runs the tests.
# make test-long
#     Runs the tests that take minutes.
# make bundle DATA=folder [NAME="name of the images"] [BUNDLE_PYTHON=3.12]
#     Collects code, images and packages for an ablation on a machine that has torch and scipy but no network. There, run
#     `bash bundle/run.sh`. BUNDLE_PYTHON is the Python version of that machine.
# make clean
#     Removes .venv and the caches of the tools.
# Each of the first five creates .venv if it is missing. PYTHON=... chooses its interpreter (3.11 or newer).

CONFIG ?= config/digits.yaml
NPROC ?= 1
ARGS ?=
REPORT ?= $(if $(filter --dry-run --help -h,$(ARGS)),,$(filter config/digits.yaml,$(CONFIG)))
PYTHON ?= python3
BUNDLE_PYTHON ?= 3.12
BUNDLE_MB = 60
DOWNLOAD = .venv/bin/python -m pip download --quiet --only-binary=:all: --python-version $(BUNDLE_PYTHON) \
  --platform manylinux2014_x86_64 --dest bundle/wheels --constraint requirements.txt
NAME ?= $(notdir $(DATA))
LAUNCH = .venv/bin/$(if $(filter 1,$(NPROC)),python,torchrun --standalone --nproc_per_node=$(NPROC))

.PHONY: train lint test test-long bundle clean
.DELETE_ON_ERROR:

train: .venv/requirements.done $(if $(REPORT),.venv/requirements-extra.done)
	$(LAUNCH) train.py --config $(CONFIG) $(ARGS)
	$(if $(REPORT),$(LAUNCH) test.py --config $(CONFIG) $(ARGS) --report)

lint: .venv/requirements-dev.done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: lint
	.venv/bin/python -m pytest --numprocesses=2 --dist=loadfile

test-long: .venv/requirements-dev.done
	.venv/bin/python -m pytest -m long

# The bundle has the code of the last commit. The other machine must have torch, torchvision, numpy, pyyaml and scipy, and
# scikit-learn for the benchmarks of the plan. ema-pytorch and tqdm are downloaded without dependencies, because
# ema-pytorch needs only torch and numpy.
bundle: .venv/requirements.done
	@test -d "$(DATA)/train" || { echo "error: DATA is not a folder with train/ and test/: name one, as in make bundle DATA=photos" >&2; exit 2; }
	rm -rf bundle
	mkdir -p bundle/wheels
	git archive --format=tar.gz -o bundle/code.tar.gz HEAD
	tar -C "$(DATA)" -chzf bundle/data.tar.gz .
	echo "$(NAME)" > bundle/name.txt
	$(DOWNLOAD) pydantic filelock
	$(DOWNLOAD) --no-deps ema-pytorch tqdm
	cp ablations/run_bundle.sh bundle/run.sh
	@du -sm bundle | awk '{print "bundle/: " $$1 " MB"; if ($$1 >= $(BUNDLE_MB)) {print "error: the bundle must be smaller than $(BUNDLE_MB) MB: choose fewer images" > "/dev/stderr"; exit 2}}'

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.11: install Python 3.11 or newer, or name it: make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "error: Python has no venv module: apt-get install python3-venv" >&2; exit 2; }

.venv/requirements.done: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -r $<
	touch $@

.venv/requirements-extra.done: requirements-extra.txt requirements.txt | .venv/requirements.done
	.venv/bin/python -m pip install --quiet -r $<
	touch $@

.venv/requirements-dev.done: requirements-dev.txt requirements-extra.txt requirements.txt | .venv/requirements.done
	.venv/bin/python -m pip install --quiet -r $<
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
