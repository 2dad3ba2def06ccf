"""Verdicts in plain words: does it work, how much, at which cost, and what to do. Reports begin with them.

The thresholds are those of the studies: `Thresholds.effect` and `Thresholds.percentile` of `signatures`, and
`HARM`, beyond which a rise of the perplexity is called a cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..metrics.formatting import draws_below, in_points, percent
from ..metrics.intervals import Interval
from ..studies.audit.perturbations import SUPPRESS
from ..studies.audit.results import AFTER, BEFORE, HOLDS, Audit, Break
from ..studies.evaluate import Evaluation
from ..studies.search.sweep import Choice, Point, Sweep
from ..studies.search.tune import Tuning
from ..studies.signatures import Thresholds
from ..studies.steerings import EFFECT, NEGATIVE, POSITIVE, STEERED, mirrored
from ..studies.transfer.results import Column, Transfer

__all__ = [
    "ENOUGH", "HARM", "Measured", "PlainVerdict", "judge", "of_audit", "of_condition", "of_effects", "of_evaluation",
    "of_experiment", "of_fit", "of_map", "of_sweep", "of_transfer", "of_tuning",
]  # fmt: skip

Outcome = Literal[
    "works", "works at a cost", "no better than random", "too few items", "nothing steered", "no effect", "wrong way",
    "no room",
]  # fmt: skip

HARM = 0.05
"""How far a neutral ability may fall, and perplexity rise (as a share), before it counts as harm."""
ENOUGH = 19
"""Draws of which being ahead of all is evidence: with fewer of them p cannot reach 0.05."""
FEW_ITEMS = 20
"""Items with fewer of which an effect that is not told from 0 means little."""

_LIMITS = Thresholds()
_MOST_NEEDED = 100_000
_FEW_ERRORS = 0.1  # of a condition, on either side
_GUARDS = ("fluency collapse", "over-refusal", "ill-formed answers")
_SEARCH = "steermoe tune looks for another choice, and more pairs make a better map"
_TRY = f"{_SEARCH[0].upper()}{_SEARCH[1:]}."


@dataclass(frozen=True)
class PlainVerdict:
    """A verdict: its kind, and one to three sentences that a newcomer understands."""

    outcome: Outcome
    text: str

    @property
    def works(self) -> bool:
        """Whether the steering does what it should, at a cost or not."""
        return self.outcome in ("works", "works at a cost")


@dataclass(frozen=True)
class Measured:
    """What a verdict is made of. Shares are of 1.

    Attributes:
        what: the side of the task whose share is measured, as its file names it; "" where it has no name.
        unsteered: that share of the unsteered model.
        steered: the shares under steering, by the words for its direction ("" where there is only one).
        effect: the change that is judged, in the direction that is steered to: above 0 is as wanted.
        random: mean size of the same change by as many random experts, None where there are none.
        n_draws: draws of them; percentile: the share of the draws that the effect is larger than.
        perplexity: the perplexity of text that should be left alone, as a ratio to the unsteered model's.
        harms: further side effects that are too large, in words.
        changed: whether any answer differs from the unsteered one.
        room: whether the unsteered share leaves room for an effect.
    """

    what: str
    unsteered: float
    steered: Mapping[str, float]
    effect: Interval
    random: float | None = None
    n_draws: int = 0
    percentile: float | None = None
    perplexity: float | None = None
    harms: Sequence[str] = field(default=())
    changed: bool = True
    room: bool = True


def judge(found: Measured) -> PlainVerdict:
    """The verdict on a steering. The first of these that holds: nothing was steered, the wrong way, no room, too few
    items, no effect, no better than random experts, a cost, it works."""
    effect, shares = found.effect, _shares(found)
    if not found.changed:
        return PlainVerdict(
            "nothing steered",
            "It does nothing: every answer is the same as without steering. Steer more experts or more strongly; of a "
            "plan, look whether its rules match.",
        )
    if effect.high < 0 and -effect.value >= _LIMITS.effect:
        return PlainVerdict("wrong way", f"It steers the wrong way: {shares}. Take the other side (--reverse).")
    if not found.room:
        return PlainVerdict(
            "no room",
            f"It cannot be told: {shares}, and unsteered there is hardly room for more. Measure on harder items.",
        )
    if effect.low <= 0:
        if abs(effect.value) >= _LIMITS.effect or effect.n < FEW_ITEMS:
            return PlainVerdict(
                "too few items", f"Too few items to tell: {shares}, which may be chance.{_more(effect)}"
            )
        return PlainVerdict("no effect", f"It does not work: {shares}, no more than chance. {_TRY}")
    if effect.value < _LIMITS.effect:
        return PlainVerdict("no effect", f"It hardly works: {shares}. {_TRY}")
    if found.percentile is not None and found.percentile < _LIMITS.percentile:
        size = "" if found.random is None else f" (by {in_points(found.random)} on average)"
        return PlainVerdict(
            "no better than random",
            f"It is no better than random experts: {shares}, but only {draws_below(found.percentile)} of "
            f"{found.n_draws} random choices move it less{size}. Do not rely on it: {_SEARCH}.",
        )
    cost, harmed = _cost(found)
    beside = _beside(found)
    if harmed:
        advice = "Steer fewer experts or less strongly; steermoe tune finds the strongest choice inside a budget."
        return PlainVerdict("works at a cost", f"It works, at a cost: {shares}{beside}; {cost}. {advice}")
    return PlainVerdict("works", f"It works: {shares}{beside}; {cost}. {_advice(found)}")


def _shares(found: Measured) -> str:
    """Like "digits in 84% of the answers instead of 31% (100 items)"."""
    what = f"{found.what} in " if found.what else ""
    n = f"({found.effect.n} items)"
    unsteered = percent(found.unsteered)
    if len(found.steered) == 1:
        ((direction, share),) = found.steered.items()
        words = f" steered {direction}" if direction else ""
        return f"{what}{percent(share)} of the answers{words} instead of {unsteered} {n}"
    ways = ", ".join(f"{percent(share)} steered {direction}" for direction, share in found.steered.items())
    return f"{what}{unsteered} of the answers unsteered, {ways} {n}"


def _beside(found: Measured) -> str:
    if found.random is None:
        return ""
    return f"; random experts change it by {in_points(found.random)}"


def _cost(found: Measured) -> tuple[str, bool]:
    """(the side effects in words, whether they count as a cost)."""
    ratio = found.perplexity
    # not "above the limit": an overflow or NaN is a cost, too
    harmed = bool(found.harms) or (ratio is not None and not ratio <= 1 + HARM)
    rise = "" if ratio is None else f"perplexity {_change(ratio)}"
    if harmed:
        return ", ".join([*([f"other text suffers ({rise})"] if rise else []), *found.harms]), True
    if ratio is None:
        return "what it does to other text was not measured", False
    return f"other text is unharmed ({rise})", False


def _change(ratio: float) -> str:
    return f"{round(100 * (ratio - 1)) + 0:+d}%" if math.isfinite(ratio) else "beyond measure"


def _advice(found: Measured) -> str:
    if found.random is None:
        return "It was not compared with random experts: steermoe eval does that."
    if found.n_draws < ENOUGH:
        return f"Of random experts there were only {found.n_draws} draws: more of them make it certain."
    return "Use it as it is."


def _more(effect: Interval) -> str:
    """How many items would tell an effect of this size from 0."""
    distance, value = effect.value - effect.low if effect.value >= 0 else effect.high - effect.value, abs(effect.value)
    if value < _LIMITS.effect:
        return f" Measure on {max(100, FEW_ITEMS)} items or more."
    needed = math.ceil(1.2 * effect.n * (distance / value) ** 2 / 10) * 10
    return f" Measure on {min(max(needed, FEW_ITEMS), _MOST_NEEDED):,} items or more."


#
# of studies
#


def of_evaluation(found: Evaluation) -> PlainVerdict:
    """The verdict of an evaluation."""
    name, effect = found.headline
    against = {signature.name for signature in found.signatures if signature.side == name}
    # towards the negative side, or by a bias of a reversed choice, a lower share is what is wanted
    down = name == NEGATIVE or (name == STEERED and effect.high < 0 and "wrong way" not in against)
    control = next((one for one in found.controls if one.kind == "random" and one.n), None)
    unsteered, *others = found.sides
    ratios = [side.fluency.perplexity_ratio for side in others if side.fluency.perplexity_ratio is not None]
    directions = {POSITIVE: "towards", NEGATIVE: "away"} if name == EFFECT else {}
    measured = Measured(
        what=found.positive,
        unsteered=unsteered.rate.value,
        steered={directions.get(side.name, ""): side.rate.value for side in others},
        effect=mirrored(effect) if down else effect,
        random=None if control is None else control.mean,
        n_draws=0 if control is None else control.n,
        percentile=None if control is None else control.percentile,
        perplexity=max(ratios, key=lambda ratio: (math.isnan(ratio), ratio), default=None),
        harms=[f"{one.found} ({one.side})" for one in found.signatures if one.name in _GUARDS],
        changed=_changed(found),
        room="no room" not in against,
    )
    return judge(measured)


def _changed(found: Evaluation) -> bool:
    unsteered, *others = ([answer.text for answer in one.answers] for one in found.measurements)
    return any(texts != unsteered for texts in others)


def of_sweep(result: Sweep) -> PlainVerdict:
    """The verdict of a sweep: its strongest choice that leaves other text alone."""
    what = str(result.metadata.get("positive") or "")
    certain = [point for point in result.points if _gained(point).low > 0 and point.gain >= _LIMITS.effect]
    if not certain:
        n = len(result.points)
        best = max(result.points, key=lambda point: point.gain)
        short = best.gain >= _LIMITS.effect or best.effect.n < FEW_ITEMS
        took = _from_to(what, result, best)
        words = f"None of the {n} choices works for certain; the best, {_chosen(best.choice)}, takes {took}"
        more = " Measure on more items." if short else f" {_TRY}"
        return PlainVerdict("too few items" if short else "no effect", f"{words}.{more}")

    def cheap(point: Point) -> bool:
        ratio = point.fluency.perplexity_ratio
        return ratio is None or ratio <= 1 + HARM

    inside = [point for point in certain if cheap(point)]
    best = max(inside or certain, key=lambda point: point.gain)
    ratio = best.fluency.perplexity_ratio
    cost = "what it does to other text was not measured" if ratio is None else f"perplexity {_change(ratio)}"
    took = f"takes {_from_to(what, result, best)}; {cost}"
    if not inside:
        return PlainVerdict(
            "works at a cost",
            f"Choices work, but all at a cost: {_chosen(best.choice)} {took}. Look at choices of fewer experts.",
        )
    return PlainVerdict(
        "works", f"It works: {_chosen(best.choice)} {took}. Compare it with random experts by steermoe eval."
    )


def _chosen(choice: Choice) -> str:
    """Like "promoting 4 and suppressing 2 experts (layers 3-5)"."""
    rest = str(choice).partition(", ")[2]
    return f"promoting {choice.activate} and suppressing {choice.deactivate} experts" + (f" ({rest})" if rest else "")


def _gained(point: Point) -> Interval:
    return mirrored(point.effect) if point.choice.reverse else point.effect


def _from_to(what: str, result: Sweep, point: Point) -> str:
    name = f"{what} " if what else "the rate "
    return f"{name}from {percent(result.unsteered.value)} to {percent(point.rate.value)} ({point.effect.n} items)"


def of_tuning(result: Tuning) -> PlainVerdict:
    """The verdict of a search for numbers of experts."""
    made, gain = result.chosen, result.heldout
    what = str(result.metadata.get("positive") or "")
    if result.outcome == "found" and made is not None and gain is not None:
        ratio = None if result.fluency is None else result.fluency.perplexity_ratio
        cost = "" if ratio is None else f", perplexity {_change(ratio)}"
        name = f"{what} " if what else "the rate "
        return PlainVerdict(
            "works",
            f"It works: promoting {made.activate} and suppressing {made.deactivate} experts takes {name}from "
            f"{percent(gain.unsteered.value)} to {percent(gain.steered.value)} on {gain.gain.n} items that the choice "
            f"never saw, inside the budget ({result.budget}{cost}). Steer with bias.gguf, or by these numbers.",
        )
    if result.outcome == "not confirmed":
        return PlainVerdict(
            "too few items",
            f"Not confirmed: {result.reason}. Give more items, or make the map from more pairs; no bias is written.",
        )
    if result.outcome == "nothing inside the budget":
        advice = "Allow more (--max-ppl-increase, --max-kl), or make the map from more pairs"
    else:
        advice = "Make the map from more pairs, or try the other side (--reverse)"
    return PlainVerdict(
        "no effect", f"It does not work: {result.outcome}: {result.reason}. {advice}; no bias is written."
    )


def of_fit(
    change: float, change_se: float | None, kl: float, budget: float, n_items: int, *, confirmed: bool
) -> PlainVerdict:
    """The verdict of a fit on `n_items` that it has not seen: the `change` of the margin towards the side steered to,
    and `kl`, both in nats per token."""
    if not n_items:
        return PlainVerdict(
            "too few items", "Not confirmed: there were no items to confirm on. Attribute with more items."
        )
    error = "" if change_se is None else f" ± {change_se:.3f}"
    moved = f"the margin moves by {change:+.3f}{error} nats a token on {n_items} items that the fit has not seen"
    if not confirmed:
        return PlainVerdict(
            "too few items" if change > 0 else "no effect",
            f"Not confirmed: {moved}, which may be chance. Attribute with more draws, items or candidates.",
        )
    if kl > budget:
        return PlainVerdict(
            "works at a cost",
            f"It works, at a cost: {moved}; the KL on other text is {kl:.4f} nats, above the budget of {budget:g}. Fit "
            "with a smaller budget.",
        )
    return PlainVerdict(
        "works",
        f"It works: {moved}; the KL on other text is {kl:.4f} nats, inside the budget of {budget:g}. See what it does "
        "to answers with steermoe eval --bias.",
    )


def of_transfer(found: Transfer) -> str:
    """The verdict of a transfer: on how many quantizations the map has its effect."""
    base, name = found.base.effect.effect, found.base.effect.headline
    if base.low <= 0 <= base.high:
        return (
            f"There is nothing to carry over: on the base itself the map has no effect for certain ({name} "
            f"{100 * base.value:+.0f} points on {base.n} items). Measure on more items, or take another choice."
        )

    def carried(column: Column) -> bool:
        effect = column.effect.effect
        return effect.low > 0 if base.value > 0 else effect.high < 0

    n = len(found.columns)
    lost = [column.name for column in found.columns if not carried(column)]
    size = f"{name} {100 * base.value:+.0f} points on the base"
    if not n:
        return f"The map works on the base ({size}); no quantization was measured."
    values = [100 * column.effect.effect.value for column in found.columns if carried(column)]
    span = f", {min(values):+.0f} to {max(values):+.0f} on {'them' if lost else 'the quantizations'}" if values else ""
    if not lost:
        which = "the quantization" if n == 1 else f"all {n} quantizations"
        return f"The map works on {which} as it is ({size}{span})."
    return (
        f"The map works on {n - len(lost)} of {n} quantizations ({size}{span}), not for certain on {', '.join(lost)}. "
        "Make a map on the quantization itself there (steermoe detect)."
    )


def of_audit(found: Audit) -> str:
    """The verdict of an audit, on the base model: whether the behaviour holds, else where it breaks first."""
    breaks = [part for part in found.breaks if part.model == found.base.name]
    broken = [part for part in breaks if part.behaviour is not None]
    least = f"{found.level:.0%}"
    if broken:
        ways = " and ".join(_breaks_at(part) for part in broken)
        orders = {part.order for part in broken}
        order = {
            frozenset([BEFORE]): " It breaks before the language does: the model still writes well without it.",
            frozenset([AFTER]): " The language breaks before it does.",
        }.get(frozenset(orders), "")
        return f"{found.task} breaks (less than {least} of the answers keep it) {ways}.{order}"
    if all(part.order == HOLDS for part in breaks):
        return f"{found.task} holds: under random routing {least} or more of the answers keep it, at every rate."
    return (
        f"{found.task} is not seen to break, but too few items or draws say that it holds: measure on more of them "
        f"(less than {least} kept is called broken)."
    )


def _breaks_at(part: Break) -> str:
    done = "suppressed" if part.action == SUPPRESS else "promoted"
    return f"when {100 * (part.behaviour or 0.0):.3g}% of each layer's experts are {done} at random"


def of_experiment(verdict: str, finding: str) -> str:
    """The finding of an experiment, with what it means for the map."""
    means = {"for": "This speaks for the map", "against": "This speaks against the map", "open": "This settles nothing"}
    return f"{means[verdict]}. {finding}"


def of_condition(false_alarms: float | None, misses: float | None, *, differs: bool) -> str:
    """The verdict of a condition by its shares of errors on held-out pairs, None where all scores are the same."""
    if false_alarms is None or misses is None or not differs:
        return (
            "It does not work: the routing does not tell the two sides apart, so there is nothing to steer by. Take "
            "other pairs, or another span (--over)."
        )
    errors = f"on pairs that it has not seen it steers {percent(false_alarms)} of the texts that it should leave alone"
    errors += f" and leaves alone {percent(misses)} of those that it should steer"
    if max(false_alarms, misses) <= _FEW_ERRORS:
        return f"It works: {errors}. Write the condition into a rule of a plan."
    return f"It works, with errors: {errors}. More pairs may help; see whether the plan works with steermoe eval."


def of_map(differs: bool | None) -> str:
    """The verdict on a new map: whether it differs from maps of shuffled pairs, None if that is not known."""
    if differs is None:
        return (
            "The map is made; whether it is more than chance it does not say (--per-pair tells). Whether it steers, "
            "steermoe eval measures."
        )
    if not differs:
        return (
            "The map may be chance: it does not differ from maps of shuffled pairs. Record more pairs before you steer "
            "by it."
        )
    return "The two sides are routed differently, beyond chance. Whether the map steers, steermoe eval measures."


def of_effects(n_tried: int, n_acting: int, *, stable: bool) -> str:
    """The verdict of an attribution: how many of the first experts by RD act on the answers."""
    if not n_acting:
        return (
            f"None of the {n_tried} experts of largest |RD| is seen to act on the answers: steering by this map will "
            "hardly work. Attribute with more draws or items, or make the map from more pairs."
        )
    more = "" if stable else " The order is not stable yet: give more draws."
    return (
        f"{n_acting} of the {n_tried} experts of largest |RD| act on the answers. steermoe fit makes a bias of them, "
        f"and --rank effect chooses by it.{more}"
    )
