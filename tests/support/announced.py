"""What a command writes besides the lines that say how much work there is and, of longer work, how long it takes."""

from __future__ import annotations

import re

ANNOUNCED = re.compile(r"^([a-z ]+): (.+) \(shorter with .+\)$")
_TIMED = re.compile(r"^[a-z ]+: (at most )?about .+ left on this machine, by the first .+$")


def untimed(stderr: str) -> list[str]:
    """The lines of stderr, without those that say how long it takes: there are some on a slow machine."""
    return [line for line in stderr.splitlines() if not _TIMED.match(line)]


def besides(stderr: str, *announced: str) -> str:
    """Stderr without the announcements, which are these, as "detect: 4 pairs, 8 texts": each once, in order."""
    lines = untimed(stderr)
    found = [ANNOUNCED.match(line) for line in lines]
    assert tuple(f"{one[1]}: {one[2]}" for one in found if one) == announced, stderr
    return "".join(f"{line}\n" for line, one in zip(lines, found, strict=True) if not one)
