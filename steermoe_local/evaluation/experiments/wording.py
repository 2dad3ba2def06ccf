"""What the recipes share: a choice measured both ways, thresholds, and figures put into words and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ...errors import UsageError
from ..measuring.evaluator import Evaluator
from ..measuring.measurements import Measurement
from ..measuring.side_effects import fluency
from ..metrics.formatting import draws_below, percent, points
from ..metrics.intervals import Interval, difference, margin, rate
from ..reports.report import Table, control_rows
from ..studies.control_runs import ControlResult

__all__ = [
    "AHEAD",
    "ENOUGH",
    "GUARDS",
    "HARM",
    "LEAST",
    "SCALES",
    "Sides",
    "Verdict",
    "ahead",
    "compared",
    "controls_table",
    "cost",
    "depth_finding",
    "guard_harms",
    "layer_names",
    "linked",
    "map_facts",
    "map_row",
    "require",
    "router_kinds",
    "rules_finding",
    "side_row",
    "size",
    "swing_figures",
    "text_cells",
    "works",
]

AHEAD = 0.95
"""Share of the draws that a map must be ahead of to be more than random."""
ENOUGH = 19
"""Draws of which being ahead of all says something: with fewer of them p cannot reach 0.05."""
HARM = 0.05
"""How far a neutral ability may fall, and perplexity rise (as a share), before it counts as harm."""
LEAST = 0.05
"""The least effect that counts, in points of 1."""
SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Logits of the soft rules that `routing-kinds` tries."""

Verdict = Literal["for", "against", "open"]


@dataclass(frozen=True)
class Sides:
    """A choice of experts, measured unsteered and both ways; `seed` is the bootstrap's."""

    unsteered: Measurement
    towards: Measurement
    away: Measurement
    seed: int

    @property
    def swing(self) -> Interval:
        """Rate towards - rate away, over the same items."""
        return difference(self.towards.values, self.away.values, self.seed)

    def table(self) -> Table:
        """Rates and guards of the three."""
        rows = [side_row(name, getattr(self, name), self.unsteered) for name in ("unsteered", "towards", "away")]
        return Table("Rates and guards", GUARDS, tuple(rows), "rate: share on the positive side, 95% interval")


GUARDS = ("side", "experts + / -", "rate", "ill-formed", "perplexity ratio", "KL", "benign refused")


def side_row(name: str, found: Measurement, base: Measurement) -> tuple[str, ...]:
    """A row under GUARDS."""
    n = (found.bias.n_active, found.bias.n_inactive) if found.bias else (0, 0)
    refused = str(rate(found.benign_values)) if found.benign else "-"
    shares = (str(rate(found.values)), percent(found.label_share("ill-formed")))
    return (name, f"{n[0]} / {n[1]}", *shares, *text_cells(found, base), refused)


def text_cells(found: Measurement, base: Measurement) -> tuple[str, str]:
    """Perplexity ratio and KL on the neutral text."""
    guards = fluency(found, base)
    if guards.perplexity_ratio is None or guards.kl is None:
        return "-", "-"
    return f"{guards.perplexity_ratio:.3f}", f"{guards.kl:.4f}"


def controls_table(controls: Iterable[ControlResult], swing: Interval) -> Table:
    """Controls beside the swing."""
    header = ("experts or map", "draws", "size of the swing", "draws below", "p", "note")
    note = "size: mean and 95% range of |swing| in points; draws below: the map's percentile among them"
    return Table(f"Controls of the swing of {points(swing)} points", header, control_rows(controls), note)


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


def rules_finding(found: Mapping[str, Sides], hard: Interval, kinds: Sequence[Sequence[str]]) -> str:
    """The sentence of `routing-kinds`."""
    gating = ", ".join(sorted({kind[1] for kind in kinds}))
    parts = [f"On {gating} routers the hard rule swings the rate by {points(hard)} points"]
    if "hard, promote only" in found:
        alone = [f"{name[6:-5]} alone {points(found[name].swing)}" for name in list(found)[1:3]]
        parts.append(", ".join(alone))
    soft = [name for name in found if name.startswith("soft")]
    reached = next((name for name in soft if works(hard) and found[name].swing.value >= 0.9 * hard.value), None)
    if not works(hard):
        best = max(soft, key=lambda name: found[name].swing.value)
        parts.append(f"which is no effect; the best soft rule ({best}) gives {points(found[best].swing)}")
    elif reached is None:
        parts.append(f"no soft rule up to {SCALES[-1]:g} logits comes within a tenth of it")
    else:
        kl = [fluency(found[name].towards, found[name].unsteered).kl for name in (reached, "hard")]
        cost = "" if None in kl else f", at a KL of {kl[0]:.4f} against {kl[1]:.4f} nats"
        parts.append(f"the soft rule reaches nine tenths of it from {reached[5:]} logits on{cost}")
    return "; ".join(parts) + "."


