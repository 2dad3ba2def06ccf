"""The report of a transfer: tables, conclusions, Markdown, and its picture by quantization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..._util.files import StrPath
from ...maps.colours import LEAST_POINTS
from ..metrics.formatting import points
from ..metrics.intervals import Interval
from ..studies.transfer.quantize import ModelFile
from ..studies.transfer.results import Column, MapEffect, Transfer
from .document import Block, Document, Table, Words, how_to_repeat, sections
from .figure import BLUE, GREY, RED, error_bars, legend_below, new_figure, plain, save, widen
from .verdicts import of_transfer

_MOST_LETTERS = 44  # of the names below an axis, side by side

_CEILING = 0.98  # of 1: there is no room to see a difference


def table(found: Transfer) -> Table:
    """The main table: a row for each model; what was not measured has no column."""
    top_n = next((c.map.top_n for c in _models(found) if c.map), 0)
    cells: list[tuple[str, Callable[[Column], str]]] = [
        ("model", lambda c: c.name if c.file.file_type == c.name else f"{c.name} ({c.file.file_type})"),
        ("MB", lambda c: f"{c.file.size_bytes / 1e6:,.1f}"),
        ("bits/weight", lambda c: f"{c.file.bits_per_weight:.2f}"),
        ("RD Pearson", lambda c: "" if c.map is None else f"{c.map.pearson:.3f}"),
        ("Spearman", lambda c: "" if c.map is None else f"{c.map.spearman:.3f}"),
        (f"top {top_n}", lambda c: "" if c.map is None else f"{c.map.overlap:.0%}"),
        ("same sets", lambda c: "" if c.routing is None else f"{c.routing.same_sets:.1%}"),
        ("overlap", lambda c: "" if c.routing is None else f"{c.routing.overlap:.1%}"),
        ("KL", lambda c: "" if c.text is None else f"{c.text.kl:.4f}"),
        ("perplexity", lambda c: "" if c.perplexity is None else f"{c.perplexity:.3f}"),
        (found.base.effect.headline, lambda c: points(c.effect.effect)),
        ("less base's", lambda c: "" if c.effect.change is None else points(c.effect.change)),
        ("by own map", lambda c: "" if c.own_effect is None else points(c.own_effect.effect)),
    ]
    rows = [[cell(column) for _, cell in cells] for column in _models(found)]
    kept = [index for index in range(len(cells)) if any(row[index] for row in rows)]
    return Table(
        "Base and quantizations",
        tuple(cells[index][0] for index in kept),
        tuple(tuple(row[index] for index in kept) for row in rows),
        _note(found),
    )


def _note(found: Transfer) -> str:
    notes = ["effects in points with 95% intervals over the items"]
    if any(column.map for column in _models(found)):
        notes.append("RD, top: the model's own map against the map that is tested")
    if routing := next((c.routing for c in found.columns if c.routing), None):
        notes.append(
            f"same sets, overlap: routing against the base's on {routing.n_tokens} tokens x {routing.n_layers} layers, "
            f"overlap by chance {routing.chance:.0%}"
        )
        notes.append("KL(base || model) in nats")
    return "; ".join(notes)


def rates(found: Transfer) -> Table:
    """Rates of the sides by both maps, and the failure signatures."""
    sides = list(found.base.effect.rates)
    rows = []
    for column in _models(found):
        for words, effect in (("base's", column.effect), ("own", column.own_effect)):
            if effect is not None:
                cells = [str(effect.rates[side]) if side in effect.rates else "" for side in sides]
                rows.append((column.name, words, *cells, "; ".join(effect.signatures)))
    return Table("Rates", ("model", "map", *sides, "failure signatures"), tuple(rows))


def types(found: Transfer) -> Table:
    """The types of the tensors in each file."""

    def shares(file: ModelFile) -> str:
        return ", ".join(f"{name} {share.tensors} ({share.share:.1%})" for name, share in file.types.items())

    rows = [
        (
            column.name,
            shares(column.file),
            f"{column.file.n_fallback} ({column.file.fallback_share:.0%})" if column.file.n_fallback else "",
        )
        for column in _models(found)
    ]
    return Table(
        "Types that the tensors have",
        ("model", "types: tensors (share of the weights)", "fell back"),
        tuple(rows),
        "fell back: tensors whose rows do not fit the blocks of the type that was asked for",
    )


def conclusions(found: Transfer) -> list[str]:
    """Conclusions from the figures, in sentences."""
    base, name = found.base.effect.effect, found.base.effect.headline
    lines = []
    if base.low <= 0 <= base.high:
        lines.append(f"On the base itself the {name} is not told from 0, so there is no effect that could carry over.")
    else:
        same = [c.name for c in found.columns if _sign(c.effect.effect) == _sign(base)]
        names = f" ({', '.join(same)})" if 0 < len(same) < len(found.columns) else ""
        lines.append(
            f"The base's map keeps its {name} (same sign, 95% interval without 0) on {len(same)} of "
            f"{len(found.columns)} quantizations{names}."
        )
    if abs(base.value) >= _CEILING:
        lines.append(
            f"On the base the {name} is as large as it can be, so a little less or more strength on a quantization "
            "would not show; choose fewer experts to see it."
        )
    direction = 1 if base.value >= 0 else -1

    def changed(value: Callable[[Column], Interval | None], sign: int) -> str:
        """Quantizations on which the effect is certainly stronger (sign 1) or weaker (-1)."""
        return ", ".join(c.name for c in found.columns if (x := value(c)) and _sign(x) == sign * direction)

    for words, sign in (("smaller", -1), ("larger", 1)):
        if names := changed(lambda c: c.effect.change, sign):
            lines.append(f"It is {words} than on the base (interval of the difference without 0) on {names}.")
    if any(c.own_gain for c in found.columns):
        better, worse = (changed(lambda c: c.own_gain, sign) for sign in (1, -1))
        told = [f"does more than the base's on {better}"] if better else []
        told += [f"does less on {worse}"] if worse else []
        words = " and ".join(told) or "is not told from the base's on any of them"
        lines.append(f"A map made on the quantization itself {words}.")
    if fell := [c for c in found.columns if c.file.n_fallback]:
        most = max(fell, key=lambda c: c.file.fallback_share)
        lines.append(
            f"Not every tensor has the type of the file's name: on {', '.join(c.name for c in fell)} rows that do not "
            f"fit its blocks got another type (up to {most.file.fallback_share:.0%} of the weights, {most.name}), so "
            "these files are milder quantizations than their names say."
        )
    return lines


def document(found: Transfer, command: str = "", pictures: Sequence[str] = ()) -> Document:
    """The report. `command` makes it again; `pictures` are names of files in the same folder."""
    metadata, steering = found.provenance, found.provenance["steering"]
    digests = {"base": metadata["base_sha256"], "map": steering["map_sha256"], "pairs": metadata["pairs_sha256"]}
    chosen = f"{steering['activate']} experts activated, {steering['deactivate']} deactivated"
    chosen += f" by {steering['rank']}" if "rank" in steering else ""
    routers = (
        "Routers are never quantized: every file has the base's router hash, checked when it was made "
        f"({metadata['router_sha256'][:16]}...)."
    )
    blocks: list[Block] = [
        *map(Words, conclusions(found)),
        *(Words(f"{warning}.", lead="Note") for warning in found.warnings),
        *(Words(f"{column.name}: {note}.", lead="Note") for column in _models(found) for note in column.notes),
        *sections([table(found)]),
        *sections([rates(found), types(found)], pictures),
        Words(routers),
        *how_to_repeat(command, metadata, digests, f"Task {found.task}; {chosen}; "),
    ]
    title = f"{steering['name']} over quantizations of {found.base.file.path.name}"
    return Document(title, of_transfer(found), tuple(blocks))


def _models(found: Transfer) -> list[Column]:
    return [found.base, *found.columns]


def _sign(interval: Interval) -> int:
    """1 or -1 if 0 is outside the interval, else 0."""
    return int(interval.low > 0) - int(interval.high < 0)


#
# the picture
#


def draw_transfer(found: Transfer, paths: Sequence[StrPath]) -> None:
    """Draw to each of the paths (.png or .svg): agreement, effects and text, by falling bits per weight from the base.

    Raises UsageError without matplotlib, or when it cannot be written.
    """
    columns = [found.base, *sorted(found.columns, key=lambda c: -c.file.bits_per_weight)]
    title = f"{found.provenance['steering']['name']} over quantizations of {found.base.file.path.name}"
    figure = new_figure((14, 5.1), title, dpi=150)
    agreement, effects, text = figure.subplots(1, 3)
    _draw_agreement(agreement, columns)
    _draw_effects(effects, columns)
    handles = _draw_text(text, columns)
    names = [found.base.file.file_type, *(column.name for column in columns[1:])]
    labels = [f"{plain(name)}\n{c.file.bits_per_weight:.1f}" for name, c in zip(names, columns, strict=True)]
    for axes in (agreement, effects, text):
        axes.set_xticks(range(len(columns)), labels, fontsize=7)
        if sum(max(map(len, label.split("\n"))) for label in labels) > _MOST_LETTERS:
            axes.tick_params(axis="x", rotation=60)
        axes.set(xlim=(-0.5, len(columns) - 0.5))
        axes.set_xlabel("quantization, bits per weight (the first is the base)", fontsize=8)
    for axes in (agreement, effects):
        if axes.get_legend_handles_labels()[1]:
            legend_below(axes, 2, fontsize=7)
    if handles:
        legend_below(text, 2, handles=handles, fontsize=7)
    save(figure, paths)


def _draw_agreement(axes: Any, columns: Sequence[Column]) -> None:
    lines: list[tuple[str, Callable[[Column], float | None], str, str]] = [
        ("RD, Pearson", lambda c: c.map.pearson if c.map else None, BLUE, "o-"),
        ("RD, Spearman", lambda c: c.map.spearman if c.map else None, BLUE, "s--"),
        ("first experts shared", lambda c: c.map.overlap if c.map else None, BLUE, "^:"),
        ("routing: overlap", lambda c: c.routing.overlap if c.routing else None, RED, "o-"),
        ("routing: same sets", lambda c: c.routing.same_sets if c.routing else None, RED, "s--"),
    ]
    low = 0.0
    for label, value, colour, style in lines:
        there = [(x, y) for x, column in enumerate(columns) if (y := value(column)) is not None]
        if there:
            axes.plot(*zip(*there, strict=True), style, color=colour, label=label, lw=1.2, ms=4)
            low = min(low, *(y for _, y in there))
    chance = next((c.routing.chance for c in columns if c.routing), None)
    if chance is not None:
        axes.axhline(chance, color=GREY, lw=0.8, ls=":", label="overlap by chance")
    axes.set_ylim(1.05 * low, 1.05)
    axes.set_title("agreement with the base", fontsize=10)


def _draw_effects(axes: Any, columns: Sequence[Column]) -> None:
    base = columns[0].effect.effect
    axes.axhspan(100 * base.low, 100 * base.high, color=BLUE, alpha=0.1, lw=0)
    axes.axhline(0, color="#333333", lw=0.6)
    kinds: list[tuple[str, Callable[[Column], MapEffect | None], str, float]] = [
        ("the base's map", lambda c: c.effect, BLUE, -0.12),
        ("its own map", lambda c: c.own_effect, RED, 0.12),
    ]
    for label, of, colour, shift in kinds:
        there = [(x + shift, effect.effect) for x, column in enumerate(columns) if (effect := of(column))]
        if there:
            values, bars = error_bars([interval for _, interval in there])
            axes.errorbar(
                [x for x, _ in there], values, yerr=bars, fmt="o", color=colour, ms=4, capsize=2.5, label=label
            )
    axes.set_title(f"{columns[0].effect.headline} in points, 95% intervals", fontsize=10)
    widen(axes, y=(-LEAST_POINTS, LEAST_POINTS))


def _draw_text(axes: Any, columns: Sequence[Column]) -> list[Any]:
    base = columns[0].perplexity
    handles: list[Any] = []
    if base is not None:
        there = [(x, c.perplexity / base) for x, c in enumerate(columns) if c.perplexity is not None]
        handles += axes.plot(*zip(*there, strict=True), "o-", color=BLUE, lw=1.2, ms=4, label="perplexity / base's")
        values = [y for _, y in there]
        axes.set_ylim(min(0.99, *values) - 0.005, max(1.01, *values) + 0.005)  # no mountains out of a thousandth
        axes.set_ylabel("perplexity / base's", fontsize=8)
    kl = [(x, c.text.kl) for x, c in enumerate(columns) if c.text is not None]
    if kl:
        right = axes.twinx()
        handles += right.plot(*zip(*kl, strict=True), "s--", color=RED, lw=1.2, ms=4, label="KL(base || model)")
        right.set_ylim(0, 1.08 * max(0.01, *(y for _, y in kl)))
        right.set_ylabel("KL, nats", fontsize=8)
        right.tick_params(labelsize=7)
    axes.tick_params(labelsize=7)
    axes.set_title("predictions, unsteered", fontsize=10)
    return handles
