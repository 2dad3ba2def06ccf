"""The picture of RD against the effects of interventions."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._util.files import StrPath
from .colours import LEAST_EFFECT, LEAST_RD, NEGATIVE, RANDOM
from .effects import ACTIONS, Effects
from .expert_map import ExpertMap
from .picture import DPI, Spot, legend_below, plain, point, require_drawable, save, widen
from .plots import effect_words, write_title
from .ranks import require_effects
from .significance import t_quantile

_NORMAL = t_quantile(0.95, 10_000)


def plot_effects(expert_map: ExpertMap, path: StrPath, top: int = 20) -> None:
    """Draw each tried expert, RD against effect, the actions side by side: what only differs lies on the middle line.

    Bars are 95% confidence intervals, 1.96 standard errors. Random controls have another colour, effects that are not
    significant are hollow, and the first `top` significant ones are named. The suffix of `path` selects the format:
    .png, .svg or .html.

    Raises UsageError for a map without effects, for another suffix, without matplotlib, or when the file cannot be
    written.
    """
    require_drawable(path)
    effects = require_effects(expert_map, "picture of effects")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.9), dpi=DPI)
    write_title(figure, expert_map, 6.9)
    tried = [(name, action) for name, action in ACTIONS.items() if action in effects.action]
    grid = figure.add_gridspec(1, len(tried), left=0.07, right=0.985, top=0.84, bottom=0.17, wspace=0.06)
    rd = expert_map.rd[effects.layer, effects.expert]
    across = max(1.08 * float(np.abs(rd).max()), LEAST_RD)
    named = [index for index in effects.first(top).tolist() if effects.significant[index]]
    panels: list[Any] = []
    for column, (name, action) in enumerate(tried):
        axes = figure.add_subplot(grid[0, column], sharey=panels[0] if panels else None)
        _points(axes, effects, action, rd)
        for index in (index for index in named if effects.action[index] == action):
            axes.annotate(
                f"L{effects.layer[index]} E{effects.expert[index]}",
                (rd[index], effects.effect[index]),
                xytext=(-5 if rd[index] > 0.7 * across else 5, 3),
                textcoords="offset points",
                ha="right" if rd[index] > 0.7 * across else "left",
                fontsize=7,
                color="#444444",
            )
        axes.axhline(0, color="#999999", lw=0.6, zorder=0)
        axes.axvline(0, color="#999999", lw=0.6, zorder=0)
        axes.set(xlim=(-across, across), xlabel="RD")
        facts = effects.facts
        axes.set_title(f"{name}: R2 {facts.r2[name]:.2f} on held-out draws", fontsize=10, loc="left")
        if column:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel("effect, nats a token (95% intervals)")
        panels.append(axes)
    widen(panels[0], y=(-LEAST_EFFECT, LEAST_EFFECT))
    for axes in panels:
        legend_below(axes, 2, fontsize=8)

    def spots() -> list[Spot]:
        found = []
        for axes, (name, action) in zip(panels, tried, strict=True):
            for index in np.flatnonzero(effects.action == action).tolist():
                layer, expert = int(effects.layer[index]), int(effects.expert[index])
                left, up = point(figure, axes, float(rd[index]), float(effects.effect[index]))
                words = f"layer {layer}, expert {expert}: RD {rd[index]:+.4f}"
                found.append((left - 3, up - 3, 6.0, 6.0, words + effect_words(expert_map, layer, expert, name)))
        return found

    save(figure, path, plain(expert_map.behaviour), spots)


def _points(axes: Any, effects: Effects, action: int, rd: Any) -> None:
    for control, colour, words in ((False, NEGATIVE, "first by RD"), (True, RANDOM, "random control")):
        for significant in (True, False):
            rows = (effects.action == action) & (effects.control == control) & (effects.significant == significant)
            if not rows.any():
                continue
            axes.errorbar(
                rd[rows], effects.effect[rows], yerr=_NORMAL * effects.effect_se[rows], fmt="none", ecolor=colour,
                elinewidth=0.8, alpha=0.5,
            )  # fmt: skip
            axes.scatter(
                rd[rows], effects.effect[rows], s=22, facecolors=colour if significant else "white", edgecolors=colour,
                linewidths=1, zorder=3, label=f"{words}, {'' if significant else 'not '}significant: {rows.sum()}",
            )  # fmt: skip
