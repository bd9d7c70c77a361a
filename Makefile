# make install   a virtual environment in .venv, with the library built in place; does nothing when nothing changed
# make test      install, linters, tests
# make tsan      the CPU kernels from several threads under ThreadSanitizer
# make wheel     dist/*.whl: one wheel for every Python 3 and torch from 2.10 on, CPU and CUDA builds
# make cutlass   CUTLASS's convolutions (FUSEDRES_CUTLASS=1) compiled for sm_90a; fetches the headers, needs no GPU
# make fuzz      20,000 random blocks with random lives against stock PyTorch; an hour or more, goes on where it stopped
# make gpu       all tests and benchmarks on a GPU, with this machine's own Python and nothing installed: docs/gpu.md
# make results   measures this machine for bench/results/, then make report; over half an hour
# make report    docs/benchmarks.md with its figures, and README's tables, from bench/results/
# make demo bench bench-quick format clean

PYTHONS := python3 python3.13 python3.12 python3.11 python3.10
SUPPORTED := import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(firstword $(foreach python,$(PYTHONS),$(shell $(python) -c '$(SUPPORTED)' 2>/dev/null && echo $(python))))

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
CLANG_FORMAT := $(VENV)/bin/clang-format

TORCH := torch==2.13.0
TORCHVISION := torchvision==0.28.0
TRITON := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),triton==3.7.1)

# Folders count too: theirs is the time that changes when a file goes away.
SOURCES := $(shell find csrc)
FORMATTED = $(shell find csrc tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# Developers build strictly; a user's compiler may warn.
export FUSEDRES_WERROR := 1

# A process per core, eight at most. Threads that wait sleep, so that those of other processes have the cores.
TESTED := OMP_WAIT_POLICY=passive $(PY) -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: install demo test tsan cutlass fuzz bench bench-quick gpu results report wheel format clean
.DEFAULT_GOAL := install

install: $(VENV)/.library

$(PY):
	@test -n "$(PYTHON)" || { echo "fusedres: no Python from 3.10 to 3.13 with venv found; set PYTHON" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torchvision without its dependencies: it would bring another torch, and its compiled ops are not used.
$(VENV)/.packages: pyproject.toml setup.py Makefile | $(PY)
	$(PIP) install "$(TORCH)" $(TRITON) numpy pillow "setuptools>=77" "ninja>=1.11"
	$(PIP) install --no-deps "$(TORCHVISION)"
	$(PIP) install --no-build-isolation --editable ".[dev]"
	@touch $@

$(VENV)/.library: $(VENV)/.packages $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

demo: install
	$(PY) -m fusedres demo

test: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(FORMATTED)
	$(TESTED)
	$(TESTED) bench --benchmark-disable

tsan: install
	$(PY) tests/csrc/tsan/run.py

cutlass: install build/cutlass
	PYTHONPATH=build/cutlass $(PY) -m pytest -q tests/csrc/test_cutlass.py

# The headers alone: what else the package asks for is for its generator of kernels.
build/cutlass:
	$(PIP) install --no-deps --target $@ "$$(sed -n 's/^CUTLASS = "\(.*\)"$$/\1/p' setup.py)"

fuzz: install
	$(PY) -m tools.fuzz $(FUZZ)

bench: install
	$(PY) -m fusedres bench

bench-quick: install
	$(PY) -m fusedres bench --quick

# Not through install: such a machine may have no network. For example: make gpu GPU="--budget 300 --only tests"
gpu:
	$(PYTHON) -m tools.gpu $(GPU)

# On a quiet machine: everything that README and docs/benchmarks.md tell of this one.
results: install
	$(PY) -m fusedres bench --json
	$(PY) -m fusedres bench --architectures --json
	$(PY) -m fusedres memory resnet50 densenet121 seresnet50 preresnet50 --json --budget 700 --out build/memory.svg
	$(PY) -m fusedres growth --json
	$(PY) -m fusedres engines --json
	$(MAKE) report

report: install
	$(PY) bench/update_readme.py
	$(PY) -m fusedres report bench/results/*/*.json

wheel: install
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(FORMATTED)

clean:
	rm -rf build dist fusedres/_C.so fusedres/_build.json $(VENV)/.library .pytest_cache .ruff_cache .hypothesis
