# Every target sets up what it needs: a virtual environment in .venv, with the versions of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# tests by one process a core, a gigabyte each; with threads of torch's beside them they would wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test test-slow test-vllm lint benchmark evaluation reference-table real-model clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt setup.py $(wildcard kappaquant/kernels/cpu/*.cpp kappaquant/kernels/cpu/*.h kappaquant/kernels/cpu/*.inl)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m scripts.demo

test: $(READY)
	$(PYTEST) -m "not slow"

# What is too long to wait for after each change; continuous integration runs it.
test-slow: $(READY)
	$(PYTEST) -m slow

test-vllm:
	python=$$(scripts/vllm_venv.sh) && $$python -m pytest tests/engines/vllm tests/formats/test_format_extension.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(READY)
	$(BIN)/python -m benchmarks.codec_error
	$(BIN)/python -m benchmarks.plan_sizes
	$(BIN)/python -m benchmarks.serving_sizes
	$(BIN)/python -m benchmarks.quantize_cost
	$(BIN)/python -m scripts.demo --results
	$(BIN)/python -m benchmarks.reference_calibrated
	$(BIN)/python -m benchmarks.architectures
	$(BIN)/python -m benchmarks.readme

# Two checkpoints of the reference model measured, compared, one with a model card; offline.
evaluation: $(READY)
	$(BIN)/python -m scripts.evaluation

# Other quantizers on the reference model; installs them into the same environment.
reference-table: $(READY)
	$(PIP) --no-build-isolation -e '.[peers]'
	$(BIN)/python -m benchmarks.reference_table
	$(BIN)/python -m benchmarks.readme

# Real weights by many quantizers; installs them, compiles one, and needs a text: make real-model TEXT=wikitext2_test.txt
real-model: $(READY)
	$(PIP) llama-cpp-python
	$(PIP) --no-build-isolation -e '.[real-model]'
	scripts/calibrated_venv.sh
	$(BIN)/python -m benchmarks.real_model --text $(TEXT)
	$(BIN)/python -m benchmarks.real_model --text $(TEXT) --dither 0 --rows 'type Q[456]_K*' 'llama.cpp Q[456]*' 'calibrated [3456] g64*'
	$(BIN)/python -m benchmarks.real_report
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf $(VENV) demo
