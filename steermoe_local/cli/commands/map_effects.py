"""What `steermoe map show` and `map diff` say about effects of interventions."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from ...maps.effect_comparison import EffectComparison
from ...maps.effects import ACTIONS, ATTRIBUTE, Effects
from ...maps.expert_map import ExpertMap

NO_EFFECTS = "not tried: RD counts which experts differ, only an intervention shows which have an effect:"
_NOTE = (
    "Effect on the margin of the positive answer, cost on the neutral text, in nats a token; ± standard error; "
    "* significant; random: a control, not one of the first by RD."
)


def effect_rows(expert_map: ExpertMap) -> list[tuple[str, str]]:
    """How effects were estimated, and how many there are, in words."""
    effects = expert_map.effects
    if effects is None:
        return [("effects", NO_EFFECTS), ("", ATTRIBUTE)]
    facts = effects.facts
    lines = []
    for name, action in ACTIONS.items():
        if name not in facts.n_draws:
            continue
        n = effects.numbers(action)
        line = f"{name}: {n['n_significant']} of {n['n']} experts significant at 5%"
        if n["n_random"]:
            line += f", {n['n_random_significant']} of the {n['n_random']} random ones"
        line += f"; R2 {facts.r2[name]:.2f}"
        if name in facts.r2_cost:
            line += f", of the cost {facts.r2_cost[name]:.2f}"
        stable = "stable" if facts.stable[name] else "NOT stable"
        lines.append(f"{line}; first {facts.first} agree {facts.agreement[name]:.0%}, {stable}")
    of = "pairs" if facts.response == "pairs" else f"items of {facts.response}"
    confirmed = f", confirmed on {facts.n_confirm} others" if facts.n_confirm else ""
    draws = ", ".join(f"{n} {name}" for name, n in facts.n_draws.items())
    steered = "the answer steered" if facts.steer == "answer" else "prompt and answer steered"
    lines.append(f"margins of {facts.n_items} {of}{confirmed}, {steered}; draws: {draws}")
    return [("effects", lines[0]), *(("", line) for line in lines[1:])]


def effects_table(expert_map: ExpertMap, top: int) -> list[Any]:
    """The first effects as a table with its note, for the terminal; [] for a map without any."""
    effects = expert_map.effects
    if effects is None:
        return []
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    rows, known = effects.rows(), _known(effects)
    names = ["layer", "expert", "action", "effect", "p", *known, "RD", ""]
    for name in names:
        table.add_column(name, justify="left" if name in ("action", "") else "right", no_wrap=True)
    for index in effects.first(top).tolist():
        row = rows[index]
        star = "*" if effects.significant[index] else " "
        cells = [str(row["layer"]), str(row["expert"]), row["action"]]
        cells += [f"{row['effect']:+.3f} ±{row['effect_se']:.3f}{star}", p_text(row["p"])]
        cells += ["" if name not in row else f"{row[name]:.3f}" for name in known]
        rd = expert_map.rd[row["layer"], row["expert"]]
        table.add_row(*cells, f"{rd:+.3f}", "random" if row["control"] else "")
    return [table, Text(_NOTE, style="dim")]


def _known(effects: Effects) -> list[str]:
    """Columns beside the effect that some row has."""
    return [name for name in ("cost", "confirm") if not np.isnan(getattr(effects, name)).all()]


def effects_json(expert_map: ExpertMap, top: int) -> dict[str, Any] | None:
    """The effects of a map as JSON, the first `top` rows of them; None for a map without any."""
    effects = expert_map.effects
    if effects is None:
        return None
    rows = effects.rows()
    first = [
        rows[index]
        | {
            "significant": bool(effects.significant[index]),
            "rd": float(expert_map.rd[rows[index]["layer"], rows[index]["expert"]]),
        }
        for index in effects.first(top).tolist()
    ]
    numbers = {name: effects.numbers(action) for name, action in ACTIONS.items() if name in effects.facts.n_draws}
    return {"attribution": effects.facts.to_dict(), **numbers, "first": first}


def compared_rows(one: ExpertMap, two: ExpertMap, found: dict[str, EffectComparison] | None) -> list[tuple[str, str]]:
    """How far two maps agree about effects, in words."""
    if found is None:
        having = [name for name, m in (("first", one), ("second", two)) if m.effects is not None]
        return [("effects", f"only the {having[0]} map has any")] if having else []
    rows = []
    for name, of in found.items():
        words = f"Pearson {of.pearson:+.4f}, Spearman {of.spearman:+.4f} over {of.n} experts tried in both; "
        words += f"significant in both: {of.n_significant}, of these to the same side: {of.n_same_sign}"
        rows.append((f"effects, {name}", words if of.n else "no expert was tried in both"))
    return rows


def effect_text(row: dict[str, Any] | None) -> str:
    """The effect of one action on an expert, marked where it is significant; "" where it was not tried."""
    return "" if row is None else f"{row['effect']:+.3f}{'*' if row['significant'] else ' '}"


def p_text(value: float) -> str:
    """A p-value in few characters."""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}" if value else "0"
