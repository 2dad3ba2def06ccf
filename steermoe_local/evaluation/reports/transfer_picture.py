"""The picture of a transfer: agreement with the base, effects, and text, by quantization. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..._util.files import StrPath
from ...errors import UsageError
from ..studies.transfer_results import Column, MapEffect, Transfer
from .pictures import missing_matplotlib, plain, save

__all__ = ["draw_transfer"]

_BLUE, _RED, _GREY = "#2166ac", "#b2182b", "#777777"  # as in pictures of maps
_DPI = 150


def draw_transfer(found: Transfer, paths: Sequence[StrPath]) -> None:
    """Draw to each of the paths, .png or .svg; models stand by falling bits per weight, the base first.

    Raises UsageError without matplotlib, or when it cannot be written.
    """
    if problem := missing_matplotlib():
        raise UsageError(problem)
    from matplotlib.figure import Figure

    columns = [found.base, *sorted(found.columns, key=lambda c: -c.file.bits_per_weight)]
    figure = Figure(figsize=(14, 4.6), dpi=_DPI, layout="constrained")
    agreement, effects, text = figure.subplots(1, 3)
    figure.suptitle(plain(f"{found.provenance['steering']['name']} over quantizations of {found.base.file.path.name}"))
    _draw_agreement(agreement, columns)
    _draw_effects(effects, columns)
    _draw_text(text, columns)
    names = [found.base.file.file_type, *(column.name for column in columns[1:])]
    labels = [f"{plain(name)}\n{c.file.bits_per_weight:.1f}" for name, c in zip(names, columns, strict=True)]
    for axes in (agreement, effects, text):
        axes.set_xticks(range(len(columns)), labels, fontsize=7)
        axes.set(xlim=(-0.5, len(columns) - 0.5))
        axes.set_xlabel("quantization, bits per weight (the first is the base)", fontsize=8)
    save(figure, paths)


def _draw_agreement(axes: Any, columns: Sequence[Column]) -> None:
    lines: list[tuple[str, Callable[[Column], float | None], str, str]] = [
        ("RD, Pearson", lambda c: c.map.pearson if c.map else None, _BLUE, "o-"),
        ("RD, Spearman", lambda c: c.map.spearman if c.map else None, _BLUE, "s--"),
        ("first experts shared", lambda c: c.map.overlap if c.map else None, _BLUE, "^:"),
        ("routing: overlap", lambda c: c.routing.overlap if c.routing else None, _RED, "o-"),
        ("routing: same sets", lambda c: c.routing.same_sets if c.routing else None, _RED, "s--"),
    ]
    low = 0.0
    for label, value, colour, style in lines:
        there = [(x, y) for x, column in enumerate(columns) if (y := value(column)) is not None]
        if there:
            axes.plot(*zip(*there, strict=True), style, color=colour, label=label, lw=1.2, ms=4)
            low = min(low, *(y for _, y in there))
    chance = next((c.routing.chance for c in columns if c.routing), None)
    if chance is not None:
        axes.axhline(chance, color=_GREY, lw=0.8, ls=":", label="overlap by chance")
    axes.set_ylim(1.05 * low, 1.05)
    axes.set_title("agreement with the base", fontsize=10)
    if axes.get_lines():
        axes.legend(fontsize=7, frameon=False, loc="lower left")


def _draw_effects(axes: Any, columns: Sequence[Column]) -> None:
    base = columns[0].effect.effect
    axes.axhspan(100 * base.low, 100 * base.high, color=_BLUE, alpha=0.1, lw=0)
    axes.axhline(0, color="#333333", lw=0.6)
    kinds: list[tuple[str, Callable[[Column], MapEffect | None], str, float]] = [
        ("the base's map", lambda c: c.effect, _BLUE, -0.12),
        ("its own map", lambda c: c.own_effect, _RED, 0.12),
    ]
    for label, of, colour, shift in kinds:
        there = [(x + shift, effect.effect) for x, column in enumerate(columns) if (effect := of(column))]
        if there:
            values = [100 * i.value for _, i in there]
            errors = [[100 * (i.value - i.low) for _, i in there], [100 * (i.high - i.value) for _, i in there]]
            axes.errorbar(
                [x for x, _ in there], values, yerr=errors, fmt="o", color=colour, ms=4, capsize=2.5, label=label
            )
    axes.set_title(f"{columns[0].effect.headline} in points, 95% intervals", fontsize=10)
    axes.legend(fontsize=7, frameon=False, loc="best")


def _draw_text(axes: Any, columns: Sequence[Column]) -> None:
    base = columns[0].perplexity
    handles: list[Any] = []
    if base is not None:
        there = [(x, c.perplexity / base) for x, c in enumerate(columns) if c.perplexity is not None]
        handles += axes.plot(*zip(*there, strict=True), "o-", color=_BLUE, lw=1.2, ms=4, label="perplexity / base's")
        values = [y for _, y in there]
        axes.set_ylim(min(0.99, *values) - 0.005, max(1.01, *values) + 0.005)  # no mountains out of a thousandth
        axes.set_ylabel("perplexity / base's", fontsize=8)
    kl = [(x, c.text.kl) for x, c in enumerate(columns) if c.text is not None]
    if kl:
        right = axes.twinx()
        handles += right.plot(*zip(*kl, strict=True), "s--", color=_RED, lw=1.2, ms=4, label="KL(base || model)")
        right.set_ylim(0, 1.08 * max(0.01, *(y for _, y in kl)))
        right.set_ylabel("KL, nats", fontsize=8)
        right.tick_params(labelsize=7)
    axes.tick_params(labelsize=7)
    axes.set_title("predictions, unsteered", fontsize=10)
    if handles:
        axes.legend(handles=handles, fontsize=7, frameon=False, loc="upper left")
