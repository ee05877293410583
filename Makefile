# The one list of verbs; `make help` prints it. Every verb does its own set-up on a fresh machine.

PYTHON ?= python3
VENV ?= .venv
# The first thing that is installed. CPU-only elsewhere:
#   make sample TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
TESTS ?= tests
# Of `make train`: a folder with the four IDX files (Debian package dataset-fashion-mnist), and how long.
DATA ?= /usr/share/datasets/fashion-mnist
STEPS ?= 8000

PY = $(VENV)/bin/python
INSTALL = $(PY) -m pip install --disable-pip-version-check -c constraints.txt
# Of the package itself nothing is compiled by pip, which would not show it.
INSTALL_HERE = IDDPM_CPP=0 $(INSTALL) --no-build-isolation
BUILD = $(PY) setup.py -q build_ext --inplace
CPP_FILES = $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
BUILD_INPUTS = setup.py $(wildcard tools/*.py) $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help build sample test train bench paper check docs clang sanitize gpu-check soak clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 14

sample: $(VENV)/.built ## draw 64 garments with the bundled fashion-mnist into samples.png
	$(PY) -m iddpm_ext sample -n 64 --steps 50 --labels all --out samples.png

test: $(VENV)/.dev $(VENV)/.built ## run the test suite (TESTS=tests/test_build.py for a part)
	$(PY) -m pytest -q -n auto --maxprocesses 8 --dist loadfile $(TESTS)

check: $(VENV)/.dev $(VENV)/.built ## ruff, mypy, clang-format and what makes tensors
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) tools/check_tensors.py
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)

docs: $(VENV)/.ok ## the documentation as a site into build/site; a broken link or name fails
	$(INSTALL_HERE) --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

clang: $(VENV)/.ok ## compile the module with clang++ too, into build/clang, and import it
	CXX=clang++ IDDPM_CUDA=0 $(PY) setup.py -q build_ext --build-lib build/clang
	PYTHONPATH=build/clang/iddpm_ext $(PY) -c "import torch, _C; print(_C.build_info()['compiler'])"

build: $(VENV)/.ok ## compile the module in place and say what was built
	$(BUILD)
	@touch $(VENV)/.built

train: $(VENV)/.ok $(VENV)/.built ## train the network of the bundled fashion-mnist (DATA=..., STEPS=...) into runs/
	$(PY) -m iddpm_ext train --data $(DATA) --out runs/fashion-mnist --steps $(STEPS) --batch-size 32 --class-cond \
	  --label-dropout 0.1 --model-channels 64 --num-res-blocks 1 --channel-mult 1,1,1 --attention-resolutions 7 \
	  --lr 1e-3 --lr-warmup 200 --lr-decay --grad-clip 1 --ema 0.999 --dtype bfloat16

bench: $(VENV)/.ok $(VENV)/.built ## the CPU engine against other runtimes (those that are installed)
	$(INSTALL_HERE) -e '.[bench]'
	$(PY) -m benchmarks.end_to_end --device cpu

paper: $(VENV)/.dev $(VENV)/.built ## every figure and table of the paper at toy size into runs/paper (DATA=...)
	$(PY) python/paper/all.py --toy --data $(DATA) --out runs/paper

sanitize: $(VENV)/.dev ## run the test suite with the C++ code under AddressSanitizer and UBSan
	CXX=g++ tools/sanitize.sh $(PY) $(TESTS)

gpu-check: $(VENV)/.dev ## on a machine with a GPU: tests, compute-sanitizer, benchmarks; JSON
	$(PY) tools/gpu_check.py

soak: $(VENV)/.dev $(VENV)/.built ## the slow tests too, and many more random examples
	IDDPM_SOAK=1 $(PY) -m pytest -q -m "slow or not slow" $(TESTS)

clean: ## remove what was built; the environment in $(VENV) stays
	rm -rf build dist *.egg-info iddpm_ext/_C*.so $(VENV)/.built

# torch comes first: an unpinned one would bring gigabytes of another version.
$(VENV)/.ok: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): torch and a few small packages, once"
	$(PYTHON) -m venv $(VENV) || { echo "make needs Python's venv (Debian: python3-venv)"; exit 1; }
	$(INSTALL) $(TORCH)
	$(INSTALL) --quiet setuptools pybind11
	$(INSTALL_HERE) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.ok
	@echo "Adding what the tests need"
	$(INSTALL_HERE) -e '.[dev]'
	@touch $@

$(VENV)/.built: $(VENV)/.ok $(BUILD_INPUTS)
	@echo "Compiling the kernels: minutes the first time, a line a file"
	$(BUILD)
	@touch $@
