"""The rule of --until-stable on counts whose truth is known."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local import FormatError, UntilStable, UsageError
from steermoe_local.detection.stopping import StabilityCheck
from steermoe_local.maps.stability import Stability

SHAPE = (2, 40)
Array = np.ndarray[Any, Any]


def pairs(seed: int, n_pairs: int, differences: Any = 0.0) -> tuple[Array, Array]:
    """(a, n) of pairs with rates of their own; an expert's rates differ by `differences` [experts] between the sides.

    Rates differ from expert to expert, so that some have a larger |RD| by chance in every half.
    """
    rng = np.random.default_rng(seed)
    n = rng.integers(4, 12, size=(n_pairs, 2))
    usual = np.linspace(0.05, 0.5, SHAPE[0] * SHAPE[1]).reshape(SHAPE)
    own = usual + rng.normal(scale=0.05, size=(n_pairs, 1, *SHAPE))
    shift = np.zeros(SHAPE) + differences
    rates = np.clip(own + np.stack([shift, -shift]) / 2, 0, 1)
    return rng.binomial(n[:, :, None, None], rates).astype(np.uint32), n


def check_of(n_given: int, a: Array, n: Array, rule: UntilStable | None = None) -> StabilityCheck:
    check = StabilityCheck(rule or UntilStable(), n_given, SHAPE)
    check.add(a, n)
    return check


SIGNAL = np.zeros(SHAPE)
SIGNAL[0, :20] = np.where(np.arange(20) % 2, 0.4, -0.4)


def test_what_is_there_ends_the_run() -> None:
    """The third check in a row, and none before."""
    check = StabilityCheck(UntilStable(), 200, SHAPE)
    a, n = pairs(1, 200, SIGNAL)
    check.add(a[:71], n[:71])
    assert check.stopped() is None
    check.add(a[71:72], n[71:72])
    found = check.stopped()
    assert found is not None
    assert (found.stopped, found.stable, found.n_pairs, found.n_given, found.first) == (True, True, 72, 200, 20)
    assert found.n_checks == len(check.looks) == 8
    assert found.alpha == pytest.approx(0.05 / 8)
    assert found.p is not None
    assert found.p <= found.alpha
    assert found.lower is not None
    assert found.agreement is not None
    assert 0.7 <= found.lower <= found.agreement <= 1
    assert Stability.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_what_starts_late_ends_it_late() -> None:
    """What the first pairs lack delays the end, and so do more checks."""
    noise, tokens = pairs(2, 60)
    a, n = pairs(3, 400, SIGNAL)
    found = check_of(460, np.concatenate([noise, a]), np.concatenate([tokens, n])).stopped()
    assert found is not None
    assert found.n_pairs > 72
    with_more = check_of(460, *pairs(3, 460, SIGNAL), UntilStable(checks=6)).stopped()
    assert with_more is not None
    assert with_more.n_pairs == UntilStable().looks(460)[5]


def test_a_failed_check_starts_the_row_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = iter([True, True, False, True, True, True])
    monkeypatch.setattr(StabilityCheck, "_reached", lambda *_: next(reached))
    found = check_of(200, *pairs(1, 200, SIGNAL)).stopped()
    assert found is not None
    assert found.n_pairs == UntilStable().looks(200)[5]


@pytest.mark.parametrize("seed", range(6))
def test_nothing_there_ends_nothing(seed: int) -> None:
    check = check_of(300, *pairs(100 + seed, 300))
    assert check.stopped() is None
    ended = check.ended()
    assert (ended.stopped, ended.stable, ended.n_pairs) == (False, False, 300)


def test_the_control_holds_where_halves_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves that agree do not end a run whose sides cannot be told apart.

    The control ends at most 5% of all such runs, whatever the number of checks; more than 6 of 40 would be 1 case in
    70 (binomial), and the seeds are fixed.
    """
    monkeypatch.setattr(StabilityCheck, "_agreement", lambda *_: (1.0, 0.0, 0.0))
    rule = UntilStable(checks=1)
    early = [check_of(150, *pairs(500 + seed, 150), rule).stopped() for seed in range(40)]
    assert sum(found is not None for found in early) <= 6
    nothing = check_of(150, *pairs(500, 150), rule).ended()
    assert (nothing.stable, nothing.lower) == (False, 1.0)
    assert "not told apart" in nothing.reason
    assert check_of(150, *pairs(500, 150, SIGNAL), rule).stopped() is not None


