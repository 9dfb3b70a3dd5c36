# The two commands: `make run` trains, evaluates and promotes the tiny model; `make test` passes the tests.
# TORCH_SPEC names another build of torch (see scripts/install.sh); ARGS goes to `hvqd run`.

PYTHON_BIN := .venv/bin/python
PYTEST := $(PYTHON_BIN) -m pytest

.PHONY: run test test-unit test-long test-slurm check install install-dev install-text install-bench

run: install
	.venv/bin/hvqd run --preset tiny $(ARGS)

test: install-dev
	$(PYTEST) tests/unit tests/multiprocess tests/integration tests/end_to_end tests/gpu

test-unit: install-dev
	$(PYTEST) tests/unit

test-long: install-dev
	$(PYTEST) tests -m long
	$(PYTHON_BIN) tests/benchmarks/overhead.py

test-slurm: install-dev  # a real Slurm of two nodes on this machine; installs Debian's packages or fails
	scripts/install_slurm.sh
	$(PYTEST) tests/slurm -m slurm

check: install-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

install:
	@scripts/install.sh

install-text:  # also what captions need: a tokenizer and the encoder all-MiniLM-L6-v2 (84 MB)
	@scripts/install.sh text

install-dev:
	@scripts/install.sh dev

install-bench:  # also the libraries that the benchmarks measure against
	@scripts/install.sh bench
