"""The picture of an experiment: of each of them, from its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..._util.files import StrPath
from ...maps.colours import LEAST_POINTS
from ..measuring.json_values import from_plain
from ..reports.figure import BLUE, GREY, RED, legend_below, new_figure, plain, save, widen
from ..reports.layers import draw_layers
from ..studies.layers import LayerEffects
from .experiment import ExperimentResult

_MOST = 24  # characters of a name below an axis
_MOST_LETTERS = 36  # of all names side by side


def draw_experiment(result: ExperimentResult, paths: Sequence[StrPath]) -> None:
    """Draw an experiment to each of the paths (.png or .svg): `layers` by depth, `routing-kinds` by rule,
    `activate-benign` by what was promoted, the others' swing among their controls.

    Raises UsageError without matplotlib, or when a file cannot be written.
    """
    figures = result.figures
    if "divided" in figures:
        draw_layers(from_plain(LayerEffects, figures["divided"]), paths)
        return
    figure = new_figure((9, 4.4), f"{result.name}: {result.question}", fontsize=10)
    axes = figure.subplots(1, 2, width_ratios=[1, 1.6])
    if "rules" in figures:
        hard = figures["rules"]["hard"]
        _draw_rates(axes[0], hard["rates"])
        _draw_swings(axes[1], {name: found["swing"] for name, found in figures["rules"].items()})
    elif "effect" in figures:
        _draw_rates(axes[0], dict(list(figures["rates"].items())[:3]))
        _draw_rates(axes[1], figures["rates"])
    else:
        _draw_rates(axes[0], figures["rates"])
        controls = figures.get("controls") or {"random": figures["random"]}
        _draw_controls(axes[1], figures["swing"], controls)
    save(figure, paths)


def _names(axes: Any, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), [plain(name, _MOST) for name in names])
    if len(names) > 4 or sum(map(len, names)) > _MOST_LETTERS:
        axes.tick_params(axis="x", rotation=60, labelsize=8)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", alpha=0.3)


def _draw_rates(axes: Any, rates: Mapping[str, float]) -> None:
    """Rates as bars; hatched where it is steered to the other side."""
    for x, (name, value) in enumerate(rates.items()):
        other = name in ("away", "other side")
        colour = BLUE if other else RED if name == "towards" else GREY
        axes.bar(x, 100 * value, color=colour, hatch="////" if other else None, edgecolor="white", linewidth=0)
    axes.set(ylim=(0, 104), ylabel="share on the positive side, %")
    _names(axes, list(rates))


def _draw_swings(axes: Any, swings: Mapping[str, Mapping[str, float]]) -> None:
    for x, found in enumerate(swings.values()):
        value, low, high = (100 * found[name] for name in ("value", "low", "high"))
        axes.errorbar(x, value, yerr=[[max(0, value - low)], [max(0, high - value)]], fmt="o", color=RED, capsize=3)
    axes.axhline(0, color="#333333", lw=0.6)
    axes.set_ylabel("swing, points (95% intervals)")
    _names(axes, list(swings))
    widen(axes, y=(-LEAST_POINTS, LEAST_POINTS))


def _draw_controls(axes: Any, swing: Mapping[str, float], controls: Mapping[str, Mapping[str, Any]]) -> None:
    axes.axhspan(100 * swing["low"], 100 * swing["high"], color=RED, alpha=0.15, lw=0)
    axes.axhline(100 * swing["value"], color=RED, label="swing of the map, 95% interval")
    axes.axhline(0, color="#333333", lw=0.6)
    rng = np.random.default_rng(0)  # only to draw equal points side by side
    for x, control in enumerate(controls.values()):
        across = x + rng.uniform(-0.2, 0.2, len(control["effects"]))
        axes.plot(across, 100 * np.asarray(control["effects"]), "o", ms=3.5, color=GREY, alpha=0.7)
    axes.set_ylabel("swing, points")
    _names(axes, [f"{kind} ({len(control['effects'])})" for kind, control in controls.items()])
    widen(axes, y=(-LEAST_POINTS, LEAST_POINTS))
    legend_below(axes, fontsize=8)
