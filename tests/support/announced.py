"""What a command writes besides the line that says how much work there is."""

from __future__ import annotations

import re

ANNOUNCED = re.compile(r"^([a-z ]+): (.+) \(shorter with .+\)$")


def besides(stderr: str, *announced: str) -> str:
    """Stderr without the announcements, which are these, as "detect: 4 pairs, 8 texts": each once, in order."""
    lines = stderr.splitlines(keepends=True)
    found = [ANNOUNCED.match(line) for line in lines]
    assert tuple(f"{one[1]}: {one[2]}" for one in found if one) == announced, stderr
    return "".join(line for line, one in zip(lines, found, strict=True) if not one)
