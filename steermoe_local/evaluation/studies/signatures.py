"""Failure signatures: named rules that detect how a steering fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..measuring.measurements import Answer, Measurement, by_item
from ..measuring.side_effects import LOOPING, fluency
from ..metrics.formatting import draws_below, in_points, points
from ..metrics.intervals import Interval, difference
from .steerings import mirrored

if TYPE_CHECKING:
    from .controls.controls import ControlResult

NAMES = ("fluency collapse", "over-refusal", "ill-formed answers", "wrong way", "no room", "no effect")


@dataclass(frozen=True)
class Thresholds:
    """Limits at which the rules fire; docs/evaluation.md gives the reasons.

    `perplexity_ratio` and `kl` (nats) are on the neutral text. Shares have to rise by so much over the unsteered model,
    with an interval of the difference above 0. `effect` is the least change that counts, `percentile` the share of
    random draws that a map must be ahead of.
    """

    perplexity_ratio: float = 1.5
    kl: float = 0.5
    looping: float = 0.1
    empty: float = 0.1
    cut: float = 0.2
    ill_formed: float = 0.1
    refused: float = 0.1
    effect: float = 0.05
    percentile: float = 0.95


@dataclass(frozen=True)
class Signature:
    """A rule that fired on `side` ("towards", "away", "steered", or "swing"), with the figures that it found."""

    name: str
    side: str
    rule: str
    found: str
    figures: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} ({self.side}): {self.found}"


def guard_signatures(
    side: str, measured: Measurement, unsteered: Measurement, limits: Thresholds | None = None, seed: int = 0
) -> tuple[Signature, ...]:
    """Check the side effects of a steering: fluency, benign prompts, the form of answers."""
    limits = limits or Thresholds()
    found = [*_collapse(side, measured, unsteered, limits, seed)]
    if measured.benign and unsteered.benign:
        risen = difference(measured.benign_values, unsteered.benign_values, seed)
        if risen.low > 0 and risen.value >= limits.refused:
            rule = f"refused benign prompts up by {in_points(limits.refused)} or more, and the interval above 0"
            words = f"refused benign prompts up by {in_points(risen.value)} ({in_points(risen.low)} at least)"
            figures = {"refused": float(measured.benign_values.mean()), "risen": risen.value, "low": risen.low}
            found.append(Signature("over-refusal", side, rule, words, figures))
    if ill := _risen(measured, unsteered, lambda answer: answer.label == "ill-formed", limits.ill_formed, seed):
        rule = f"answers on none of the task's sides up by {in_points(limits.ill_formed)} or more, interval above 0"
        figures = {"ill_formed": measured.label_share("ill-formed"), "risen": ill.value, "low": ill.low}
        found.append(
            Signature("ill-formed answers", side, rule, f"ill-formed answers up by {in_points(ill.value)}", figures)
        )
    return tuple(found)


def _collapse(
    side: str, measured: Measurement, unsteered: Measurement, limits: Thresholds, seed: int
) -> Sequence[Signature]:
    guards = fluency(measured, unsteered)
    texts = (
        ("perplexity ratio", guards.perplexity_ratio, limits.perplexity_ratio),
        ("KL", guards.kl, limits.kl),
    )
    shares: tuple[tuple[str, Callable[[Answer], bool], float], ...] = (
        ("looping", lambda answer: answer.loop >= LOOPING, limits.looping),
        ("empty", lambda answer: answer.empty, limits.empty),
        ("cut", lambda answer: answer.cut, limits.cut),
    )
    # not "value > limit": an overflow or NaN counts as a collapse, too
    figures = {name: value for name, value, limit in texts if value is not None and not value <= limit}
    seen = [f"{name} {value:.2f}" for name, value in figures.items()]
    for name, test, limit in shares:
        if risen := _risen(measured, unsteered, test, limit, seed):
            seen.append(f"{name} answers up by {in_points(risen.value)}")
            figures[name] = risen.value
    if not seen:
        return ()
    rule = (
        f"on the neutral text perplexity above {limits.perplexity_ratio:g} times the unsteered or KL above "
        f"{limits.kl:g} nats; or looping answers up by {in_points(limits.looping)}, empty ones by "
        f"{in_points(limits.empty)}, cut ones by {in_points(limits.cut)} or more, the interval above 0"
    )
    return (Signature("fluency collapse", side, rule, ", ".join(seen), figures),)


def effect_signatures(
    side: str,
    effect: Interval,
    *,
    wanted: int = 1,
    unsteered_rate: float | None = None,
    controls: Sequence[ControlResult] = (),
    limits: Thresholds | None = None,
) -> tuple[Signature, ...]:
    """Check the effect itself: `wanted` +1 means that it should be above 0, -1 below. At most one rule fires.

    `unsteered_rate`: where the side starts from, to tell a steering that fails from one that has no room; None for the
    difference between both directions. `controls` are those of this effect; only draws of random experts are used.
    """
    limits = limits or Thresholds()
    found = effect if wanted > 0 else mirrored(effect)
    least = in_points(limits.effect)

    def fired(name: str, rule: str, words: str = points(effect), **figures: float) -> tuple[Signature, ...]:
        known = {"effect": effect.value, "low": effect.low, "high": effect.high}
        return (Signature(name, side, rule, words, {**known, **figures}),)

    if found.high < 0 and -found.value >= limits.effect:
        return fired("wrong way", f"the effect is {least} or more to the other side, and its interval does not reach 0")
    if unsteered_rate is not None:
        room = 1 - unsteered_rate if wanted > 0 else unsteered_rate
        if room < limits.effect:
            rule = f"the unsteered model is less than {least} from the end of the scale on this side"
            words = f"the unsteered rate is {100 * unsteered_rate:.0f}% already"
            return fired("no room", rule, words, unsteered=unsteered_rate)
    if found.low <= 0:
        return fired("no effect", "the interval of the effect reaches 0")
    if found.value < limits.effect:
        return fired("no effect", f"the effect is below {least}")
    for control in controls:
        if control.kind == "random" and control.percentile is not None and control.percentile < limits.percentile:
            rule = f"the effect is larger than less than {limits.percentile:.0%} of the draws of random experts"
            words = f"{points(effect)}, larger than {draws_below(control.percentile)} of {control.n} draws"
            return fired("no effect", rule, words, percentile=control.percentile)
    return ()


def _risen(
    measured: Measurement, unsteered: Measurement, test: Callable[[Answer], bool], limit: float, seed: int
) -> Interval | None:
    """The rise of the share of answers that pass the test, if by `limit` or more and not by chance."""
    risen = difference(by_item(measured.answers, test), by_item(unsteered.answers, test), seed)
    return risen if risen.low > 0 and risen.value >= limit else None
