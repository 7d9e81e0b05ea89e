# The two commands of the README, and what developers use. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: train test test-all check install install-hashed clean

train: $(INSTALLED)  ## install, then run the main job: a small MoE model learns Python
	$(BIN)/muster train quickstart

test: $(INSTALLED)  ## every test that is quick; of three processes one begins with all that start a Ray, which wait much
	$(BIN)/pytest -q -m "not slow" -n 3

test-all: test  ## the slow proofs too, one after the other
	$(BIN)/pytest -q -m slow --timeout 3600

check: $(INSTALLED)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml deploy/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c deploy/constraints.txt -e ".[dev]"
	touch $(INSTALLED)

install-hashed:  ## what a user needs, each file of PyPI's held to its SHA-256; without the developers' tools (`make clean install`)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --no-deps --require-hashes -r deploy/hashes/muster.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps -e .
	$(BIN)/pip check
	touch $(INSTALLED)

clean:
	rm -rf .venv runs
