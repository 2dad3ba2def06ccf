"""The program `steermoe`, made to stop at a place of its work until it is signalled, or a file exists.

A test that signals a running program must not depend on which of the two is faster: the program is held before it can
end, however fast the machine is. This module is that program, `python -P held.py ARGUMENTS`; tests start it by `HELD`
and the environment of `hold`. Nothing of it is in the package.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

HELD = [sys.executable, "-P", __file__]
PAUSE = 0.05
_VARIABLE = "STEERMOE_TEST_HOLD"
_sleep = time.sleep  # which some tests patch away


def hold(
    *,
    tokens: int | None = None,
    answers: int | None = None,
    checkpoints: int | None = None,
    parts: int | None = None,
    until: Path | None = None,
) -> dict[str, str]:
    """Environment under which `HELD` does not come to its end until it gets a signal, or the file `until` exists.

    It is held when so many `answers` are complete, or so many `checkpoints` of a recording were written that count
    other pairs than the one before, or so many `parts` of an attribution are kept. From so many `tokens` of an answer
    on, it computes one every `PAUSE` seconds: what is shown can be seen to grow, and an answer of thousands takes
    longer than any test waits.
    """
    places = {"tokens": tokens, "answers": answers, "checkpoints": checkpoints, "parts": parts}
    return {_VARIABLE: json.dumps(places | {"until": None if until is None else str(until)})}


def patience(process: Any, happened: Any, seconds: float = 120) -> None:
    """Wait until something has happened; the process must not end before."""
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < end, f"it did not happen within {seconds} s"
        _sleep(0.005)


class _Gate:
    """Where the program waits."""

    def __init__(self, until: str | None) -> None:
        self._until = until
        self._signals, writing = os.pipe()
        os.set_blocking(self._signals, False)
        os.set_blocking(writing, False)
        # a handler may only take note of the signal; Python writes a byte here whatever the handler does
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def wait(self, seconds: float = math.inf) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not (self._until and os.path.exists(self._until)):
            if select.select([self._signals], [], [], 0.01)[0]:
                os.read(self._signals, 4096)
                return


def _hold_engine(gate: _Gate, tokens: int | None, answers: int | None) -> None:
    from steermoe_local.generation.engine import Engine, FinishEvent

    step = Engine.step
    counts: Counter[Any] = Counter()
    n_complete = 0

    def held_step(engine: Engine) -> Any:
        nonlocal n_complete
        if answers is not None and n_complete >= answers:
            gate.wait()
        if tokens is not None and any(count >= tokens for count in counts.values()):
            gate.wait(PAUSE)
        events = step(engine)
        for request, event in events:
            if isinstance(event, FinishEvent):
                counts.pop(request, None)
                n_complete += 1
            else:
                counts[request] += 1
        return events

    Engine.step = held_step  # type: ignore[method-assign]


def _hold_recorder(gate: _Gate, checkpoints: int) -> None:
    from steermoe_local.detection.checkpoint import CheckpointFile

    save = CheckpointFile.save
    seen: set[int] = set()

    def held_save(file: CheckpointFile, checkpoint: Any, settings: Any) -> None:
        save(file, checkpoint, settings)
        seen.add(checkpoint.next)
        if len(seen) >= checkpoints:
            gate.wait()

    CheckpointFile.save = held_save  # type: ignore[method-assign]


def _hold_attribution(gate: _Gate, parts: int) -> None:
    from steermoe_local.generation.answer_file import AnswerFile

    add = AnswerFile.add
    n_kept = 0

    def held_add(file: AnswerFile, record: Any) -> None:
        nonlocal n_kept
        add(file, record)
        n_kept += 1
        if n_kept >= parts:
            gate.wait()

    AnswerFile.add = held_add  # type: ignore[method-assign]


def _main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's children ignore it
    places = json.loads(os.environ.pop(_VARIABLE))
    gate = _Gate(places["until"])
    if places["checkpoints"] is not None:
        _hold_recorder(gate, places["checkpoints"])
    elif places["parts"] is not None:
        _hold_attribution(gate, places["parts"])
    else:
        _hold_engine(gate, places["tokens"], places["answers"])
    from steermoe_local.cli import main

    main(prog_name="steermoe")


if __name__ == "__main__":
    _main()
