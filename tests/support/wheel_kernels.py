"""The numeric tests on the installed wheel's code for other CPUs (make test-dist).

    python -m tests.support.wheel_kernels [--all] [pytest's arguments]

ggml computes the same products by other kernels on other CPUs: in other orders, in tiles of other sizes, with or
without fused multiply-add and F16 conversions. Of the wheel's fourteen kinds of code these differ most.
The tests run in the wheel's own environment, two processes at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.paths import ROOT
from tests.support.wheel_install import PYTHON, libraries_of, variants

KINDS = {"sse42": "SSE4.2", "haswell": "AVX2", "skylakex": "AVX-512"}
"""Each has the instructions of those before it."""

_AVX2 = {"AVX", "AVX2", "FMA", "F16C"}
_FEATURES = {"sse42": set[str](), "haswell": _AVX2, "skylakex": _AVX2 | {"AVX512"}}


def features(env: dict[str, str]) -> set[str]:
    """What the code that is loaded was built for, by its own account."""
    code = "from steermoe_local.llama.backends import cpu_features; print(*cpu_features())"
    done = subprocess.run([PYTHON, "-P", "-c", code], env=env, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def main(arguments: list[str]) -> int:
    """Test every kind that this CPU can run, but the best: the native build (make test) has at least its kernels.

    `--all` takes the best one, too.
    """
    runs = variants()
    runnable = [kind for kind in KINDS if runs.get(kind)]  # a wheel for another processor has none of them
    for kind, name in KINDS.items():
        if kind not in runnable:
            print(f"== {name}: LEFT OUT, this CPU cannot run it", flush=True)
    if "--all" not in arguments and runnable:
        print(f"== {KINDS[runnable.pop()]}: left to the native build (make test); --all runs it", flush=True)
    options = [argument for argument in arguments if argument != "--all"]
    pytest = [str(PYTHON), "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile"]
    failed = []
    for kind in runnable:
        print(f"== {KINDS[kind]}: numeric tests on the wheel's libggml-cpu-{kind}.so", flush=True)
        env = os.environ | {"STEERMOE_LIB_PATH": str(libraries_of(kind)), "STEERMOE_REQUIRE_TOOLS": "1"}
        loaded = features(env) & _FEATURES["skylakex"]
        assert loaded == _FEATURES[kind], f"{kind}: the loaded library says {sorted(loaded)}"
        if subprocess.run([*pytest, "-m", "numeric", *options], cwd=ROOT, env=env, check=False).returncode:
            failed.append(KINDS[kind])
    if failed:
        print(f"error: numeric tests failed on {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
