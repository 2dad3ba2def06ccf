"""The picture of effects by depth. Their report is that of the experiment `layers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..._util.files import StrPath
from ...maps.colours import LEAST_POINTS
from ..studies.layers import LayerEffects, LayerPart
from .figure import BLUE, RED, error_bars, legend_below, new_figure, save, widen
from .sweep import study_title


def draw_layers(result: LayerEffects, paths: Sequence[StrPath]) -> None:
    """Draw effects of the parts, with their intervals, to each of the paths (.png or .svg).

    Raises UsageError without matplotlib, or when a file cannot be written.
    """
    groups = [("alone, by third", result.of("third")), ("all but a third", result.of("without"))]
    groups.append(("alone, by layer", result.of("layer")))
    whole = result.of("whole")[0].effect.value
    size = (max(9.0, min(6.5 + 0.32 * len(result.of("layer")), 22.0)), 4.4)
    figure = new_figure(size, f"{study_title(result.metadata)}: effect by depth", fontsize=12, weight="bold")
    widths = [len(groups[0][1]) + 1.5, len(groups[1][1]) + 1.5, max(len(groups[2][1]) + 1.5, 5.0)]
    grid = figure.add_gridspec(1, len(groups), width_ratios=widths)
    first: Any = None
    for column, (words, parts) in enumerate(groups):
        axes = figure.add_subplot(grid[0, column], sharey=first)
        first = first or axes
        _bars(axes, parts, whole)
        axes.set_title(words, fontsize=10)
    first.set_ylabel("swing, points" if result.parts[0].both is not None else "effect, points")
    save(figure, paths)


def _bars(axes: Any, parts: Sequence[LayerPart], whole: float) -> None:
    values, bars = error_bars([part.effect for part in parts])
    axes.bar(range(len(parts)), values, yerr=bars, color=BLUE, width=0.7, error_kw={"elinewidth": 1, "capsize": 3})
    axes.axhline(0, color="#333333", lw=0.6)
    axes.axhline(100 * whole, color=RED, lw=1, ls="--", label="all layers")
    names = [part.name.removeprefix("layer ") for part in parts]
    axes.set_xticks(range(len(parts)), names, rotation=90 if len(parts) > 12 else 20 if len(names[0]) > 7 else 0)
    widen(axes, y=(0, LEAST_POINTS))
    legend_below(axes, fontsize=8)
