"""The report of a search: tables, Markdown, and the picture of its candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..._util.files import StrPath
from ...maps.colours import LEAST_POINTS
from ..metrics.formatting import points
from ..studies.search.tune import Evaluated, Tuning
from .document import FLUENCY, Document, Heading, Listed, Table, Words, fluency_cells, sections
from .figure import RED, legend_below, new_figure, save
from .sweep import study_document, study_title
from .verdicts import of_tuning


def tuning_statistics(result: Tuning) -> str:
    """The outcome in one line, with its numbers as options."""
    if result.chosen is None or result.outcome != "found":
        return f"{result.outcome}: {result.reason}; no bias is written"
    numbers = f"--activate {result.chosen.activate} --deactivate {result.chosen.deactivate}"
    steering = result.metadata["steering"]
    numbers = f"--rank {steering['rank']} {numbers}" if "rank" in steering else numbers
    return f"{numbers}: {result.reason}; {_saving(result)}"


def _saving(result: Tuning) -> str:
    return f"{len(result.trials)} of {result.n_grid} choices were looked at, {result.n_measured} with their answers"


def tuning_tables(result: Tuning) -> list[Table]:
    """The pick on both parts of the items, its side effects, and all candidates."""
    found = []
    gains = [
        ("pick, choosing part", result.chosen, result.choosing),
        ("pick, held out", result.chosen, result.heldout),
        ("strongest, held out", result.strongest, result.heldout_strongest),
    ]
    rows = [
        (name, _numbers(made), str(gain.unsteered), str(gain.steered), points(gain.gain))
        for name, made, gain in gains
        if made and gain
    ]
    if rows:
        note = (
            "95% intervals; held out: items that the choice never saw; strongest: before fewer experts were preferred"
        )
        found.append(Table("Effect", ("choice", "experts", "unsteered", "steered", "gain"), tuple(rows), note))
    if result.fluency is not None:
        guards = [("unsteered", *fluency_cells(result.unsteered_fluency)), ("pick", *fluency_cells(result.fluency))]
        note = "answers: of the unsteered model on the choosing part, of the pick on the held-out part"
        found.append(Table(f"Price (budget: {result.budget})", ("", *FLUENCY), tuple(guards), note))
    header = ("experts", "gain", "perplexity", "KL", "over the budget by", "looked at by")
    note = "gain: points on the choosing part, with its standard error"
    found.append(Table("The way", header, tuple(_trial(trial) for trial in result.trials), note))
    return found


def _numbers(made: Evaluated) -> str:
    return f"+{made.activate} -{made.deactivate}"


def _trial(trial: Evaluated) -> tuple[str, ...]:
    ppl, kl = trial.costs
    gain = "" if trial.gain is None else f"{100 * trial.gain:+.0f} ± {100 * (trial.error or 0):.0f}"
    return _numbers(trial), gain, f"{ppl:+.1%}", f"{kl:.4f}", trial.over, trial.step


def tuning_document(result: Tuning, command: str = "", pictures: Sequence[str] = ()) -> Document:
    """The report. `command` makes it again; `pictures` are names of files in the same folder."""
    items = f"{len(result.choosing_items)} items were for choosing, {len(result.heldout_items)} were held out."
    blocks = [
        *sections([], pictures),
        Words(f"{tuning_statistics(result)}.", lead="In figures"),
        Words(f"Budget: {result.budget}. {items} {_saving(result)}."),
        *(table.cut("summary.json") for table in tuning_tables(result)),
        Heading("Why it stopped"),
        Listed(tuple(result.why)),
    ]
    return study_document("Tuning", result.metadata, of_tuning(result).text, blocks, command)


def draw_tuning(result: Tuning, paths: Sequence[StrPath]) -> None:
    """Draw the candidates' gain by their numbers of experts, those over the budget, and the pick.

    Raises UsageError without matplotlib, or when a file cannot be written.
    """
    side = str(result.metadata["negative" if result.metadata["steering"]["reverse"] else "positive"])
    title = f"{study_title(result.metadata)}{f': steered to {side}' if side else ''}"
    figure = new_figure((7.4, 5.6), title, fontsize=12, weight="bold")
    axes = figure.add_subplot()
    inside = [trial for trial in result.trials if trial.gain is not None]
    outside = [trial for trial in result.trials if trial.gain is None]
    axes.scatter(
        [trial.n_active for trial in outside], [trial.n_inactive for trial in outside], marker="x", c="#999999", s=34,
        lw=1.2, label=f"over the budget: {len(outside)}",
    )  # fmt: skip
    if inside:
        gains = [100 * (trial.gain or 0) for trial in inside]
        low, high = min(0.0, *gains), max(0.0, *gains)
        found = axes.scatter(
            [trial.n_active for trial in inside], [trial.n_inactive for trial in inside],
            c=gains, cmap="viridis", vmin=low, vmax=max(high, low + LEAST_POINTS), s=44, lw=0,
            label=f"inside: {len(inside)}",
        )  # fmt: skip
        figure.colorbar(found, ax=axes, label="gain on the choosing part, points", pad=0.02)
    if result.chosen is not None:
        axes.scatter(
            result.chosen.n_active, result.chosen.n_inactive, s=170, facecolors="none", edgecolors=RED, lw=1.8,
            label=f"pick: {_numbers(result.chosen)}",
        )  # fmt: skip
    _count_axis(axes.xaxis, axes.set_xscale, max((trial.n_active for trial in result.trials), default=1))
    _count_axis(axes.yaxis, axes.set_yscale, max((trial.n_inactive for trial in result.trials), default=1))
    across, up = max([1, *(t.n_active for t in result.trials)]), max([1, *(t.n_inactive for t in result.trials)])
    axes.set(xlabel="experts promoted", ylabel="experts suppressed", xlim=(-0.3, 1.3 * across), ylim=(-0.3, 1.3 * up))
    axes.set_title(f"{len(result.trials)} of {result.n_grid} choices looked at; {result.budget}", fontsize=9)
    legend_below(axes, 3, fontsize=9)
    save(figure, paths)


def _count_axis(axis: Any, set_scale: Any, most: int) -> None:
    """0, 1, 2, 4, ... at equal distances."""
    set_scale("symlog", base=2, linthresh=1)
    ticks = [0, *(1 << power for power in range(max(1, most.bit_length())))]
    axis.set_ticks(ticks, [str(tick) for tick in ticks])
    axis.set_ticks([], minor=True)
