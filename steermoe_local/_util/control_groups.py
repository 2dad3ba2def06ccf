"""The Linux control groups (containers, systemd units) that limit this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def group_folders(controller: str, proc: Path | None = None, root: Path | None = None) -> Iterator[tuple[int, Path]]:
    """Version (1 or 2) and folder of every group of this process that can limit `controller`; none without Linux.

    Every group up to the root can have a limit. `proc` and `root` are /proc/self/cgroup and /sys/fs/cgroup.
    """
    root = root or _GROUPS
    try:
        lines = (proc or _PROC).read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            version, tops = 2, [root, root / "unified"]
        elif controller in controllers.split(","):
            version, tops = 1, [root / controller, root / controllers]
        else:
            continue
        for top in dict.fromkeys(tops):
            folder = top / path.lstrip("/")
            # in a container the path may be the host's, while what is mounted is the container's own group
            for group in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
                yield version, group
