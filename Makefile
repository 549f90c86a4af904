# The two that a newcomer needs: make demo, make test. The rest is for contributors; CONTRIBUTING.md says when.
VENV ?= .venv
PY := $(VENV)/bin/python
FUZZ_SECONDS ?= 60
PYTEST_ARGS ?=
SOURCES := $(wildcard native/*.c native/*.h native/build.py setup.py)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo test dev native lint format types layers tests crash fuzz bench bench-smoke docs check clean distclean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## say what there is to make
	@sed -n 's/^\([a-z-]*\):[^#]*## /make \1	/p' Makefile | expand -t 20

demo: $(VENV)/.built ## build, then replicate a real disk between two processes, fail over and back, and prove it
	$(PY) -m hvreplica demo

test: dev check ## all set-up, then lint, types, layers and tests

check: lint types layers tests ## all checks, without the set-up

dev: $(VENV)/.dev $(VENV)/.built ## the virtual environment with all that tests and checks need

native: $(VENV)/.run ## build the C extension again; SAN=1 with address and undefined-behaviour sanitizers
	SAN=$(SAN) $(PY) native/build.py && touch $(VENV)/.built

lint: dev ## ruff: rules and format
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

format: dev ## let ruff repair what it can
	$(PY) -m ruff check --fix . ; $(PY) -m ruff format .

types: dev ## mypy, strict
	$(PY) -m mypy

layers: dev ## which package may import which
	$(VENV)/bin/lint-imports --no-cache

tests: dev ## every test; PYTEST_ARGS="-k name" for some
	$(PY) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

crash: dev ## the power-cut and kill tests with many more states and examples
	HVREPLICA_PROFILE=deep $(PY) -m pytest --timeout 0 tests/crash $(PYTEST_ARGS)

fuzz: dev ## every fuzzer, guided by coverage, for FUZZ_SECONDS in all; installs atheris where it can be had
	@$(PY) -c 'import atheris' 2>/dev/null || { echo "installing atheris"; \
	    $(PY) -m pip install --quiet --retries 1 --timeout 15 --editable '.[fuzz]' || \
	    echo "atheris cannot be had here: nothing will be guided by coverage" >&2; }
	$(PY) -m tests.fuzz --seconds $(FUZZ_SECONDS)

bench: dev ## the figures of docs/benchmarks.md, on this machine
	$(PY) -m bench

bench-smoke: dev ## every benchmark once, small: does it run and is its output right?
	$(PY) -m bench --smoke

docs: dev ## write the generated parts of docs/ again
	$(PY) scripts/make_docs.py

clean: ## remove what builds and tests leave
	rm -rf build dist .cache .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .benchmarks bench/results
	rm -rf src/*.egg-info src/hvreplica/native/*.so $(VENV)/.built
	find src tests scripts bench native -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## and the virtual environment
	rm -rf $(VENV)

# Stamps: .run = installed for use, .dev = with tests and checks, .built = the extension is as new as its sources.
$(VENV)/.run: pyproject.toml setup.py scripts/make_venv.sh
	@scripts/make_venv.sh $(VENV)
	@echo "installing hvreplica and what it needs, building its C extension"
	@$(PY) -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py scripts/make_venv.sh
	@scripts/make_venv.sh $(VENV)
	@echo "installing hvreplica, its tests and its checks, building its C extension"
	@$(PY) -m pip install --quiet --editable '.[test,lint]'
	@touch $@ $(VENV)/.run

$(VENV)/.built: $(SOURCES) | $(VENV)/.run
	@built=$$(ls src/hvreplica/native/_hvr*.so 2>/dev/null | head -n 1); \
	if [ -z "$$built" ] || [ -n "$$(find $(SOURCES) -newer "$$built")" ]; then \
	    echo "building the C extension"; $(PY) native/build.py; fi
	@touch $@
