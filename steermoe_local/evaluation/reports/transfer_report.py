"""A `Transfer` in words and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..metrics.formatting import points
from ..metrics.intervals import Interval
from ..studies.quantize import ModelFile
from ..studies.transfer_results import Column, Transfer
from .report import Table, escape, how_to_repeat, markdown_table

__all__ = ["conclusions", "markdown", "rates", "table", "types"]

_CEILING = 0.98  # of 1: there is no room to see a difference


def table(found: Transfer) -> Table:
    """The one table: a row for each model; what nobody measured is no column."""
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
        (_headline(found), lambda c: points(c.effect.effect)),
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
    """The types that the tensors really have."""

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
    """What the figures say, in sentences; no more than they say."""
    base, name = found.base.effect.effect, _headline(found)
    lines = []
    if base.low <= 0 <= base.high:
        lines.append(f"On the base itself the {name} is not told from 0, so there is no effect that could carry over.")
    else:
        same = [c.name for c in found.columns if _sign(c.effect.effect) == _sign(base)]
        lines.append(
            f"The base's map keeps its {name} (same sign, 95% interval without 0) on {len(same)} of "
            f"{len(found.columns)} quantizations{_list(same, found)}."
        )
    if abs(base.value) >= _CEILING:
        lines.append(
            f"On the base the {name} is as large as it can be, so a little less or more strength on a quantization "
            "would not show; choose fewer experts to see it."
        )
    for words, sign in (("smaller", -1), ("larger", 1)):
        direction = sign if base.value >= 0 else -sign
        other = [c.name for c in found.columns if c.effect.change and _sign(c.effect.change) == direction]
        if other:
            lines.append(
                f"It is {words} than on the base (interval of the difference without 0) on {', '.join(other)}."
            )
    owns = [c for c in found.columns if c.own_gain]
    if owns:
        better = [c.name for c in owns if c.own_gain and _sign(c.own_gain) == (1 if base.value >= 0 else -1)]
        worse = [c.name for c in owns if c.own_gain and _sign(c.own_gain) == (-1 if base.value >= 0 else 1)]
        told = [f"does more than the base's on {', '.join(better)}"] if better else []
        told += [f"does less on {', '.join(worse)}"] if worse else []
        lines.append(
            f"A map made on the quantization itself {' and '.join(told)}."
            if told
            else "A map made on the quantization itself is not told from the base's on any of them."
        )
    if fell := [c for c in found.columns if c.file.n_fallback]:
        most = max(fell, key=lambda c: c.file.fallback_share)
        lines.append(
            f"Not every tensor has the type of the file's name: on {', '.join(c.name for c in fell)} rows that do not "
            f"fit its blocks got another type (up to {most.file.fallback_share:.0%} of the weights, {most.name}), so "
            "these files are milder quantizations than their names say."
        )
    return lines


def markdown(found: Transfer, command: str = "", pictures: Sequence[str] = ()) -> str:
    """The report. `command` makes it again; `pictures` are names of files beside it."""
    about, steering = found.provenance, found.provenance["steering"]
    parts = [f"# {escape(str(steering['name']))} over quantizations of {escape(found.base.file.path.name)}", ""]
    parts += [f"{escape(line)}\n" for line in conclusions(found)]
    parts += [f"**Note:** {escape(warning)}.\n" for warning in found.warnings]
    parts += [f"**Note:** {column.name}: {escape(note)}.\n" for column in _models(found) for note in column.notes]
    for part in (table(found), rates(found), types(found)):
        parts += [f"## {escape(part.title)}", "", markdown_table(part), ""]
        if part.title == "Base and quantizations":
            parts += [f"![{name}]({name})\n" for name in pictures]
    parts += [
        "Routers are never quantized: every file has the base's router hash, checked when it was made "
        f"({about['router_sha256'][:16]}...).",
        "",
    ]
    digests = {"base": about["base_sha256"], "map": steering["map_sha256"], "pairs": about["pairs_sha256"]}
    chosen = f"{steering['activate']} experts activated, {steering['deactivate']} deactivated"
    task = f"Task {escape(found.task)}; {chosen}; "
    return "\n".join([*parts, *how_to_repeat(command, about, digests, task)])


def _models(found: Transfer) -> list[Column]:
    return [found.base, *found.columns]


def _headline(found: Transfer) -> str:
    return found.base.effect.headline


def _sign(interval: Interval) -> int:
    """1 or -1 if 0 is outside the interval, else 0."""
    return int(interval.low > 0) - int(interval.high < 0)


def _list(names: Sequence[str], found: Transfer) -> str:
    return f" ({', '.join(names)})" if 0 < len(names) < len(found.columns) else ""
