"""Rules of steering plans for tests: drawn at random, and the same in words of their own."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from steermoe_local.steering.plan_rules import Condition, Phase, RuleSpec, Where

NAMES = st.one_of(
    st.sampled_from(
        ["formal", "answer", "all", "when", "entropy", "reverse", "C:\\maps\\x.json", "my map", "it's", "+8"]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12),
).filter(lambda name: name != "none")
MARKS = st.one_of(
    st.integers(0, 2**31 - 1),
    st.sampled_from(
        ["Answer:", "#12", "until", "<", "[0:1]", '"', "'", "\\", "\n\n", "\x1b[31m", "\u202e", "\U000e0001"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
)
LIMITS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def conditions(draw: st.DrawFn) -> Condition:
    """A condition of any kind."""
    limit = {draw(st.sampled_from(["below", "above"])): draw(st.one_of(LIMITS, st.integers(-9, 9)))}
    measure = draw(st.sampled_from(["routing", "entropy", "margin"]))
    if measure != "routing":
        return Condition(measure, **limit)
    last = draw(st.one_of(st.none(), st.integers(1, 4096)))
    return Condition(measure, map=draw(NAMES), by=draw(st.sampled_from(["rd", "effect"])), last=last, **limit)


@st.composite
def places(draw: st.DrawFn, small: bool = False) -> Where:
    """Where a rule is; `small`: windows as short texts have them."""
    phase: Phase | None = draw(st.sampled_from([None, "prompt", "thinking", "answer"]))
    most = 12 if small else 2**31
    ends = st.integers(-most if phase == "prompt" else 0, most)
    start, stop = draw(st.one_of(st.just((0, None)), st.tuples(ends, st.one_of(st.none(), ends))))
    if stop is not None and (stop == 0 or (stop <= start and (stop < 0) == (start < 0))):
        stop = None
    return Where(
        phase,
        start,
        stop,
        draw(st.one_of(st.none(), MARKS)),
        draw(st.one_of(st.none(), MARKS)),
        draw(st.one_of(st.just(1), st.integers(1, most))),
        draw(st.one_of(st.none(), conditions())) if phase in ("thinking", "answer") else None,
    )


CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "activate": st.integers(0, 999_999_999),
        "deactivate": st.integers(0, 999_999_999),
        "reverse": st.booleans(),
        "layers": st.sampled_from(["3-7,9", "3-7, 9", "0"]),
        "preset": st.sampled_from(["faithfulness", "a b", "x=y"]),
        "rank": st.sampled_from(["rd", "log-odds"]),
        "mode": st.sampled_from(["hard", "soft", "capped"]),
        "scale": st.one_of(LIMITS, st.integers(-9, 9)),
        "weights": st.sampled_from(["none", "effect", "\x85", '"']),
        "cap": st.one_of(LIMITS, st.just(math.inf)),
    },
)


@st.composite
def specs(draw: st.DrawFn) -> RuleSpec:
    """A rule that can be written."""
    name = draw(st.one_of(st.none(), NAMES))
    choice: dict[str, Any] = {} if name is None else draw(CHOICES)
    return RuleSpec(draw(places()), name, choice)
