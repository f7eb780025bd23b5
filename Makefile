# Every target works from a fresh clone: it first sets up .venv, and again when what it was made from has changed.
PYTHON ?= python3
BENCH_ARGS ?= --runner iter
PYTEST_ARGS ?=
PERF_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
READY := .venv/.ready
CSRC := $(shell find csrc)
CPP := $(filter %.h %.cpp,$(CSRC))

.PHONY: bench peers test test-slow test-cuda perf core asan lint format clean
.DELETE_ON_ERROR:

bench: $(READY)  ## train a real model on real data, and say where the time went
	$(BIN)/python -m fastrunner.bench $(BENCH_ARGS)

# mmcv's setup.py wants an older setuptools than torch does, so it has one for that moment. torchvision has no build for
# this torch: the bench stands in for it.
peers:  ## the runners that the bench compares with, in an environment of their own
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q torch==2.13.0
	.venv-peers/bin/python -m pip install -q 'setuptools<70' wheel
	MMCV_WITH_OPS=0 .venv-peers/bin/python -m pip install -q --no-build-isolation mmcv==1.7.2
	.venv-peers/bin/python -m pip install -q torch==2.13.0 'setuptools>=77' -r benchmarks/peers.txt

test: $(READY)
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

test-cuda: $(READY)
	$(BIN)/python -m pytest -q -m cuda $(PYTEST_ARGS)

perf: $(READY)  ## the benchmark suite: each file answers one question and holds one bar
	$(BIN)/python -m pytest -q -s benchmarks $(PERF_ARGS)

core: $(INSTALLED)  ## compile what has changed in csrc, in place
	$(BIN)/cmake -S . -B build/dev -G Ninja --log-level=WARNING \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/cmake --build build/dev

# The core is built a second time, beside the first. Leaks are not looked for: Python keeps much to its end. libstdc++
# comes with it, or exceptions of libraries that are loaded later find no way.
ASAN := build/asan
asan: $(READY)  ## the tests of the core's memory under AddressSanitizer
	$(BIN)/cmake -S . -B $(ASAN) -G Ninja --log-level=WARNING -DFASTRUNNER_ASAN=ON \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/$(ASAN)/built \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/cmake --build $(ASAN)
	rm -rf $(ASAN)/package && mkdir -p $(ASAN)/package && cp -as $(CURDIR)/fastrunner $(ASAN)/package/
	cp -as $(CURDIR)/kernels $(ASAN)/package/fastrunner/kernels
	rm -f $(ASAN)/package/fastrunner/_core*.so && cp $(ASAN)/built/_core*.so $(ASAN)/package/fastrunner/
	cd $(ASAN)/package && PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(CURDIR)/$(BIN)/python -m pytest -q -p no:cacheprovider --rootdir $(CURDIR) -c $(CURDIR)/pyproject.toml \
	  $(CURDIR)/tests/core $(CURDIR)/tests/optim $(PYTEST_ARGS)

lint: $(READY)  ## checks only; `make format` repairs what can be repaired
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@# mypy sees the package as it is installed: kernels/ as fastrunner.kernels
	@rm -rf build/typed && mkdir -p build/typed && cp -as $(CURDIR)/fastrunner build/typed/
	@cp -as $(CURDIR)/kernels build/typed/fastrunner/kernels
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p fastrunner
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf .venv .venv-peers build dist *.egg-info fastrunner/_core*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and by version, so that nothing pulls another build of it.
$(INSTALLED): pyproject.toml setup.py
	@echo "Setting up .venv and compiling the core: a few minutes the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q torch==2.13.0 -e '.[all]'
	@touch $@

# pip has just compiled the whole core, or else only its sources have changed since.
$(READY): $(INSTALLED) CMakeLists.txt $(CSRC)
	@test $(INSTALLED) -nt $@ || $(MAKE) --no-print-directory core
	@touch $@
