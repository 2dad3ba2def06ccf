"""What llama.cpp makes of this machine's CPU: how many threads, and which weights it keeps a second copy of."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from .._util.control_groups import group_folders
from . import backends

_CPUS = Path("/sys/devices")
BYTES_OF_A_THREAD = 4 << 20
"""Weights of a token for which another thread is taken: about half a millisecond of work."""


@functools.cache
def default_threads() -> int:
    """Threads to compute with: the physical cores that this process may use, at least 1.

    As in llama.cpp (common/common.cpp: common_cpu_get_num_math), efficiency cores do not count, nor do the second
    threads of a core. Besides, a process that is bound to some CPUs, or has a quota of CPU time, takes no more threads
    than these; llama.cpp's would wait for each other.
    """
    return max(1, min([physical_cores(), *cpu_quotas()]))


def useful_threads(n_bytes: int) -> int:
    """Threads to compute with on a model of which each token needs so many bytes of weights: of `default_threads` those
    that have work enough.

    Threads wait for each other after every operation, some hundred times a token. On a tiny model that takes longer
    than the work, and on a machine with other work on its cores many times as long (benchmarks/threads.py).
    """
    return max(1, min(default_threads(), -(-n_bytes // BYTES_OF_A_THREAD)))


def physical_cores(root: Path = _CPUS, allowed: Iterable[int] | None = None) -> int:
    """Number of physical cores among the CPUs that this process may run on (`allowed`), without efficiency cores.

    `root` is Linux's /sys/devices. Falls back to the number of CPUs where the system does not say.
    """
    if sys.platform == "darwin" and (n := _sysctl(b"hw.perflevel0.physicalcpu") or _sysctl(b"hw.physicalcpu")):
        return n
    if allowed is None:
        affinity = getattr(os, "sched_getaffinity", None)
        allowed = affinity(0) if affinity else range(os.cpu_count() or 1)
    cpus = set(allowed)
    # Intel's, which are told only where there are two kinds, or ARM's
    performance = _cpu_list(root / "cpu_core" / "cpus") or _capable(cpus, root)
    cores = {
        line
        for cpu in cpus & performance or cpus
        if (line := _line(root / "system" / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list"))
    }
    if cores:
        return len(cores)
    import psutil

    return min(psutil.cpu_count(logical=False) or len(cpus), len(cpus))


def cpu_quotas(proc: Path | None = None, root: Path | None = None) -> list[int]:
    """CPUs, rounded up, that each of the process's Linux control groups has CPU time for; none without a quota.

    `proc` and `root` are those of `group_folders`.
    """
    found = []
    for version, folder in group_folders("cpu", proc, root):
        if version == 2:
            quota, _, period = _line(folder / "cpu.max").partition(" ")
        else:
            quota, period = _line(folder / "cpu.cfs_quota_us"), _line(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):  # "max" and -1: no quota
            found.append(-(-int(quota) // int(period)))
    return found


def repacks() -> Callable[[str, tuple[int, ...]], bool]:
    """A function that says of a weight's type ("Q4_0") and shape (fastest first) if llama.cpp repacks it on this CPU.

    Source: ggml's ggml-cpu/repack.cpp and amx/amx.cpp of the pinned tree.
    """
    eights: set[str] = set()  # types whose rows are interleaved by eight, and by four
    fours: set[str] = set()
    avx2, neon = _has("avx2"), _has("neon")
    dot, i8mm = neon and _has("dotprod"), neon and _has("matmul_int8")
    if avx2:
        eights |= {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}
    if _has("avx512"):
        eights |= {"Q2_K"}
    if dot or i8mm:
        eights |= {"Q4_K", "Q5_K", "Q6_K"}
        fours |= {"Q1_0", "Q4_0", "Q8_0"}
    if dot:
        fours |= {"IQ4_NL", "MXFP4"}
    amx: set[str] = set()
    if _has("amx_int8"):
        amx |= {"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}

    def repacked(kind: str, shape: tuple[int, ...]) -> bool:
        if len(shape) < 2:
            return False
        rows = shape[1]
        return (
            (kind in eights and rows % 8 == 0)
            or (kind in fours and rows % 4 == 0)
            or (kind in amx and rows % 32 == 0 and len(shape) == 2)
        )

    return repacked


def _has(feature: str) -> bool:
    return feature.upper() in backends.cpu_features()


def _line(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _capable(cpus: Iterable[int], root: Path) -> set[int]:
    """The CPUs with at least half the capacity of the largest, which Linux tells on ARM; none where it does not."""
    told = {cpu: _line(root / "system" / "cpu" / f"cpu{cpu}" / "cpu_capacity") for cpu in cpus}
    capacity = {cpu: int(text) for cpu, text in told.items() if text.isdecimal()}
    return {cpu for cpu, value in capacity.items() if 2 * value >= max(capacity.values())}


def _cpu_list(path: Path) -> set[int]:
    """CPUs of a list like 0-7,16."""
    found: set[int] = set()
    for part in _line(path).split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found |= set(range(int(first), int(last or first) + 1))
    return found


def _sysctl(name: bytes) -> int:
    """A number of macOS's sysctl, 0 if there is none."""
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    status = ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return max(0, value.value) if status == 0 else 0
