#!/bin/sh
# Steering and recording on an NVIDIA GPU, in one script that fits into ten minutes on 16 cores (make test-cuda):
#
#   tests/integration/cuda/run.sh [FOLDER]
#
# builds the library with CUDA for the GPU that is here (tens of CUDA sources, without flash attention's), and beside it
# an unpatched libllama over the same backend; runs tests/integration/devices on CUDA0 (promise, logits, recorder, biases
# by sequence and token; all, some and no layers offloaded; fused top-k; captured graphs) and the benchmark of steering
# and recording against the unpatched library. FOLDER (build/cuda/results) gets what it prints, the tests as XML and the
# figures as JSON. The status is that of the tests.
#
# It has NOT been run on a GPU so far: no such machine could be had. Where there is no GPU it says so and fails.
#
# It needs nvcc, a C++ compiler, CMake and Python with this package's dependencies, pytest and patch-ng. What is missing is
# taken from build/cuda-kit, which `make cuda-kit` fills on a machine with a network (the llama.cpp tree and wheels; for
# another Python: make cuda-kit CUDA_PYTHON=3.12): copy that folder with the source tree. Without the kit, the network
# serves. cuBLAS may also be that of the Python packages nvidia-cublas or torch.
set -eu

cd "$(dirname "$0")/../../.."
root=$PWD
kit=$root/build/cuda-kit
build=$root/build/cuda
stock=$root/build/cuda-stock
begin=$(date +%s)
LIMIT=${STEERMOE_CUDA_SECONDS:-570} # of all of it; the benchmark is left out where too little is left

say() { echo "[$(($(date +%s) - begin)) s] $*"; }

fail() {
    echo "error: $*" >&2
    exit 1
}

command -v nvcc >/dev/null || fail "no nvcc here: make test-cuda needs NVIDIA's CUDA toolkit and a GPU; nothing was run"
{ command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; } || [ -n "${STEERMOE_CUDA_BUILD_ONLY:-}" ] ||
    fail "nvcc is here, but nvidia-smi -L names no GPU; nothing was run (STEERMOE_CUDA_BUILD_ONLY=1 builds without one)"
mkdir -p "$build" "$stock"
results=${1:-$build/results}
mkdir -p "$results"
results=$(cd "$results" && pwd)

#
# Python
#

python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ -x .venv/bin/python ] && python=$root/.venv/bin/python
fi
if [ -d "$kit/wheels" ]; then
    say "installing the wheels of build/cuda-kit"
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$build/site" "$kit"/wheels/*.whl
fi
PYTHONPATH=$root:$build/site${PYTHONPATH:+:$PYTHONPATH}
PATH=$build/site/bin:$PATH # ninja
export PYTHONPATH PATH
"$python" -c 'import llama_cpp' 2>/dev/null || "$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("llama_cpp"))' ||
    fail "$python has no llama_cpp; run make setup first, or make cuda-kit where there is a network"
"$python" -c 'import click, fastapi, gguf, huggingface_hub, jinja2, linkify_it, llguidance, markdown_it, numpy, patch_ng
import platformdirs, prometheus_client, prompt_toolkit, psutil, pydantic, pytest, rich, tomlkit, uvicorn' ||
    fail "$python lacks the package named above; run make build first, or make cuda-kit where there is a network"
cmake=cmake
command -v cmake >/dev/null || cmake=$(dirname "$python")/cmake
"$cmake" --version >/dev/null || fail "no CMake here; pip install cmake"

#
# build
#