def test_pairs_that_are_few() -> None:
    ended = check_of(3, *pairs(1, 3)).ended()
    assert (ended.n_pairs, ended.n_checks, ended.stopped, ended.stable, ended.agreement) == (3, 0, False, False, None)
    ended = check_of(50, *pairs(1, 50, SIGNAL)).ended()  # as many as the first check: used up, and judged
    assert (ended.n_checks, ended.stopped, ended.stable) == (0, False, True)
    # of 4 experts only one is compared: of two, chance would name each second
    check = StabilityCheck(UntilStable(), 60, (1, 4))
    check.add(np.ones((60, 2, 1, 4), np.uint32), np.ones((60, 2), np.int64))
    assert check.ended().first == 1


@settings(max_examples=6)
@given(st.lists(st.integers(1, 119), max_size=6))
def test_how_the_pairs_come_changes_nothing(cuts: list[int]) -> None:
    a, n = pairs(1, 120, SIGNAL * 0.4)
    whole = check_of(120, a, n).stopped()
    check = StabilityCheck(UntilStable(), 120, SHAPE)
    found = None
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 120], strict=True):
        check.add(a[start:end], n[start:end])
        found = check.stopped()
        if found is not None:
            break
    assert found == whole


@given(st.integers(20, 500), st.integers(1, 10**6))
def test_checks_are_few_and_at_least_the_minimum(least: int, n_given: int) -> None:
    looks = UntilStable(min_pairs=least).looks(n_given)
    assert list(looks) == sorted(set(looks))
    assert all(least <= look < n_given for look in looks)
    assert (not looks) == (n_given <= least)
    assert len(looks) <= 1 + np.log(max(n_given / least, 1)) / np.log(1.2)


@pytest.mark.parametrize(
    "fields",
    [
        *({"level": value} for value in (0, 1, -0.1, 1.5, float("nan"), "0.7", True, None)),
        *({"first": value} for value in (0, -1, 2.0, True, "20", 1 << 40)),
        *({"checks": value} for value in (0, 1.5, None)),
        *({"min_pairs": value} for value in (19, 0, -5, 50.0, 1 << 40)),
    ],
)
def test_rules_that_make_no_sense(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        UntilStable(**fields)
    assert next(iter(fields)) in str(caught.value)
    assert repr(next(iter(fields.values()))) in str(caught.value)


ENDED = Stability(UntilStable(), 100, 60, 4, True, 20, 0.9, 0.1, 0.05, 0.8, 0.002, 0.0125)
IMPOSSIBLE = [
    *({name: value} for name in ("n_given", "n_pairs", "first") for value in (0, -1, 1.5, "9", True, None)),
    *({"n_checks": value} for value in (-1, 0.5, None)),
    *({"stopped": value} for value in (1, "yes", None)),
    *({"agreement": value} for value in (None, "x", True, float("nan"), float("inf"), 10**400)),
    {"n_pairs": 101},
    {"n_pairs": 100},
    {"rule": {}},
    {"rule": {**dataclasses.asdict(UntilStable()), "level": 2}},
    {"rule": None},
    {"more": 1},
]


@pytest.mark.parametrize("change", IMPOSSIBLE, ids=str)
def test_what_cannot_be_stored(change: dict[str, Any]) -> None:
    assert Stability.from_dict(ENDED.to_dict()) == ENDED
    with pytest.raises(FormatError, match="until_stable"):
        Stability.from_dict(ENDED.to_dict() | change)
