# make help lists the targets.
# From a fresh clone: Python 3.10 or newer and make suffice.

PYTHON ?= python3
VENV ?= .venv
QUICKSTART ?= quickstart
OLDEST ?= .venv-oldest
ACCELERATORS ?= .venv-accelerators
PYTORCH ?= .venv-pytorch
PYTHON_OLDEST ?= $(shell python3.10 -c '' 2>/dev/null && echo python3.10 || echo $(PYTHON))

# Stamps: an environment is installed into again only when its list of requirements has changed.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_OLDEST := $(OLDEST)/.installed
INSTALLED_ACCELERATORS := $(ACCELERATORS)/.installed-accelerators
INSTALLED_PYTORCH := $(PYTORCH)/.installed
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check

# A file's tests share runs, so they stay in one process. tests/conftest.py sorts the files.
PYTEST = -m pytest -q --durations=10 --numprocesses=2 --dist=loadfile --no-loadscope-reorder
# Of the slow sweeps, the tests marked full, a part: SLICE=2/10 is the second of ten.
SLICE ?=

.PHONY: help env quickstart smoke test test-full test-oldest test-accelerators accelerators pytorch lint \
	format docs fix-copies clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   train a small model on Python's documentation (3 minutes)"
	@echo "make smoke        run each script once, in a minute"
	@echo "make test         run the tests, but for slow sweeps; with SLICE=2/10 also a tenth of those"
	@echo "make test-full    run the slow sweeps; with SLICE=2/10 a tenth of them"
	@echo "make test-oldest  run the tests marked smoke with the oldest supported packages"
	@echo "make test-accelerators  compile the steps of all scripts for a TPU"
	@echo "make accelerators make the environment of benchmarks/accelerators.py"
	@echo "make pytorch      make the environment of benchmarks/pytorch.py"
	@echo "make lint         check the style"
	@echo "make format       fix most of what lint finds"
	@echo "make docs         write the generated parts of README.md and docs/"
	@echo "make fix-copies   copy the shared code of run_mlm_flax.py into the other scripts"
	@echo "make clean        remove the output of the quickstart and of the tools, but not $(VENV)"
	@echo "Settings: PYTHON=$(PYTHON) VENV=$(VENV) QUICKSTART=$(QUICKSTART)"
	@echo "For make test-oldest: PYTHON_OLDEST=$(PYTHON_OLDEST) OLDEST=$(OLDEST)"

env: $(INSTALLED)

# pip is renewed first: the one that Python 3.10 brings can take hours to choose versions.
$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed: name one with 'make PYTHON=...'" >&2; exit 1; }
	@echo "Making an environment in $(VENV), a few minutes the first time ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --upgrade pip
	@$(PIP) install --quiet --requirement requirements.txt
	@touch $@

$(INSTALLED_DEV): requirements-dev.txt $(INSTALLED)
	@$(PIP) install --quiet --requirement requirements-dev.txt
	@touch $@

# The lower bound of each package that the scripts import.
$(INSTALLED_OLDEST): requirements.txt requirements-dev.txt
	@echo "Making an environment of the oldest versions in $(OLDEST), with $(PYTHON_OLDEST) ..."
	@$(PYTHON_OLDEST) -m venv $(OLDEST)
	@sed -n 's/^\([a-z_-]*\)>=\([0-9.]*\),.*/\1==\2/p' requirements.txt > $(OLDEST)/oldest.txt
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade pip
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(OLDEST)/oldest.txt \
		--requirement requirements.txt --requirement requirements-dev.txt
	@touch $@

$(INSTALLED_ACCELERATORS): requirements.txt requirements-dev.txt benchmarks/accelerators.txt
	@echo "Making an environment with the compiler of TPUs in $(ACCELERATORS) ..."
	@$(PYTHON) -m venv $(ACCELERATORS)
	@$(ACCELERATORS)/bin/python -m pip --disable-pip-version-check install --quiet \
		--requirement requirements.txt --requirement requirements-dev.txt \
		--requirement benchmarks/accelerators.txt
	@touch $@

$(INSTALLED_PYTORCH): benchmarks/pytorch.txt
	@echo "Making an environment with PyTorch in $(PYTORCH) ..."
	@$(PYTHON) -m venv $(PYTORCH)
	@$(PYTORCH)/bin/python -m pip --disable-pip-version-check install --quiet --requirement benchmarks/pytorch.txt
	@touch $@

quickstart: $(INSTALLED)
	@$(VENV)/bin/python quickstart.py --directory $(QUICKSTART)

smoke: $(INSTALLED_DEV)
	$(VENV)/bin/python -m pytest -q --numprocesses=2 --dist=worksteal tests/smoke

test: $(INSTALLED_DEV)
	$(VENV)/bin/python $(PYTEST) $(if $(SLICE),--slice=$(SLICE),-m "not full")

test-full: $(INSTALLED_DEV)
	$(VENV)/bin/python $(PYTEST) -m full $(if $(SLICE),--slice=$(SLICE))

# Each set of versions goes on from checkpoints of the other one.
test-oldest: $(INSTALLED_OLDEST) $(INSTALLED)
	OTHER_PYTHON=$(abspath $(VENV)/bin/python) \
		$(OLDEST)/bin/python -m pytest -q --durations=10 --numprocesses=2 --dist=worksteal \
		$(if $(SLICE),-m smoke --slice=$(SLICE),-m "smoke and not full")

# The steps compile for a TPU that is not there.
test-accelerators: $(INSTALLED_ACCELERATORS)
	$(ACCELERATORS)/bin/python -m pytest -q --numprocesses=2 tests/project/test_accelerators.py

# The environments of benchmarks/accelerators.py and benchmarks/pytorch.py.
accelerators: $(INSTALLED_ACCELERATORS)
	@$(ACCELERATORS)/bin/python benchmarks/accelerators.py --help

pytorch: $(INSTALLED_PYTORCH) $(INSTALLED_DEV)
	@$(VENV)/bin/python benchmarks/pytorch.py --help

# The checks of ruff, and two of our own.
lint: $(INSTALLED_DEV)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python tests/style.py
	$(VENV)/bin/python tests/copies.py

format: $(INSTALLED_DEV)
	$(VENV)/bin/python -m ruff check --fix .
	$(VENV)/bin/python -m ruff format .

docs: $(INSTALLED_DEV)
	@$(VENV)/bin/python docs/generate.py

fix-copies:
	@$(PYTHON) tests/copies.py --fix

clean:
	rm -rf quickstart .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +
