# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make their own environment with plain pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
# Tests often wait for a process that they started: one more at once than there are cores.
TESTS_AT_ONCE = $(shell $(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')

.PHONY: demo bench test test-all chaos chaos-mutants lint audit install clean

demo: $(READY)  ## the main job on the embedded default: data, service, align, ask, table, report
	@exec $(BIN)/hscr demo $(ARGS)

test: $(READY)  ## all tests that CI runs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist worksteal $(ARGS)

bench: $(READY)  ## ours beside the plain routes and the peers, in a small form: under 10 minutes
	@for name in optimize generate scale; do $(BIN)/python -m benchmarks.bench_$$name --quick || exit 1; done

test-all: $(READY)  ## all tests, those that take longer too, and the demo model made from nothing
	@HSCR_THOROUGH=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist worksteal $(ARGS)
	@$(BIN)/hscr demo-model --rebuild --out build/demo-model
	@HSCR_REBUILT_MODEL=build/demo-model $(BIN)/python -m pytest tests/hscr/test_demo_model.py

chaos: $(READY)  ## random faults against real processes, N steps (make chaos N=1000); the output counts them by stage
	@HSCR_THOROUGH=1 HSCR_CHAOS_STEPS=$(or $(N),1000) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s --timeout 0 tests/chaos $(ARGS)

chaos-mutants: $(READY)  ## the same without the fence, the second ringing, the run folder's lock: it must fail each time
	@$(BIN)/python -m tests.chaos.mutants $(or $(N),60)

lint: $(READY)  ## ruff, format, types, import contracts
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

audit:  ## known vulnerabilities of the pinned versions (needs PyPI's advisories); in an environment of its own, nothing is installed here
	@$(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install -q --disable-pip-version-check pip-audit
	@build/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict --progress-spinner off

install: $(READY)

# torch first and pinned by the constraints file: an open range would pull gigabytes of CUDA packages.
# pip would compile 22,000 modules one after the other; afterwards all cores do. Templates among them are no Python: that is no failure.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.[demo,service,dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $(READY)

clean:
	rm -rf $(VENV) build data *.egg-info
