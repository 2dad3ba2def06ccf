"""Verdicts of experiments and the sentences that state them, with their thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ...errors import UsageError
from ..measuring.evaluator import Evaluator
from ..measuring.measurements import Measurement
from ..measuring.side_effects import fluency
from ..metrics.formatting import draws_below, points
from ..metrics.intervals import Interval, difference, margin
from ..reports.document import Table
from ..reports.evaluation import control_rows
from ..reports.verdicts import ENOUGH, HARM
from ..studies.controls.controls import ControlResult
from .experiment import Sides, Verdict

AHEAD = 0.95
"""Share of the draws that a map must be ahead of to be more than random."""
LEAST = 0.05
"""The least effect that counts, in points of 1."""
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Logits of the soft rules that `routing-kinds` tries."""


def works(effect: Interval) -> bool:
    """Whether there is an effect in the map's direction at all."""
    return effect.low > 0 and effect.value >= LEAST


def ahead(effect: Interval, control: ControlResult) -> Verdict:
    """Whether the effect is larger than the draws'; "open" where there are too few of them to tell."""
    if not works(effect) or (control.percentile or 0) < AHEAD:
        return "against"
    return "for" if control.n >= ENOUGH else "open"


def compared(who: str, effect: Interval, control: ControlResult) -> str:
    """Words that compare an effect with a control; they say so where it is not larger."""
    words = f"{who} by {points(effect)} points" if who != "they" else f"a swing of {points(effect)} points"
    if not works(effect):
        return f"{words}, which is no effect"
    below, verdict = draws_below(control.percentile or 0.0), ahead(effect, control)
    if verdict == "against":
        return f"{words}, no different from random: only {below} of {control.n} draws are smaller"
    few = "" if verdict == "for" else ", too few draws to tell it from random"
    return f"{words}, more than {below} of {control.n} draws (p = {control.p:.3f}{few})"


def require(control: ControlResult) -> ControlResult:
    """The control. Raises UsageError for one without draws."""
    if not control.n:
        raise UsageError(f"{control.kind} experts: {control.note}")
    return control


def size(control: ControlResult) -> str:
    """Words on the sizes of the draws."""
    low, high = control.low or 0.0, control.high or 0.0
    return f"{100 * (control.mean or 0.0):.0f} points on average (95% of draws {100 * low:.0f} to {100 * high:.0f})"


def controls_table(controls: Iterable[ControlResult], effect: Interval) -> Table:
    """Controls of an effect."""
    header = ("experts or map", "draws", "size of the swing", "draws below", "p", "note")
    note = "size: mean and 95% range of |swing| in points; draws below: the map's percentile among them"
    return Table(f"Controls of the swing of {points(effect)} points", header, control_rows(controls), note)


def map_rows(control: ControlResult) -> list[tuple[str, ...]]:
    """Rows on the draws of a control that is maps: map, pairs, effect, shares of shared experts, correlation of RD."""
    rows = []
    for label, effect, fact in zip(control.labels, control.effects, control.details.get("maps", ()), strict=True):
        shared = [f"{fact[name]:.0%}" for name in ("shared", "shared_reversed")]
        rows.append(
            (label, str(fact["n_pairs"] or "unknown"), f"{100 * effect:+.0f}", *shared, f"{fact['pearson']:+.2f}")
        )
    return rows


def guard_harms(found: Measurement, base: Measurement) -> tuple[list[str], list[str], dict[str, Any]]:
    """(what is harmed, what is not, figures) on the neutral text and the benign prompts."""
    harms: list[str] = []
    kept: list[str] = []
    guards, figures = fluency(found, base), dict[str, Any]()
    if guards.perplexity_ratio is not None:
        words = f"perplexity {100 * (guards.perplexity_ratio - 1):+.1f}%"
        (harms if not guards.perplexity_ratio <= 1 + HARM else kept).append(words)
        figures |= {"perplexity_ratio": guards.perplexity_ratio, "kl": guards.kl}
    if found.benign:
        refused = difference(found.benign_values, base.benign_values)
        words = f"refusals of benign prompts {points(refused)} points"
        (harms if refused.value >= HARM and refused.low > 0 else kept).append(words)
        figures["refused_change"] = asdict(refused)
    return harms, kept, figures


def depth_finding(found: Mapping[str, Sides], seed: int) -> tuple[str, Verdict]:
    """The sentence of `layers` on thirds of the depth, and whether it is the middle one that is ahead."""
    if len(found) < 2:
        return "there are too few layers to compare thirds.", "open"
    effects = {name: sides.effect for name, sides in found.items()}
    words = ", ".join(f"{points(effect)} ({name})" for name, effect in effects.items())
    best = max(effects, key=lambda name: effects[name].value)
    if not works(effects[best]):
        return f"no third swings the rate: {words}.", "against"
    values = {name: sides.positive.values - sides.negative.values for name, sides in found.items()}
    margins = [
        margin(values[best] - values[name], effects[best], effects[name], seed) for name in found if name != best
    ]
    if all(more.low > 0 for more in margins):
        agrees = "agrees with" if best == "middle" else "differs from"
        words += f"; the {best} third is ahead, which {agrees} the paper's view that the middle layers matter most."
        return f"the rate swings by {words}", "for" if best == "middle" else "against"
    words += "; no third is clearly ahead, which neither confirms nor refutes that the middle layers matter most."
    return f"the rate swings by {words}", "open"


def rules_finding(found: Mapping[str, Sides], kinds: Sequence[Sequence[str]]) -> str:
    """The sentence of `routing-kinds`; `kinds` are those of `router_kinds`."""
    effects = {name: sides.effect for name, sides in found.items()}
    hard = effects["hard"]
    gating = ", ".join(sorted({kind[1] for kind in kinds}))
    parts = [f"On {gating} routers the hard rule swings the rate by {points(hard)} points"]
    if "hard, promote only" in effects:
        parts.append(
            ", ".join(f"{way} alone {points(effects[f'hard, {way} only'])}" for way in ("promote", "suppress"))
        )
    soft = [name for name in found if name.startswith("soft")]
    reached = next((name for name in soft if works(hard) and effects[name].value >= 0.9 * hard.value), None)
    if not works(hard):
        best = max(soft, key=lambda name: effects[name].value)
        parts.append(f"which is no effect; the best soft rule ({best}) gives {points(effects[best])}")
    elif reached is None:
        parts.append(f"no soft rule up to {SCALES[-1]:g} logits comes within a tenth of it")
    else:
        kl = [fluency(found[name].positive, found[name].unsteered).kl for name in (reached, "hard")]
        cost = "" if None in kl else f", at a KL of {kl[0]:.4f} against {kl[1]:.4f} nats"
        parts.append(f"the soft rule reaches nine tenths of it from {reached.removeprefix('soft ')} logits on{cost}")
    return "; ".join(parts) + "."


def router_kinds(evaluator: Evaluator) -> tuple[tuple[str, ...], ...]:
    """The model's kinds of router, with their layers."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for layer, info in enumerate(evaluator.model.layer_info()):
        if info.n_expert:
            yes = ["yes" if flag else "no" for flag in (info.selection_bias, info.expert_groups, info.steerable)]
            kinds.setdefault((info.gating, str(info.n_expert_used), *yes), []).append(layer)
    return tuple((layer_names(chosen), *kind) for kind, chosen in kinds.items())


def layer_names(chosen: Sequence[int]) -> str:
    """Like "0-4,7"."""
    parts: list[list[int]] = []
    for layer in chosen:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
