"""A short run of the fuzz targets under AddressSanitizer and UBSan. `make fuzz` is the long one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from steermoe_local.llama.library import library_folder
from tests.support import native_programs
from tests.support.random_models import write_random_model

READER_RUNS, ATTACH_RUNS = 20_000, 4_000


@pytest.fixture(scope="module")
def programs() -> Path:
    """fuzz_bias, and fuzz_attach over the installed library; built on first use and kept in build/asan."""
    if not (native_programs.TREE / "include" / "llama.h").exists():
        pytest.skip("no prepared llama.cpp tree: make build")
    if sys.platform == "win32":
        pytest.skip("the compilers of this platform have other sanitizers")
    folder = native_programs.BUILD / "asan"
    return native_programs.programs(folder, "fuzz_bias", "fuzz_attach", STEERMOE_LIBS=library_folder())


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_programs.reader_seeds(tmp_path_factory.mktemp("seeds"))


def fuzz(program: Path, runs: int, seeds: Path, artifacts: Path, **env: Path) -> dict[str, int]:
    options = (f"-runs={runs}", "-seed=1", f"-artifact_prefix={artifacts}/")
    done = native_programs.run(program, *options, seeds, env=env)
    for words in native_programs.REPORTS:
        assert words not in done.stderr, done.stderr[:4000]
    assert done.returncode == 0, done.stderr[-2000:]
    assert native_programs.executions(done.stdout) == runs + len(list(seeds.iterdir()))
    return native_programs.outcomes(done.stdout)


def test_reader(programs: Path, seeds: Path, tmp_path: Path) -> None:
    found = fuzz(programs / "fuzz_bias", READER_RUNS, seeds, tmp_path)
    # a run whose mutations are all refused at the first field would tell nothing
    assert min(found["accepted"], found["refused"]) > READER_RUNS / 20, found


def test_attach(programs: Path, tmp_path: Path) -> None:
    """The library itself is not instrumented here: what the C functions promise is checked, and memory as malloc sees
    it."""
    model = write_random_model(tmp_path / "model.gguf", native_programs.FUZZ_MODEL)
    seeds = native_programs.attach_seeds(tmp_path / "seeds", model)
    found = fuzz(programs / "fuzz_attach", ATTACH_RUNS, seeds, tmp_path, STEERMOE_FUZZ_MODEL=model)
    assert min(found["attached"], found["refused"]) > ATTACH_RUNS / 20, found
    assert min(found["decoded"], found["unsupported"], found["mismatch"]) > 3, found


def test_a_run_can_be_repeated(programs: Path, seeds: Path, tmp_path: Path) -> None:
    first, second = (fuzz(programs / "fuzz_bias", 1000, seeds, tmp_path) for _ in range(2))
    assert first == second


def test_a_model_that_cannot_be_loaded(programs: Path, seeds: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.gguf"
    done = native_programs.run(programs / "fuzz_attach", "-runs=1", seeds, env={"STEERMOE_FUZZ_MODEL": missing})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {missing}: no context")


def test_the_sanitizers_are_on(programs: Path) -> None:
    symbols = (programs / "fuzz_bias").read_bytes()
    assert b"__asan_report_load" in symbols
    assert b"__ubsan_handle" in symbols