# the toolkit's cuBLAS, else that of the Python packages
# nvcc may be a script that calls that of the toolkit
toolkit=$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -n 1)
toolkit=$(readlink -f "${toolkit:-$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")}")
LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$toolkit/lib64
export LD_LIBRARY_PATH
blas=""
flags=""
if [ ! -e "$toolkit/include/cublas_v2.h" ] && [ ! -e "$toolkit/targets/x86_64-linux/include/cublas_v2.h" ]; then
    major=$(nvcc --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
    blas=$("$python" -c '
import sys
from pathlib import Path
for base in map(Path, sys.path):
    for name in (f"cu{sys.argv[1]}", "cublas"):
        folder = base / "nvidia" / name
        if (folder / "include" / "cublas_v2.h").exists() and any(folder.glob(f"lib/libcublas.so.{sys.argv[1]}")):
            print(folder)
            sys.exit()
' "$major")
    [ -n "$blas" ] || fail "no cuBLAS here: neither in $toolkit nor as nvidia-cublas of $python; pip install 'nvidia-cublas==$major.*'"
    flags="-DCMAKE_CUDA_FLAGS=-I$blas/include -DCUDA_cublas_LIBRARY=$blas/lib/libcublas.so.$major"
    flags="$flags -DCUDA_cublasLt_LIBRARY=$blas/lib/libcublasLt.so.$major"
    LD_LIBRARY_PATH=$blas/lib:$LD_LIBRARY_PATH
fi
tree=""
if [ -e "$kit/llama.cpp.tar.xz" ]; then
    [ -d "$build/source" ] || { mkdir -p "$build/source" && tar -xJf "$kit/llama.cpp.tar.xz" -C "$build/source"; }
    tree=-DSTEERMOE_LLAMA_CPP_SOURCE=$build/source
fi
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
generator=""
command -v ninja >/dev/null && generator="-G Ninja"

configure() { # FOLDER OPTION...
    folder=$1
    shift
    # shellcheck disable=SC2086 # words
    "$cmake" -S . -B "$folder" $generator -DCMAKE_BUILD_TYPE=Release -DPython3_EXECUTABLE="$(command -v "$python")" \
        $tree "$@" ${CMAKE_ARGS:-} >"$folder/build.log" 2>&1 || { tail -n 30 "$folder/build.log" >&2; fail "CMake failed"; }
}

say "building with CUDA ($jobs jobs)"
# Flash attention's kernels take longer to compile than all others, and neither routing nor steering needs them. Without
# virtual memory no stub of the driver's library is needed. The debug option logs which nodes are fused.
# shellcheck disable=SC2086
configure "$build" -DGGML_CUDA=on -DGGML_CUDA_FA=off -DGGML_CUDA_NO_VMM=on -DGGML_CUDA_GRAPHS=on -DGGML_CUDA_DEBUG=on $flags
configure "$stock" -DSTEERMOE_STOCK=on
# shellcheck disable=SC2086
"$cmake" --build "$build" --parallel "$jobs" ${STEERMOE_CUDA_TARGET:+--target $STEERMOE_CUDA_TARGET} >>"$build/build.log" 2>&1 ||
    { tail -n 30 "$build/build.log" >&2; fail "the build failed: $build/build.log"; }
[ -z "${STEERMOE_CUDA_TARGET:-}" ] || exit 0
"$cmake" --build "$stock" --parallel "$jobs" --target llama >>"$stock/build.log" 2>&1 ||
    { tail -n 30 "$stock/build.log" >&2; fail "the unpatched build failed: $stock/build.log"; }
# the unpatched libllama over our ggml: CUDA's part of it is not patched, and compiling it twice takes too long
mkdir -p "$stock/over-cuda"
cp -L "$build"/bin/libggml*.so* "$stock"/bin/libllama.so* "$stock/over-cuda/"
say "built"
[ -z "${STEERMOE_CUDA_BUILD_ONLY:-}" ] || exit 0

#
# tests, benchmark
#

STEERMOE_LIB_PATH=$build/bin
STEERMOE_TEST_DEVICE=CUDA0
export STEERMOE_LIB_PATH STEERMOE_TEST_DEVICE
# Of the machine's pytest plugins only ours: pytest-benchmark warns under xdist, and warnings are errors here.
PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD
workers=""
"$python" -c 'import xdist' 2>/dev/null && workers="-p xdist -n $(((jobs + 1) / 2))"

left() { echo $((LIMIT - ($(date +%s) - begin))); }

[ "$(left)" -gt 30 ] || fail "the build took all of the $LIMIT seconds (STEERMOE_CUDA_SECONDS); it is kept: run this again"
say "tests"
status=0
# Interrupted where the time ends, so that what they found until then is written.
# shellcheck disable=SC2086
timeout -k 8 -s INT "$(($(left) - 10))" "$python" -m pytest -q -p no:cacheprovider $workers -m device \
    --junitxml "$results/tests.xml" tests/integration/devices >"$results/tests.log" 2>&1 || status=$?
tail -n 20 "$results/tests.log"
if [ "$(left)" -lt 90 ]; then
    say "LEFT OUT: the benchmark, for only $(left) of $LIMIT seconds are left (STEERMOE_CUDA_SECONDS)"
    exit "$status"
fi
say "benchmark"
timeout -k 4 -s INT "$(($(left) - 5))" "$python" benchmarks/performance.py --gpu-layers 999 --stock "$stock/over-cuda" \
    --only speed --shapes granite --seconds $(($(left) - 60)) --models "$build/models" --json "$results/performance.json" \
    >"$results/performance.md" || status=1
cat "$results/performance.md"
say "done; all of it is in $results"
exit "$status"
