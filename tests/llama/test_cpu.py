"""How many threads llama.cpp computes with, and which weights it repacks."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from gguf import LlamaFileType

from steermoe_local import SteeredLlama
from steermoe_local.llama import capi, cpu
from steermoe_local.llama.quantizer import quantize_file
from steermoe_local.model_files.cache_shape import read_headers
from steermoe_local.model_files.memory import repacked_bytes
from steermoe_local.model_files.model_info import model_info
from tests.support.low_level import lib


def machine(root: Path, cores: list[list[int]], performance: str = "") -> Path:
    """A /sys/devices with these threads of each core; `performance` lists the CPUs of performance cores."""
    for threads in cores:
        for thread in threads:
            folder = root / "system" / "cpu" / f"cpu{thread}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(",".join(map(str, threads)) + "\n")
    if performance:
        (root / "cpu_core").mkdir()
        (root / "cpu_core" / "cpus").write_text(f"{performance}\n")
    return root


linux = pytest.mark.skipif(sys.platform == "darwin", reason="macOS tells by sysctl")


@linux
@pytest.mark.parametrize(
    ("cores", "performance", "allowed", "n"),
    [
        ([[0], [1], [2]], "", range(3), 3),
        ([[0, 4], [1, 5], [2, 6], [3, 7]], "", range(8), 4),
        ([[0, 4], [1, 5], [2, 6], [3, 7]], "", [0, 4], 1),  # bound to one core
        ([[0, 1], [2, 3], [4], [5], [6], [7]], "0-3", range(8), 2),  # efficiency cores do not count
        ([[0, 1], [2, 3], [4], [5]], "0-3", [4, 5], 2),  # bound to efficiency cores only
        ([], "", range(1), 1),  # the system does not say
    ],
)
def test_physical_cores(tmp_path: Path, cores: list[list[int]], performance: str, allowed: range, n: int) -> None:
    assert cpu.physical_cores(machine(tmp_path, cores, performance), allowed) == n


@linux
@pytest.mark.parametrize(
    ("capacities", "allowed", "n"),
    [
        ([446, 446, 446, 446, 1024, 1024, 1024, 1024], range(8), 4),  # of ARM's two kinds the larger
        ([446, 446, 1024, 1024], [0, 1], 2),  # bound to small ones
        ([750, 750, 1024], range(3), 3),  # not much less
        ([1024] * 4, range(4), 4),
    ],
)
def test_capacities(tmp_path: Path, capacities: list[int], allowed: Sequence[int], n: int) -> None:
    root = machine(tmp_path, [[cpu] for cpu in range(len(capacities))])
    for number, capacity in enumerate(capacities):
        (root / "system" / "cpu" / f"cpu{number}" / "cpu_capacity").write_text(f"{capacity}\n")
    assert cpu.physical_cores(root, allowed) == n


def test_quotas_of_control_groups(tmp_path: Path) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text("0::/a/b\n3:cpu,cpuacct:/c\n")
    for folder, name, text in [
        ("a/b", "cpu.max", "150000 100000"),
        ("a", "cpu.max", "max 100000"),
        ("cpu/c", "cpu.cfs_quota_us", "400000"),
        ("cpu/c", "cpu.cfs_period_us", "100000"),
        ("cpu", "cpu.cfs_quota_us", "-1"),
        ("cpu", "cpu.cfs_period_us", "100000"),
    ]:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text(f"{text}\n")
    assert sorted(cpu.cpu_quotas(proc, tmp_path)) == [2, 4]
    assert cpu.cpu_quotas(tmp_path / "missing", tmp_path) == []


@pytest.fixture
def computed_anew() -> Iterator[None]:
    cpu.default_threads.cache_clear()
    yield
    cpu.default_threads.cache_clear()


@pytest.mark.usefixtures("computed_anew")
@pytest.mark.parametrize(("cores", "quotas", "n"), [(6, [], 6), (6, [4, 2], 2), (2, [8], 2), (0, [], 1)])
def test_default_threads(cores: int, quotas: list[int], n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "physical_cores", lambda: cores)
    monkeypatch.setattr(cpu, "cpu_quotas", lambda: quotas)
    assert cpu.default_threads() == n


def test_a_model_computes_with_them(tiny_path: Path) -> None:
    for arguments, n, n_batch in [({}, 1, 1), ({"n_threads": 3}, 3, 3), ({"n_threads_batch": 3}, 1, 3)]:
        with closing(SteeredLlama(tiny_path, n_ctx=64, **arguments)) as llama:
            assert (llama.context_params.n_threads, llama.context_params.n_threads_batch) == (n, n_batch)
    with closing(SteeredLlama(tiny_path, n_ctx=64, n_threads=2, n_threads_batch=5)) as llama:
        assert (llama.context_params.n_threads, llama.context_params.n_threads_batch) == (2, 5)
    assert cpu.default_threads() <= (os.cpu_count() or 1)


def test_threads_by_the_weights_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "default_threads", lambda: 8)
    some = cpu.BYTES_OF_A_THREAD
    assert [cpu.useful_threads(n) for n in (0, 1, some, some + 1, 5 * some, 8 * some, 10**12)] == [1, 1, 1, 2, 5, 8, 8]


def test_contexts_of_a_tiny_model_take_one_thread(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's, too, unless it is told; the weights that count are those that a token uses."""
    monkeypatch.setattr(cpu, "default_threads", lambda: 8)
    with closing(SteeredLlama(tiny_path, n_ctx=64)) as llama:
        for given, n in ((None, 1), (4, 4)):
            params = capi.parallel_context_params(64, 32, 1, given)
            context = capi.new_context(llama._model.model, params)
            assert (params.n_threads, params.n_threads_batch) == (n, n)
            capi.llama_cpp().llama_free(context)
        size = llama._model.size()
        assert size > cpu.BYTES_OF_A_THREAD, "the whole model is worth more than one"
        monkeypatch.setattr(cpu, "BYTES_OF_A_THREAD", size // 24)  # of 24 experts a token uses 4
        assert capi.model_threads(llama._model.model) in (4, 5)


#
# repacking
#


def buffers(path: Path, repack: bool) -> dict[str, float]:
    """Name and MiB of each buffer that llama.cpp logs for the weights."""
    from llama_cpp import _logger

    llama, lines = lib(), []

    @llama.llama_log_callback
    def keep(level: int, text: bytes, data: object) -> None:
        lines.append(text.decode("utf-8", "replace"))

    params = llama.llama_model_default_params()
    params.use_extra_bufts = repack
    llama.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        model = llama.llama_model_load_from_file(str(path).encode(), params)
        assert model
        llama.llama_model_free(model)
    finally:
        llama.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
    return {name: float(size) for name, size in re.findall(r"(\S+) model buffer size = +([0-9.]+) MiB", "".join(lines))}


def quantized(tiny_path: Path, folder: Path, kind: str) -> Path:
    target = folder / f"{kind}.gguf"
    quantize_file(tiny_path, target, LlamaFileType[f"MOSTLY_{kind}"].value, requantize=True)
    return target


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K_M", "IQ4_NL", "Q2_K", "Q8_0", "Q5_1"])
def test_the_copies_are_those_that_llama_cpp_makes(kind: str, tiny_path: Path, tmp_path: Path) -> None:
    path = quantized(tiny_path, tmp_path, kind)
    copies, _ = repacked_bytes(read_headers(model_info(path)), cpu.repacks())
    logged = buffers(path, repack=True)
    extra = sum(size for name, size in logged.items() if name in ("CPU_REPACK", "AMX"))
    assert copies / 2**20 == pytest.approx(extra, abs=0.01 + 0.001 * len(logged))  # two decimals, and alignment
    without = buffers(path, repack=False)
    assert not {"CPU_REPACK", "AMX"} & set(without)


def test_what_is_repacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def features(*names: str) -> Callable[[str, tuple[int, ...]], bool]:
        monkeypatch.setattr(cpu, "_has", lambda name: name in names)
        return cpu.repacks()

    assert not features()("Q4_0", (64, 64))
    avx2 = features("avx2")
    assert avx2("Q4_0", (64, 8, 16))
    assert avx2("MXFP4", (64, 8, 16))
    assert not avx2("Q4_0", (64, 4))
    assert not avx2("Q4_0", (64,))
    assert not avx2("Q2_K", (256, 64))
    assert features("avx2", "avx512")("Q2_K", (256, 64))
    assert features("neon", "dotprod")("Q8_0", (64, 4))
    assert features("neon", "matmul_int8")("Q1_0", (128, 4))
    assert not features("neon", "matmul_int8")("IQ4_NL", (64, 4))
    assert not features("neon")("Q4_0", (64, 8))
    assert features("neon", "dotprod", "matmul_int8")("Q6_K", (256, 8))
    assert not features("dotprod")("Q8_0", (64, 4))
    amx = features("avx2", "amx_int8")
    assert amx("Q8_0", (64, 32))
    assert not amx("Q8_0", (64, 32, 8))
