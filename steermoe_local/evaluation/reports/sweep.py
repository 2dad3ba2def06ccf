"""The report of a sweep: tables, Markdown, CSV, and the picture of its Pareto front."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..._util.files import StrPath
from ...maps.colours import LEAST_KL, LEAST_PERCENT, LEAST_POINTS
from ..metrics.formatting import points
from ..metrics.intervals import Interval
from ..studies.search.grid import Choice
from ..studies.search.objective import cost_of
from ..studies.search.sweep import Point, Sweep
from .document import FLUENCY, Block, Document, Table, Words, fluency_cells, how_to_repeat, sections
from .figure import RED, legend_below, new_figure, plain, save, widen
from .verdicts import of_sweep

_COSTS = {"ppl": "perplexity of the neutral text, increase in %", "kl": "KL from the unsteered model, nats"}
_NAMED = 8  # points of a picture with their numbers; more would cover each other


def sweep_tables(result: Sweep) -> list[Table]:
    """The front, all points, and the impossible choices, if there are any."""
    best = [point for point in result.points if point.front]
    found = []
    if best:
        order = sorted(best, key=lambda point: (point.choice.reverse, point.gain))
        cost = "perplexity" if result.cost == "ppl" else "KL"
        note = f"no other choice has as much gain for less {cost}, or more for as much"
        found.append(_points_table("Pareto front", result, order, note))
    note = "gain: what of the effect goes the way that is steered to, broken answers on neither side"
    found.append(_points_table("All choices", result, result.points, note))
    if result.impossible:
        rows = tuple((str(item.choice), item.why) for item in result.impossible)
        found.append(Table("Impossible choices", ("choice", "why"), rows))
    return found


def _points_table(title: str, result: Sweep, shown: Sequence[Point], note: str) -> Table:
    both = ("swing",) if any(point.swing for point in result.points) else ()
    header = ("choice", "experts + / -", "rate", "effect", "gain", *both, *FLUENCY, "note")
    unsteered = (str(result.unsteered), "", "", *("" for _ in both), *fluency_cells(result.unsteered_fluency))
    rows = [("unsteered", "0 / 0", *unsteered, "")]
    for point in shown:
        same = "" if point.same_as is None else f"as {result.points[point.same_as].choice}"
        rows.append(
            (
                str(point.choice),
                f"{point.n_active} / {point.n_inactive}",
                str(point.rate),
                points(point.effect),
                f"{100 * point.gain:+.0f}",
                *(points(point.swing) if point.swing else "" for _ in both),
                *fluency_cells(point.fluency),
                ", ".join(filter(None, ["front" if point.front else "", same])),
            )
        )
    return Table(title, header, tuple(rows), note)


def sweep_document(result: Sweep, command: str = "", pictures: Sequence[str] = ()) -> Document:
    """The report. `command` makes it again; `pictures` are names of files in the same folder."""
    n = len(result.points)
    summary = (
        f"{n + len(result.impossible)} choices of {result.metadata['steering']['name']}: "
        f"{result.n_measured} steerings were measured on {result.metadata['n_items']} items each; choices that steer "
        f"equally share one measurement. {len(result.impossible)} cannot be carried out by the model."
    )
    cut = [table.cut("table.csv") for table in sweep_tables(result)]
    blocks = [*sections([], pictures), Words(summary), *cut]
    return study_document("Sweep", result.metadata, of_sweep(result).text, blocks, command)


def study_document(
    title: str, metadata: Mapping[str, Any], verdict: str, blocks: Sequence[Block], command: str
) -> Document:
    """A report with the title, origin and digests of `study_metadata`."""
    file = metadata["model"].get("file")
    digests = {"task": metadata["settings"].get("task_sha256"), "map": metadata["steering"].get("map_sha256")}
    whole = f"{title}: {metadata['steering']['name']}{f' on {file}' if file else ''}"
    return Document(whole, verdict, (*blocks, *how_to_repeat(command, metadata, digests)))


def sweep_csv(result: Sweep) -> str:
    """All points, one a line, numbers in full; impossible choices have the reason in the last column."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    choice = ("activate", "deactivate", "layers", "strength", "reverse", "cap", "weights")
    figures = [f"{name}{end}" for name in ("rate", "effect", "swing") for end in ("", "_low", "_high")]
    figures = ["n_active", "n_inactive", "gain", *figures]
    guards = ("perplexity", "perplexity_ratio", "kl", "same_top", "distinct_2", "looping", "empty", "cut", "ill_formed")
    writer.writerow((*choice, *figures, *guards, "refused", "front", "same_as", "impossible"))
    for point in result.points:
        writer.writerow(
            (
                *_choice_cells(point.choice),
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
        writer.writerow((*_choice_cells(item.choice), *empty, item.why))
    return out.getvalue()


def _choice_cells(choice: Choice) -> tuple[Any, ...]:
    layers = "all" if choice.layers is None else choice.layers
    hard = "" if choice.cap is not None else "hard"
    scale = hard if choice.scale is None else choice.scale
    return choice.activate, choice.deactivate, layers, scale, int(choice.reverse), choice.cap, choice.weights


def _bounds(found: Interval | None) -> tuple[float | None, ...]:
    return (None, None, None) if found is None else (found.value, found.low, found.high)


#
# the picture
#


def draw_sweep(result: Sweep, paths: Sequence[StrPath]) -> bool:
    """Draw gain against cost, one panel a direction, the front marked. False: the cost was not measured, nothing is
    drawn.

    Raises UsageError without matplotlib, or when a file cannot be written.
    """
    directions = sorted({point.choice.reverse for point in result.points})
    shown = {way: [p for p in result.points if p.choice.reverse == way and p.front is not None] for way in directions}
    if not any(shown.values()):
        return False
    title = f"{study_title(result.metadata)}: effect against its price"
    figure = new_figure((6.6 * len(directions), 5.1), title, fontsize=12, weight="bold")
    for column, reverse in enumerate(directions, 1):
        axes = figure.add_subplot(1, len(directions), column)
        side = str(result.metadata["negative" if reverse else "positive"])
        _draw_front(axes, result, shown[reverse])
        axes.set_title(plain(f"steered to {side}") if side else "steered", fontsize=10)
        axes.set(xlabel=_COSTS[result.cost], ylabel="gain over unsteered, points")
        legend_below(axes)
    save(figure, paths)
    return True


def study_title(metadata: Mapping[str, Any]) -> str:
    """The task for the title of a picture, else the steering."""
    return str(metadata["settings"].get("task", "")) or str(metadata["steering"]["name"])


def _draw_front(axes: Any, result: Sweep, shown: Sequence[Point]) -> None:
    from matplotlib.ticker import MaxNLocator

    scale = 100 if result.cost == "ppl" else 1

    def at(point: Point) -> tuple[float, float]:
        return scale * (cost_of(point.fluency, result.cost) or 0.0), 100 * point.gain

    spots = [at(point) for point in shown]
    sizes = [point.n_active + point.n_inactive for point in shown]
    axes.axhline(0, color="#999999", lw=0.6)
    axes.axvline(0, color="#999999", lw=0.6)
    found = axes.scatter(
        *zip(*spots, strict=True), c=sizes, cmap="viridis_r", vmin=min(sizes), vmax=max(*sizes, min(sizes) + 4), s=24,
        lw=0, alpha=0.85, zorder=2,
    )  # fmt: skip
    axes.figure.colorbar(found, ax=axes, label="experts steered", pad=0.02).locator = MaxNLocator(integer=True)
    best = sorted({(*at(point), _numbers(point.choice)) for point in shown if point.front})
    axes.plot(
        [x for x, _, _ in best], [y for _, y, _ in best], color=RED, lw=1.2, marker="o", mfc="none", ms=8, zorder=3,
        label="front",
    )  # fmt: skip
    step = max(1, -(-len(best) // _NAMED))
    for x, y, words in [*best[:-1:step], *best[-1:]]:
        axes.annotate(words, (x, y), textcoords="offset points", xytext=(6, -11), fontsize=8, color=RED)
    # a choice that wrecks the text would squeeze all others into a line
    if len(spots) > 1 and max(x for x, _ in spots) > 20 * scale / 100 and min(x for x, _ in spots) >= -scale:
        axes.set_xscale("symlog", linthresh=scale / 100)
    least = LEAST_PERCENT if result.cost == "ppl" else LEAST_KL
    widen(axes, x=(-0.03 * least, least), y=(-0.08 * LEAST_POINTS, LEAST_POINTS))


def _numbers(choice: Choice) -> str:
    words = f"+{choice.activate} -{choice.deactivate}"
    words += f" L{choice.layers}" if choice.layers is not None else ""
    words += f" cap {choice.cap:g}" if choice.cap is not None else ""
    return words + (f" x{choice.scale:g}" if choice.scale is not None else "")
