# `make demo` and `make test` need Python >= 3.11 and the network, nothing else: each sets itself up.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.PHONY: setup demo test test-slow lint notebooks bench gpu-check clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/lbw-rl demo --out demo --resume

test: $(READY)
	$(BIN)/python -m pytest -m 'not slow'

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(READY)
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

bench: $(READY)
	$(BIN)/python -m lbw_rl.training_runs.benchmarks.overhead

# Only on a machine with a CUDA device: no decision may wait for it (sync debug mode "error"), NVML reads the card.
gpu-check: $(READY)
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu-check: no CUDA device here (torch " + torch.__version__ + "); a CUDA build of torch goes into .venv first")'
	$(BIN)/python -m pytest tests/test_gpu.py tests/test_device.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
