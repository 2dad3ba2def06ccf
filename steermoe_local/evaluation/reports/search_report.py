"""Sweeps and searches in words and tables: Markdown, CSV, and the same tables for a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..measuring.side_effects import Fluency
from ..metrics.formatting import points
from ..metrics.intervals import Interval
from ..studies.sweep import Point, Sweep
from ..studies.tune import Effect, Evaluated, Tuning
from .report import Table, escape, how_to_repeat, markdown_table

__all__ = [
    "sweep_csv",
    "sweep_markdown",
    "sweep_tables",
    "tuning_markdown",
    "tuning_tables",
    "tuning_verdict",
]

_MOST_ROWS = 200  # of a table in a report; the CSV has all
_FLUENCY = ("perplexity ratio", "KL", "looping", "ill-formed", "benign refused")


def sweep_tables(result: Sweep) -> list[Table]:
    """The front, all points, and the impossible choices, if there are any."""
    best = [point for point in result.points if point.front]
    found = []
    if best:
        order = sorted(best, key=lambda point: (point.choice.reverse, point.gain))
        note = f"no other choice has as much gain for less {_cost(result)}, or more for as much"
        found.append(_points_table("Pareto front", result, order, note))
    note = "gain: what of the effect goes the way that is steered to, broken answers on neither side"
    found.append(_points_table("All choices", result, result.points, note))
    if result.impossible:
        rows = tuple((str(item.choice), item.why) for item in result.impossible)
        found.append(Table("Impossible choices", ("choice", "why"), rows))
    return found


def _cost(result: Sweep) -> str:
    return "perplexity" if result.cost == "ppl" else "KL"


def _points_table(title: str, result: Sweep, shown: Sequence[Point], note: str) -> Table:
    swing = any(point.swing for point in result.points)
    header = ("choice", "experts + / -", "rate", "effect", "gain", *(("swing",) if swing else ()), *_FLUENCY, "note")
    empty = ("",) * (3 if swing else 2)
    rows: list[tuple[str, ...]] = []
    rows.append(("unsteered", "0 / 0", str(result.unsteered), *empty, *_guards(result.unsteered_fluency), ""))
    for point in shown:
        swings = [points(point.swing) if point.swing else ""] if swing else []
        rows.append(
            (
                str(point.choice),
                f"{point.n_active} / {point.n_inactive}",
                str(point.rate),
                points(point.effect),
                f"{100 * point.gain:+.0f}",
                *swings,
                *_guards(point.fluency),
                _remark(result, point),
            )
        )
    return Table(title, header, tuple(rows), note)


def _remark(result: Sweep, point: Point) -> str:
    same = "" if point.same_as is None else f"as {result.points[point.same_as].choice}"
    return ", ".join(words for words in ("front" if point.front else "", same) if words)


def _guards(found: Fluency) -> tuple[str, ...]:
    return (
        "-" if found.perplexity_ratio is None else f"{found.perplexity_ratio:.3f}",
        "-" if found.kl is None else f"{found.kl:.4f}",
        f"{found.looping:.0%}",
        f"{found.ill_formed:.0%}",
        "-" if found.refused is None else f"{found.refused.value:.0%}",
    )


def sweep_markdown(result: Sweep, command: str = "", pictures: Sequence[str] = ()) -> str:
    """A report. `command` makes it again; `pictures` are names of files beside it."""
    n = len(result.points)
    summary = (
        f"{n + len(result.impossible)} choices of {escape(str(result.about['steering']['name']))}: "
        f"{result.n_measured} steerings were measured on {result.about['n_items']} items each; choices that steer "
        f"equally share one measurement. {len(result.impossible)} cannot be carried out by the model."
    )
    tables = sweep_tables(result)
    cut = [_cut(table) for table in tables]
    return _report("Sweep", result.about, summary, cut, command, pictures)


def _cut(table: Table) -> Table:
    """At most so many rows that a page can show them."""
    if len(table.rows) <= _MOST_ROWS:
        return table
    words = f"the first {_MOST_ROWS} of {len(table.rows)} rows; table.csv has all"
    note = f"{words}; {table.note}" if table.note else words
    return Table(table.title, table.header, table.rows[:_MOST_ROWS], note)


def sweep_csv(result: Sweep) -> str:
    """All points, one a line, numbers in full; impossible choices have the reason in the last column."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    choice = ("activate", "deactivate", "layers", "strength", "reverse")
    figures = [f"{name}{end}" for name in ("rate", "effect", "swing") for end in ("", "_low", "_high")]
    figures = ["n_active", "n_inactive", "gain", *figures]
    guards = ("perplexity", "perplexity_ratio", "kl", "same_top", "distinct_2", "looping", "empty", "cut", "ill_formed")
    writer.writerow((*choice, *figures, *guards, "refused", "front", "same_as", "impossible"))

    def head(made: Any) -> tuple[Any, ...]:
        scale = "hard" if made.scale is None else made.scale
        return made.activate, made.deactivate, "all" if made.layers is None else made.layers, scale, int(made.reverse)

    for point in result.points:
        writer.writerow(
            (
                *head(point.choice),
                point.n_active,
                point.n_inactive,
                point.gain,
                *_bounds(point.rate),
                *_bounds(point.effect),
                *_bounds(point.swing),
                *(getattr(point.fluency, name) for name in guards),
                None if point.fluency.refused is None else point.fluency.refused.value,
                None if point.front is None else int(point.front),
                point.same_as,
                None,
            )
        )
    empty = (None,) * (len(figures) + len(guards) + 3)
    for item in result.impossible:
        writer.writerow((*head(item.choice), *empty, item.why))
    return out.getvalue()


