"""How much memory this process can still take: what the system has free, and what its control groups allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["control_group_memory", "free_memory", "system_memory"]

_PROC = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # version 1 writes a number near 2^63 for none


def free_memory() -> int | None:
    """Bytes that can be taken without swapping; None when the system does not tell."""
    known = [n for n in (system_memory(), control_group_memory()) if n is not None]
    return min(known, default=None)


def system_memory() -> int | None:
    """Bytes that the system could give, caches it can drop included."""
    try:
        import psutil

        return int(psutil.virtual_memory().available)
    except Exception:  # no psutil for this machine, or no /proc: then there is no check, which is no reason to fail
        return None


def control_group_memory(proc: Path = _PROC, root: Path = _GROUPS) -> int | None:
    """Bytes that the process's Linux control groups (containers, systemd units) leave it; None without a limit.

    Every group up to the root can have a limit. Pages of mapped files are counted by the kernel, but it drops them
    when memory is needed, so they are taken for free.
    """
    try:
        lines = proc.read_text("utf-8").splitlines()
    except OSError:
        return None
    left = [free for line in lines for free in _group_lines(line, root)]
    return max(0, min(left)) if left else None


def _group_lines(line: str, root: Path) -> Iterator[int]:
    number, _, rest = line.partition(":")
    controllers, _, path = rest.partition(":")
    if number == "0" and not controllers:
        names = ("memory.max", "memory.current", "inactive_file", "active_file")
        tops = [root, root / "unified"]
    elif "memory" in controllers.split(","):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
        tops = [root / "memory", root / controllers]
    else:
        return
    for top in tops:
        folder = top / path.lstrip("/")
        # in a container the path may be the host's, while what is mounted is the container's own group
        for group in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
            if (free := _left(group, *names)) is not None:
                yield free


def _left(group: Path, limit: str, usage: str, *caches: str) -> int | None:
    try:
        allowed = (group / limit).read_text("ascii").strip()
        if allowed == "max" or int(allowed) >= _NO_LIMIT:
            return None
        used = int((group / usage).read_text("ascii"))
    except (OSError, ValueError):
        return None
    try:
        lines = (group / "memory.stat").read_text("ascii").splitlines()
        stats = dict(line.split(" ", 1) for line in lines if " " in line)
        used -= sum(int(stats.get(name, 0)) for name in caches)
    except (OSError, ValueError):
        pass  # without it, what is cached counts as used
    return int(allowed) - max(0, used)
