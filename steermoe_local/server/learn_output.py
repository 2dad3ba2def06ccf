"""What a process of `steermoe learn` says: events of its progress on stderr, its result on stdout."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal

from .._util.visible import visible

Outcome = Literal["works", "did not work"]

_LINE_BYTES = 16 << 10  # of stderr; the rest of a longer line is dropped
_RESULT_BYTES = 4 << 20
_KEPT_LINES = 20
_SHOWN = 600  # characters of a sentence for clients
_MOST = 1e9  # of the figures of an event


@dataclass(frozen=True)
class Progress:
    """An event: the step, how much of it is done, and the clock of the whole in seconds."""

    step: str = ""
    done: int = 0
    total: int = 0
    elapsed: float = 0.0
    expected: float = 0.0


@dataclass(frozen=True)
class Result:
    """How it ended, and the sentence that says so."""

    outcome: Outcome
    verdict: str


def bounded_lines(stream: IO[bytes]) -> Iterator[str]:
    """The lines of a stream, the beginning of those that are too long."""
    begins = True
    while part := stream.readline(_LINE_BYTES):
        if begins:
            yield part.decode("utf-8", "replace").rstrip("\r\n")
        begins = part.endswith(b"\n")


def progress_of(line: str) -> Progress | None:
    """The event of a line; None for a line that is none."""
    if not line.startswith("{"):
        return None
    data = _parsed(line)
    step = data.get("step")
    figures = [data[name] for name in ("done", "total", "elapsed", "expected") if _is_figure(data.get(name))]
    if not isinstance(step, str) or len(figures) != 4:
        return None
    done, total, elapsed, expected = figures
    return Progress(visible(step)[:40], int(done), int(total), float(elapsed), float(expected))


def result_of(stdout: IO[bytes]) -> Result | None:
    """The result in a file of what was printed; None if there is none."""
    stdout.seek(0)
    data = _parsed(stdout.read(_RESULT_BYTES).decode("utf-8", "replace"))
    outcome, verdict = data.get("outcome"), data.get("verdict")
    if not isinstance(verdict, str) or not verdict:
        return None
    if outcome == "works":
        return Result("works", sentence(verdict))
    return Result("did not work", sentence(verdict)) if outcome == "did not work" else None


class Words:
    """The last lines that were said besides events, for what went wrong."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)

    def add(self, line: str) -> None:
        """Keep a line."""
        if line.strip():
            self._lines.append(line)

    def fault(self) -> str:
        """The last error that was named, "" if none was."""
        errors = [line.removeprefix("error: ") for line in self._lines if line.startswith("error: ")]
        return sentence(errors[-1]) if errors else ""


def sentence(text: str) -> str:
    """A text in one line of bounded length, without control characters."""
    shown = visible(" ".join(text.split()))
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."


def _parsed(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _is_figure(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and 0 <= value <= _MOST
