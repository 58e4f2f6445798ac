# Every target creates and updates the environment by itself: `make demo` and `make test` are enough on a fresh machine.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# A file of tests stays in one process; one thread each, so that two processes do not wait for each other's.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
# Everything that is ours and Python, also before the first commit of a file.
SOURCES := relexkit trainer analysis tests docs

.PHONY: help demo test test-all test-kernels test-browser check docs bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train a small model by GRPO, record, analyse, extrapolate, evaluate: minutes on two cores (ARGS='-o FOLDER ...')"
	@echo "make test      the default tests (ARGS='tests/store -k crash')"
	@echo "make test-all  every test, also the slow ones"
	@echo "make test-kernels  the numerical tests with other kernels of the linear algebra library"
	@echo "make test-browser  the report in a headless Chromium, installed by apt when missing"
	@echo "make check     lint, format, types and the default tests: what continuous integration runs"
	@echo "make docs      the documentation as a site in docs/_build, every warning an error"
	@echo "make bench     speed, memory and disk against the budgets (ARGS='--reference CLONE ...')"
	@echo "make clean     remove the environment, caches and the demo's results"

# The stamp is written last, so an interrupted installation is started again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "relexkit needs Python 3.11 or newer; give one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/relexkit demo $(ARGS)

test: $(STAMP)
	$(PYTEST) $(ARGS)

test-all: $(STAMP)
	$(PYTEST) -m 'slow or not slow' $(ARGS)

# The linear algebra library rounds differently with every kernel, and a machine shows but one: the numerical tests
# with two others that every x86-64 machine with AVX2 has (elsewhere the library takes its own). On one thread and on two.
NUMERICAL := $(addprefix tests/gram_matrix/test_,gram.py onepass.py randomized.py segment.py) tests/geometry/test_spectrum.py
test-kernels: $(STAMP)
	OPENBLAS_CORETYPE=Sandybridge OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(NUMERICAL) $(ARGS)
	OPENBLAS_CORETYPE=Haswell OMP_NUM_THREADS=2 $(BIN)/python -m pytest -n 2 --dist loadfile $(NUMERICAL) $(ARGS)

test-browser: $(STAMP)
	command -v chromedriver >/dev/null || { apt-get update -q && apt-get install -q -y --no-install-recommends chromium chromium-driver; }
	$(BIN)/python -m pytest tests/analysis/test_report_browser.py $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(PYTEST)

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build $(ARGS)

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/run.py $(ARGS)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build dist demo-run docs/_build docs/reference
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
