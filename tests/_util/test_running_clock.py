"""A clock that leaves out what its process was stopped for; with a clock of the test's own."""

from __future__ import annotations

import time

import pytest

from steermoe_local._util import running_clock
from steermoe_local._util.running_clock import RunningClock


class Time:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_gaps_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_clock, "_EVERY", 1000.0)  # the test makes the looks
    now = Time()
    with RunningClock(now) as clock:
        assert clock() == 50
        for _ in range(10):
            now.now += 0.4
            clock()
        assert clock() == pytest.approx(54)
        monkeypatch.setattr(running_clock, "_EVERY", 0.05)
        now.now += 3900  # stopped
        assert clock() == pytest.approx(54.05)
        now.now += 0.4
        assert clock() == pytest.approx(54.45)


def test_it_looks_by_itself() -> None:
    """Nobody asks for longer than a gap, and the time counts all the same."""
    with RunningClock() as clock:
        start = clock()
        for _ in range(60):  # once, but for a machine on which its thread sleeps as well
            time.sleep(1)
            if clock() - start > 0.2:
                break
        else:
            raise AssertionError("it does not look")
    assert clock() >= start
