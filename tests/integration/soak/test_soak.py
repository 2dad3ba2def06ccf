"""A minute of the soak test, and whether its judges would see what is wrong. `make soak` runs ten minutes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integration.soak.measure import Held
from tests.integration.soak.prober import LIMIT, Samples
from tests.integration.soak.soak import ALLOWED, soak

SECONDS = 60.0


@pytest.mark.alone
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")
def test_a_minute_under_load(tiny_f32_path: Path) -> None:
    report = soak(SECONDS, tiny_f32_path)
    print("\n".join(report.lines()))
    assert not report.wrong, "\n".join(report.wrong[:20])
    for what in ("chat", "text", "response", "bound by a grammar, or tools", "status 404"):
        assert report.judged[what], f"nothing to judge: {what}"
    for what in (
        "hostile",
        "half-closed",
        "given up",
        "slow readers",
        "template bombs",
        "silent connections",
        "scraped",
    ):
        assert report.counts[what], f"no clients: {what}"
    assert {end["status"] for end in report.stopped.values()} == {0}


def samples(seconds: float, n: int, of: int, *, control: float = 0.0, no_cpu: float = 0.0) -> Samples:
    """Every 50 ms one, `n` of them of `seconds` and the others quick."""
    found = Samples()
    for number in range(of):
        start, slow = number * 0.05, number < n
        found.samples.append((start, seconds if slow else 0.002, 200, no_cpu if slow else 0.0, 0.001))
        found.controls.append((start, control if slow else 0.001))
    return found


def test_the_rule_of_health() -> None:
    assert samples(LIMIT / 2, 100, 100).is_held
    assert samples(1.0, 1, 100).is_held, "the 99th percentile is below the limit"
    assert not samples(1.0, 2, 100).is_held
    assert not Samples().is_held, "nothing was measured"


@pytest.mark.parametrize("what", ["control", "no_cpu"])
def test_the_machine_is_not_the_server(what: str) -> None:
    stopped = samples(1.0, 50, 100, **{what: 0.6})
    assert stopped.is_held
    assert not stopped.is_judged, "but the report says so"
    assert samples(1.0, 5, 100, **{what: 0.6}).is_judged
    assert not samples(1.0, 50, 100, **{what: 0.4}).is_held, "it did not stop for as long as that"


def test_a_stop_before_or_after_is_no_excuse() -> None:
    found = samples(0.002, 0, 100)
    found.samples += [(2.0, 1.0, 200, 0.0, 0.0)] * 2
    found.controls += [(0.5, 1.4), (3.1, 2.0)]
    assert not found.is_held
    found.controls.append((2.9, 2.0))  # began while they were waiting
    assert found.is_held


def test_what_is_beyond_the_plateau() -> None:
    before = Held(200.0, 20, 10, 1, 30.0)
    assert not before.beyond(before, ALLOWED)
    for name, more in (("memory", 97.0), ("files", 40), ("threads", 60), ("children", 4), ("of_children", 400.0)):
        now = Held(**{**before.__dict__, name: getattr(before, name) + more})
        assert list(now.beyond(before, ALLOWED)) == [name]
