"""The report of an audit: tables, conclusions, Markdown, and its picture by rate and by depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..._util.files import StrPath
from ..metrics.formatting import number, percent, points
from ..metrics.intervals import Interval
from ..studies.audit.perturbations import PROMOTE, SUPPRESS
from ..studies.audit.results import AFTER, BEFORE, HOLDS, TOGETHER, Audit, Break, Kept, ModelAudit, Point, Weakest
from .document import Block, Document, Table, Words, how_to_repeat, sections
from .figure import BLUE, GREY, RED, error_bars, new_figure, plain, save, widen
from .verdicts import of_audit

_DONE = {SUPPRESS: "suppressed", PROMOTE: "promoted"}
_MOST_LETTERS = 44  # of the names below an axis, side by side


def audit_tables(found: Audit) -> list[Table]:
    """Where it breaks, the models if there are several, then what is kept by rate on each, and by depth."""
    tables = [_breaks(found)]
    if len(found.models) > 1:
        tables.append(_models(found))
    for model in found.models:
        tables += [_kept(found, model), _language(found, model)]
    if found.base.blocks:
        tables.append(_depth(found))
    return [table for table in map(_without_empty, tables) if len(table.header) > 2]


def _breaks(found: Audit) -> Table:
    header = ("model", "random experts", found.task, found.unrelated or "", "neutral text", "behaviour breaks")
    note = (
        f"the lowest rate from which on the 95% interval of the share kept lies below {found.level:.0%}; never: at no "
        f"rate that was measured; compared with {found.unrelated or 'the neutral text'}"
    )
    rows = []
    for part in found.breaks:
        texts = ("neutral text" if found.base.points[0].text else "", part.text)
        rates = [(found.task, part.behaviour), (found.unrelated, part.unrelated), texts]
        rows.append((part.model, _DONE[part.action], *(_rate(at) if name else "" for name, at in rates), part.order))
    return Table("Where it breaks", header, tuple(rows), note)


def _kept(found: Audit, model: ModelAudit) -> Table:
    rows = []
    for point in model.points:
        kept = point.behaviour
        quantiles = (percent(kept.quantiles[name]) for name in ("worst", "q10", "median"))
        shares = (percent(point.gained), percent(point.shown), percent(point.broken))
        rows.append(
            (_DONE[point.action], f"{point.rate:.3g}", str(point.n_experts), str(kept.share), *quantiles, *shares)
        )
    header = ("random experts", "rate", "experts", "kept", "worst", "10%", "median", "gained", "shown", "broken")
    where = "" if model.kept is None else " on the base"
    note = (
        f"kept: share of the {model.points[0].behaviour.share.n} items that show it unsteered{where}, with 95% "
        "intervals over items and draws; of the draws the worst, the 10% quantile and the median; gained: share of the "
        "other items that show it; shown: of all items; broken: answers that are ill-formed, empty or loop"
    )
    return Table(f"{found.task} on {model.name}", header, tuple(rows), note)


def _language(found: Audit, model: ModelAudit) -> Table:
    rows = tuple((_DONE[point.action], f"{point.rate:.3g}", *_language_cells(point)) for point in model.points)
    note = (
        "less: the behaviour's share kept minus the one before it, under the same draws; same top: tokens of the "
        "neutral text with the same likeliest token; KL in nats"
    )
    return Table(f"Language on {model.name}", ("random experts", "rate", *_language_header(found)), rows, note)


def _depth(found: Audit) -> Table:
    weakest = {(part.action, part.layers): part for part in found.base.weakest if not part.none}
    rows = []
    for point in found.base.blocks:
        part = weakest.get((point.action, point.layers))
        mark = "" if part is None else "least, clearly" if part.clear else "least"
        kept = (str(point.behaviour.share), percent(point.behaviour.quantiles["worst"]))
        rows.append((_DONE[point.action], _layers(point.layers), *kept, *_language_cells(point), mark))
    n = len(found.base.blocks[0].behaviour.draws)
    note = (
        f"the first {n} draws at the highest rate, in these layers alone; least, clearly: all others keep more, beyond "
        "their 95% intervals"
    )
    header = ("random experts", "layers", "kept", "worst", *_language_header(found), "note")
    return Table("By depth", header, tuple(rows), note)


def _language_header(found: Audit) -> tuple[str, ...]:
    return (found.unrelated or "", "less", "same top", "less", "KL", "perplexity ratio")


def _language_cells(point: Point) -> tuple[str, ...]:
    def share(kept: Kept | None) -> str:
        return "" if kept is None else str(kept.share)

    def gap(found: Interval | None) -> str:
        return "" if found is None else points(found)

    figures = ("", "") if point.kl is None else (number(point.kl, 4), number(point.perplexity_ratio, 3))
    return (share(point.unrelated), gap(point.gap), share(point.text), gap(point.text_gap), *figures)


def _models(found: Audit) -> Table:
    cells: list[tuple[str, Callable[[ModelAudit], str]]] = [
        ("model", lambda m: m.name),
        ("type", lambda m: "" if m.file is None else m.file.file_type),
        ("bits/weight", lambda m: "" if m.file is None else f"{m.file.bits_per_weight:.2f}"),
        ("shown", lambda m: str(m.unsteered)),
        ("kept", lambda m: "" if m.kept is None else str(m.kept)),
        (found.unrelated or "", lambda m: "" if m.unrelated_kept is None else str(m.unrelated_kept)),
        ("same top", lambda m: "" if m.text is None else f"{m.text.same_top:.1%}"),
        ("KL", lambda m: "" if m.text is None else f"{m.text.kl:.4f}"),
        ("routing overlap", lambda m: "" if m.routing is None else f"{m.routing.overlap:.1%}"),
    ]
    rows = tuple(tuple(cell(model) for _, cell in cells) for model in found.models)
    note = (
        "unsteered: shown: share of all items; kept: of the items that show it on the base; the rest against the base"
    )
    return _without_empty(Table("Quantizations, unsteered", tuple(name for name, _ in cells), rows, note))


def conclusions(found: Audit) -> list[str]:
    """Conclusions from the figures, in sentences."""
    lines = [_broken(found, part) for part in found.breaks]
    lines += [_weakest(part) for part in found.base.weakest]
    lost = [m.name for m in found.models if m.kept is not None and m.kept.high < found.level]
    if len(found.models) > 1:
        which = ", ".join(lost)
        told = f"less than {found.level:.0%} is kept on {which}" if lost else "none is seen to break the behaviour"
        lines.append(f"Of the quantizations, unsteered, {told}.")
    return lines


def _broken(found: Audit, part: Break) -> str:
    where = "" if len(found.models) == 1 else f"On {part.model}, "
    what = f"{where}with random experts {_DONE[part.action]}, "
    what = what[0].upper() + what[1:]
    if part.behaviour is not None:
        told = f"{found.task} breaks at a rate of {part.behaviour:.3g}"
    elif part.order == HOLDS:
        told = f"{found.task} keeps {found.level:.0%} or more at every rate"
    else:
        told = f"{found.task} is not seen to break at any rate"
    if found.base.points[0].language is None:
        return f"{what}{told}; there is nothing to compare it with."
    name = found.unrelated or "the neutral text"
    rate = part.unrelated if found.unrelated else part.text
    if part.behaviour is None and rate is None and part.order != HOLDS:
        return f"{what}neither {found.task} nor {name} is seen to break at any rate."
    other = f"{name} is not seen to break" if rate is None else f"{name} breaks at {rate:.3g}"
    order = {
        HOLDS: "",
        BEFORE: ": the behaviour breaks before the language does",
        AFTER: ": the language breaks before the behaviour does",
        TOGETHER: ": at the same of the rates that were measured",
    }.get(part.order, "; which of them breaks first, if any, the intervals do not tell")
    return f"{what}{told}, {other}{order}."


def _weakest(part: Weakest) -> str:
    if part.none:
        return f"With random experts {_DONE[part.action]} in one part of the depth, no part keeps less than another."
    told = "clearly less than elsewhere" if part.clear else "but not clearly less than elsewhere"
    return (
        f"With random experts {_DONE[part.action]} in one part of the depth, least is kept in layers "
        f"{_layers(part.layers)}, {told}."
    )


def audit_document(found: Audit, command: str = "", pictures: Sequence[str] = ()) -> Document:
    """The report. `command` makes it again; `pictures` are names of files in the same folder."""
    metadata = found.provenance
    positive = f" ({found.positive})" if found.positive else ""
    digests = {"task": metadata["settings"].get("task_sha256"), "base": metadata.get("base_sha256")}
    n_draws = metadata["perturbations"]["n_draws"]
    first = f"{metadata['n_shown']} of {metadata['n_items']} items show it unsteered; {n_draws} draws at each rate; "
    blocks: list[Block] = [
        *map(Words, conclusions(found)),
        *(Words(f"{note}.", lead="Note") for note in found.notes),
        Words("Random draws are no adversary: a fitted choice of experts may break at lower rates what holds here."),
        *sections([table.cut("summary.json") for table in audit_tables(found)], pictures),
        *how_to_repeat(command, metadata, digests, first),
    ]
    return Document(f"How {found.task}{positive} holds under random routing", of_audit(found), tuple(blocks))


def _rate(rate: float | None) -> str:
    return "never" if rate is None else f"{rate:.3g}"


def _layers(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _without_empty(table: Table) -> Table:
    """The table without columns in which nothing was measured, or that have no name."""
    kept = [index for index, name in enumerate(table.header) if name and any(row[index] for row in table.rows)]
    rows = tuple(tuple(row[index] for index in kept) for row in table.rows)
    return Table(table.title, tuple(table.header[index] for index in kept), rows, table.note)


#
# the picture
#


def draw_audit(found: Audit, paths: Sequence[StrPath]) -> None:
    """Draw to each of the paths (.png or .svg): share kept by rate, a panel an action; by depth; on quantizations.

    Raises UsageError without matplotlib, or when a file cannot be written.
    """
    base = found.base
    actions = [action for action in (SUPPRESS, PROMOTE) if base.of(action)]
    several = len(found.models) > 1
    n_rows = 2 if base.blocks else 1
    n_columns = len(actions) + several
    title = f"{found.task}: share kept under random routing"
    figure = new_figure((5.4 * n_columns, 4.1 * n_rows), title, fontsize=12, weight="bold")
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for column, action in enumerate(actions):
        _draw_rates(axes[0][column], found, action)
        if base.blocks:
            _draw_depth(axes[1][column], found, [point for point in base.blocks if point.action == action])
    if several:
        _draw_models(axes[0][-1], found)
        if base.blocks:
            axes[1][-1].set_axis_off()
    # below all panels: draws that lose everything lie at the bottom of each
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    save(figure, paths)


def _draw_rates(axes: Any, found: Audit, action: str) -> None:
    shown = found.base.of(action)
    rates = [point.rate for point in shown]
    _draw_points(axes, found, shown, rates, (max(rates) - min(rates)) * 0.012 or 0.002, lines=True)
    for index, model in enumerate(found.models[1:]):
        values = [100 * point.behaviour.share.value for point in model.of(action)]
        axes.plot(rates, values, "-", color=BLUE, lw=0.8, alpha=0.5, label="" if index else "its quantizations")
    widen(axes, x=(min(rates) - 0.02, max(rates) + 0.02))
    _decorate(axes, found, f"random experts {_DONE[action]}")
    axes.set_xlabel("rate: share of each layer's experts", fontsize=8)


def _draw_depth(axes: Any, found: Audit, blocks: Sequence[Point]) -> None:
    at = list(range(len(blocks)))
    _draw_points(axes, found, blocks, at, 0.12, lines=False)
    names = [_layers(point.layers) for point in blocks]
    axes.set_xticks(at, names, rotation=90 if sum(map(len, names)) > _MOST_LETTERS else 0)
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    _decorate(axes, found, f"{_DONE[blocks[0].action]} in these layers alone, rate {blocks[0].rate:.3g}")
    axes.set_xlabel("layers", fontsize=8)


def _draw_points(
    axes: Any, found: Audit, shown: Sequence[Point], at: Sequence[float], apart: float, *, lines: bool
) -> None:
    """The share kept of behaviour, unrelated task and text side by side, over the draws of the behaviour."""
    for x, point in zip(at, shown, strict=True):
        draws = point.behaviour.draws
        axes.plot([x - apart] * len(draws), [100 * kept for kept in draws], ".", color=BLUE, alpha=0.25, ms=4)
    kinds: list[tuple[str, Callable[[Point], Kept | None], str, str]] = [
        (plain(found.task, 30), lambda point: point.behaviour, BLUE, "o-"),
        (plain(found.unrelated or "", 30), lambda point: point.unrelated, GREY, "s--"),
        ("neutral text: same top", lambda point: point.text, RED, "^:"),
    ]
    for place, (label, of, colour, style) in enumerate(kinds, -1):
        there = [(x + place * apart, kept.share) for x, point in zip(at, shown, strict=True) if (kept := of(point))]
        if there:
            values, bars = error_bars([share for _, share in there])
            axes.errorbar(
                [x for x, _ in there],
                values,
                yerr=bars,
                fmt=style if lines else style[0],
                color=colour,
                ms=4,
                lw=1.2,
                capsize=2.5,
                label=label,
            )


def _draw_models(axes: Any, found: Audit) -> None:
    kept: list[Interval] = [model.kept for model in found.models[1:] if model.kept is not None]
    values, bars = error_bars(kept)
    axes.errorbar(range(len(kept)), values, yerr=bars, fmt="o", color=BLUE, ms=4, capsize=2.5)
    names = [plain(model.name) for model in found.models[1:]]
    axes.set_xticks(range(len(kept)), names, rotation=60 if sum(map(len, names)) > _MOST_LETTERS else 0, fontsize=7)
    axes.set_xlim(-0.5, len(kept) - 0.5)
    _decorate(axes, found, "quantizations, unsteered")


def _decorate(axes: Any, found: Audit, title: str) -> None:
    axes.axhline(100 * found.level, color="#333333", lw=0.8, ls=":")
    axes.set_ylim(-3, 103)
    axes.set_ylabel("share kept, %", fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=7)