def depth_finding(found: Mapping[str, Sides], seed: int) -> tuple[str, Verdict]:
    """The sentence of `layers` on thirds of the depth, and whether it is the middle one that is ahead."""
    if len(found) < 2:
        return "there are too few layers to compare thirds.", "open"
    words = ", ".join(f"{points(sides.swing)} ({name})" for name, sides in found.items())
    best = max(found, key=lambda name: found[name].swing.value)
    if not works(found[best].swing):
        return f"no third swings the rate: {words}.", "against"
    values = {name: sides.towards.values - sides.away.values for name, sides in found.items()}
    margins = [
        margin(values[best] - values[name], found[best].swing, found[name].swing, seed)
        for name in found
        if name != best
    ]
    if all(more.low > 0 for more in margins):
        agrees = "agrees with" if best == "middle" else "differs from"
        words += f"; the {best} third is ahead, which {agrees} the paper's view that the middle layers matter most."
        return f"the rate swings by {words}", "for" if best == "middle" else "against"
    words += "; no third is clearly ahead, which neither confirms nor refutes that the middle layers matter most."
    return f"the rate swings by {words}", "open"


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


def map_facts(control: ControlResult) -> list[tuple[str, float, Mapping[str, Any]]]:
    """(label, effect, facts) of each draw of a control that is maps."""
    maps = control.details.get("maps", ())
    return list(zip(control.labels, control.effects, maps, strict=True)) if control.n else []


def map_row(label: str, effect: float, fact: Mapping[str, Any]) -> tuple[str, ...]:
    """A row on a control map."""
    shared = [f"{fact[name]:.0%}" for name in ("shared", "shared_reversed")]
    return (label, str(fact["n_pairs"]), f"{100 * effect:+.0f}", *shared, f"{fact['pearson']:+.2f}")


def swing_figures(sides: Sides) -> dict[str, Any]:
    """Rates and swing as plain JSON values."""
    rates = {name: getattr(sides, name).rate for name in ("unsteered", "towards", "away")}
    return {"rates": rates, "swing": asdict(sides.swing)}


def works(swing: Interval) -> bool:
    """Is there an effect in the map's direction at all?"""
    return swing.low > 0 and swing.value >= LEAST


def ahead(swing: Interval, control: ControlResult) -> Verdict:
    """Does the swing beat the draws? "open" where there are too few of them to tell."""
    if not works(swing) or (control.percentile or 0) < AHEAD:
        return "against"
    return "for" if control.n >= ENOUGH else "open"


def compared(who: str, swing: Interval, control: ControlResult) -> str:
    """Words on a swing beside a control; honest where it is not better."""
    words = f"{who} by {points(swing)} points" if who != "they" else f"a swing of {points(swing)} points"
    if not works(swing):
        return f"{words}, which is no effect"
    below, verdict = draws_below(control.percentile or 0.0), ahead(swing, control)
    if verdict == "against":
        return f"{words}, no different from random: only {below} of {control.n} draws are smaller"
    few = "" if verdict == "for" else ", too few draws to tell it from random"
    return f"{words}, more than {below} of {control.n} draws (p = {control.p:.3f}{few})"


def cost(sides: Sides) -> str:
    """Words on what it costs on the neutral text."""
    ratio = fluency(sides.towards, sides.unsteered).perplexity_ratio
    return "" if ratio is None else f"; towards, perplexity on the neutral text changes by {100 * (ratio - 1):+.1f}%"


def linked(control: ControlResult) -> str:
    """Words on draws that are no control."""
    return f". Mind that {control.note}" if control.note else ""


def require(control: ControlResult) -> None:
    """Raise UsageError for a control without draws."""
    if not control.n:
        raise UsageError(f"{control.kind} experts: {control.note}")


def size(control: ControlResult) -> str:
    """Words on the sizes of the draws."""
    low, high = control.low or 0.0, control.high or 0.0
    return f"{100 * (control.mean or 0.0):.0f} points on average (95% of draws {100 * low:.0f} to {100 * high:.0f})"
