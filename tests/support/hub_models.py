"""What the tests of models on the hub share: names of files, and the path that a pull prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPLIT = [f"Q8_0/tiny-Q8_0-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]


def pulled(done: Any) -> Path:
    assert done.exit_code == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return Path(line)