def _bounds(found: Interval | None) -> tuple[float | None, ...]:
    return (None, None, None) if found is None else (found.value, found.low, found.high)


def tuning_verdict(result: Tuning) -> str:
    """The outcome in one sentence."""
    if result.chosen is None or result.outcome != "found":
        return f"{result.outcome}: {result.reason}; no bias is written"
    numbers = f"--activate {result.chosen.activate} --deactivate {result.chosen.deactivate}"
    return f"{numbers}: {result.reason}; {_saving(result)}"


def _saving(result: Tuning) -> str:
    return f"{len(result.trials)} of {result.n_grid} choices were looked at, {result.n_measured} with their answers"


def tuning_tables(result: Tuning) -> list[Table]:
    """The pick on both parts, its price, and the way there."""
    found = []
    effects = [
        ("pick, choosing part", result.chosen, result.choosing),
        ("pick, held out", result.chosen, result.heldout),
        ("strongest, held out", result.strongest, result.heldout_strongest),
    ]
    rows = [(name, _numbers(made), *_effect(effect)) for name, made, effect in effects if made and effect]
    if rows:
        note = (
            "95% intervals; held out: items that the choice never saw; strongest: before fewer experts were preferred"
        )
        found.append(Table("Effect", ("choice", "experts", "unsteered", "steered", "gain"), tuple(rows), note))
    if result.fluency is not None:
        guards = [("unsteered", *_guards(result.unsteered_fluency)), ("pick", *_guards(result.fluency))]
        note = "answers: of the unsteered model on the choosing part, of the pick on the held-out part"
        found.append(Table(f"Price (budget: {result.budget})", ("", *_FLUENCY), tuple(guards), note))
    steps = [(_numbers(trial), *_trial(trial), trial.step) for trial in result.trials]
    header = ("experts", "gain", "perplexity", "KL", "over the budget by", "looked at by")
    found.append(Table("The way", header, tuple(steps), "gain: points on the choosing part, with its standard error"))
    return found


def _effect(effect: Effect) -> tuple[str, str, str]:
    return str(effect.unsteered), str(effect.steered), points(effect.gain)


def _numbers(made: Evaluated) -> str:
    return f"+{made.activate} -{made.deactivate}"


def _trial(trial: Evaluated) -> tuple[str, str, str, str]:
    ppl, kl = trial.costs
    gain = "" if trial.gain is None else f"{100 * trial.gain:+.0f} ± {100 * (trial.error or 0):.0f}"
    return gain, f"{ppl:+.1%}", f"{kl:.4f}", trial.over


def tuning_markdown(result: Tuning, command: str = "", pictures: Sequence[str] = ()) -> str:
    """A report. `command` makes it again; `pictures` are names of files beside it."""
    tables = [_cut(table) for table in tuning_tables(result)]
    why = ["## Why it stopped", "", *(f"- {escape(line)}" for line in result.why), ""]
    parts = f"{len(result.choosing_items)} items were for choosing, {len(result.heldout_items)} were held out."
    summary = f"**{escape(tuning_verdict(result))}.**\n\nBudget: {result.budget}. {parts} {_saving(result)}."
    return _report("Tuning", result.about, summary, tables, command, pictures, why)


def _report(
    title: str,
    about: Mapping[str, Any],
    summary: str,
    tables: Sequence[Table],
    command: str,
    pictures: Sequence[str],
    more: Sequence[str] = (),
) -> str:
    name = escape(str(about["steering"]["name"]))
    where = about["model"].get("file")
    parts = [f"# {title}: {name}{f' on {escape(str(where))}' if where else ''}", "", summary, ""]
    parts += [f"![{picture}]({picture})\n" for picture in pictures]
    for table in tables:
        parts += [f"## {escape(table.title)}", "", markdown_table(table), ""]
    digests = {"task": about["settings"].get("task_sha256"), "map": about["steering"].get("map_sha256")}
    return "\n".join([*parts, *more, *how_to_repeat(command, about, digests)])
