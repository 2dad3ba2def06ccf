"""Several contexts of one model in several threads (tests/native/stress_threads.cpp): every result must be that of one
thread, bit for bit. With STEERMOE_TSAN=1 (make test-threads) the same runs under ThreadSanitizer."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from steermoe_local.llama.library import library_folder
from tests.support import native_programs
from tests.support.random_models import GPT_OSS, OLMOE, RandomModel, write_random_model

ROUNDS = 24
TSAN = os.environ.get("STEERMOE_TSAN") == "1"


@pytest.fixture(scope="module")
def stress() -> Path:
    """The program, over the installed library; under ThreadSanitizer over a library that is built with it."""
    if not (native_programs.TREE / "include" / "llama.h").exists():
        pytest.skip("no prepared llama.cpp tree: make build")
    if sys.platform == "win32":
        pytest.skip("CMake links another way here")
    if TSAN:
        libs = native_programs.libraries(native_programs.BUILD / "tsan", "-fsanitize=thread")
        folder, sanitizers = native_programs.BUILD / "tsan-programs", "thread"
    else:
        libs, folder, sanitizers = library_folder(), native_programs.BUILD / "asan", ""
    variables = {"STEERMOE_LIBS": libs, "STEERMOE_STRESS_SANITIZERS": sanitizers}
    return native_programs.programs(folder, "stress_threads", **variables) / "stress_threads"


@pytest.mark.parametrize(
    ("model", "threads", "decode_threads"),
    # ggml's own threads wait in a busy loop, which takes minutes under ThreadSanitizer where there are few cores
    [(OLMOE, 4, 1), (GPT_OSS, 3, 1 if TSAN else 2)],
    ids=["olmoe", "gpt-oss"],
)
def test_contexts_do_not_disturb_each_other(
    stress: Path, tmp_path: Path, model: RandomModel, threads: int, decode_threads: int
) -> None:
    path = write_random_model(tmp_path / "model.gguf", model)
    files = native_programs.stress_files(tmp_path / "files", path)
    options = (f"-rounds={ROUNDS}", f"-threads={threads}", f"-decode_threads={decode_threads}")
    env = {"TSAN_OPTIONS": "exitcode=66", "OMP_WAIT_POLICY": "passive"}
    done = native_programs.run(stress, path, files, *options, env=env)
    assert "Sanitizer" not in done.stderr, done.stderr[:6000]
    assert done.returncode == 0, done.stderr[-2000:]
    attaches, decodes = map(int, re.findall(r": (\d+) attaches, (\d+) steered decodes", done.stdout)[0])
    assert attaches == 2 * ROUNDS * threads
    assert decodes > attaches


def test_instrumented_only_under_tsan(stress: Path) -> None:
    """An empty report means nothing from a program without instruments."""
    assert (b"__tsan_read" in stress.read_bytes()) == TSAN
