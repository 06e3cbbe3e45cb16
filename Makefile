# make train     train a residual network with batch normalization and dropout on real data
# make test      run all tests
# make lint      style, types, import rules
# make bench     measure the kernels against PyTorch's; results in benchmarks/results
# make wheel     one wheel for every Python from 3.10 and every torch from 2.10
# make build     build the kernels in place
# make sanitize  the operator tests on kernels built with sanitizers
# make clean     remove what was built; runs/ stays
#
# Each target sets up what it needs in .venv, pinned by constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
# A worker that dies ends the run: of a replaced one, loadgroup waits for ever for what it had to do.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadgroup --max-worker-restart=0
CSRC   := $(shell find src/normdrop/csrc -name '*.cpp' -o -name '*.h')

.PHONY: train test lint format bench wheel build sanitize clean help
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

train: $(VENV)/.train
	$(BIN)/normdrop train

test: $(VENV)/.dev
	$(PYTEST) $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.kernels $(BENCH_ARGS)

wheel: $(VENV)/.build
	NORMDROP_REQUIRE_KERNELS=1 $(BIN)/python -m pip --disable-pip-version-check wheel -q --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

build: $(VENV)/.build
	$(PIP) --no-build-isolation --no-deps -e .

# torch and setuptools come first: the kernels are built against the installed torch.
$(VENV)/.build: constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "normdrop needs Python 3.10 or newer; name one: make PYTHON=python3.12 …"; exit 1; }
	@echo "Setting up $(VENV) (once)"
	@$(PIP) torch setuptools wheel
	@touch $@

$(VENV)/.train: $(VENV)/.build pyproject.toml setup.py $(CSRC)
	@echo "Installing normdrop"
	@$(PIP) --no-build-isolation -e '.[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.build pyproject.toml setup.py $(CSRC)
	@echo "Installing normdrop and its development tools"
	@$(PIP) --no-build-isolation -e '.[train,export,dev]'
	@touch $@ $(VENV)/.train

# The operator tests on kernels built with address and undefined-behaviour sanitizers, for every
# instruction set that this processor has; test_build.py would load the ordinary build beside them,
# and test_instruction_sets.py runs them all by itself.
SETS_HERE = import torch; \
  n = {"DEFAULT": 1, "AVX2": 2}.get(torch.backends.cpu.get_cpu_capability(), 3); \
  print(*("avx512", "avx2", "baseline")[3 - n:])

sanitize: $(VENV)/.dev
	NORMDROP_SANITIZE=address,undefined NORMDROP_REQUIRE_KERNELS=1 $(BIN)/python setup.py -q \
	  build_ext --build-lib build/sanitize --build-temp build/temp.sanitize
	@export NORMDROP_KERNELS=$(CURDIR)/build/sanitize/normdrop/_C.abi3.so; \
	export ASAN_OPTIONS=detect_leaks=0; \
	preload="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)"; \
	tests="tests/ops --ignore tests/ops/test_build.py"; \
	for isa in $$($(BIN)/python -c '$(SETS_HERE)'); do \
	  echo "Kernels for $$isa"; \
	  NORMDROP_ISA=$$isa LD_PRELOAD="$$preload" $(PYTEST) -q -p no:cacheprovider \
	    $(or $(PYTEST_ARGS),$$tests) || exit 1; \
	  tests="$$tests --ignore tests/ops/test_instruction_sets.py"; \
	  tests="$$tests --ignore tests/ops/test_batch_norm_outliers.py"; \
	done

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src -name '*.so' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
