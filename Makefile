# `make` or `make help` lists the targets. Everything is installed into .venv, nothing outside this folder.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)

# Torch goes in first, so that you choose its build and no dependency does. On Linux plain pip takes a CUDA build of
# several GB. Without a GPU, take it from PyTorch's CPU index: make space TORCH="torch --index-url <PyTorch's CPU index>"
TORCH ?= torch==2.13.0

# Gigabytes that have to be free before an installation; a CUDA build of torch needs about 4 more.
DISK_GB ?= 6

GRADIO_SERVER_PORT ?= 7860
export GRADIO_SERVER_PORT

.NOTPARALLEL:
.PHONY: help space test conformance lint types check wheel torch clean python port

help:
	@echo 'make space   install what the Space needs and serve it on http://127.0.0.1:$(GRADIO_SERVER_PORT)'
	@echo 'make test    install what development needs and run the tests   (ARGS="-k heads" for some)'
	@echo "make conformance   transformers' own model tests, fetched for the installed version   (ARGS='-m \"not distributed\"')"
	@echo 'make lint    ruff: format and rules'
	@echo 'make types   mypy over the package'
	@echo 'make check   lint and types'
	@echo 'make wheel   build dist/*.whl'
	@echo 'make torch   only make the environment and install torch'
	@echo 'make clean   remove .venv, builds and caches'
	@echo
	@echo 'Variables: GRADIO_SERVER_PORT=7861   another port for the Space'
	@echo '           PYTHON=python3.12         another Python, 3.11 or newer'
	@echo '           TORCH="torch --index-url <index>"   another build of torch, before the first installation;'
	@echo "             without a GPU name PyTorch's CPU index: plain pip on Linux takes a CUDA build of several GB"
	@echo '           DISK_GB=$(DISK_GB)                 gigabytes that have to be free to install'

space: port $(VENV)/.space
	$(BIN)/duet space

test: $(VENV)/.dev
	$(BIN)/pytest $(ARGS)

conformance: $(VENV)/.dev
	$(BIN)/python tests/conformance/upstream.py
	$(BIN)/pytest tests/conformance $(ARGS)

lint types: $(VENV)/.dev
	.ci/check $@

check: $(VENV)/.dev
	.ci/check

wheel: $(VENV)/.dev
	rm -rf build dist
	$(BIN)/python -m build --wheel

torch: $(VENV)/.torch

clean:
	rm -rf $(VENV) build dist *.egg-info .typing .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamp files: an installation is repeated when the packaging files changed, or when it did not finish.
$(VENV)/.torch: | python
	@free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); [ "$$free" -ge "$(DISK_GB)" ] || \
	  { echo "error: installing needs $(DISK_GB) GB of free disk and $$free GB are free here: free some, or work in a folder on a larger disk" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	@touch $@

$(VENV)/.space $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch setup.cfg pyproject.toml
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: Python 3.11 or newer is needed and $(PYTHON) is '$$($(PYTHON) --version 2>&1 | tail -n 1)': install it, or name yours with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module: install it (Debian: apt-get install python3-venv)" >&2; exit 1; }

port: python
	@$(PYTHON) -c 'import socket, sys; sys.exit(socket.socket().connect_ex(("127.0.0.1", int(sys.argv[1]))) == 0)' $(GRADIO_SERVER_PORT) 2>/dev/null || \
	  { echo "error: port $(GRADIO_SERVER_PORT) is in use or not a port: choose another with GRADIO_SERVER_PORT=7861 make space" >&2; exit 1; }
