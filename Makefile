# The two commands of the README, and what developers use. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: train test test-all check install clean

train: $(INSTALLED)  ## install, then run the main job: a small MoE model learns Python
	$(BIN)/muster train quickstart

test: $(INSTALLED)  ## every test that is quick
	$(BIN)/pytest -q -m "not slow"

test-all: $(INSTALLED)  ## the slow proofs too
	$(BIN)/pytest -q

check: $(INSTALLED)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml deploy/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c deploy/constraints.txt -e ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf .venv runs
