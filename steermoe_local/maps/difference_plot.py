"""The picture of how far two maps agree."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._util.files import StrPath
from .colours import LEAST_EFFECT, LEAST_RD, MARKERS, NEGATIVE, NEUTRAL, POSITIVE
from .effect_comparison import compare_effects
from .effects import ACTIONS
from .expert_map import ExpertMap
from .picture import DPI, Spot, legend_below, plain, point, require_drawable, save, ticks
from .significance import compare, overlap


def plot_difference(one: ExpertMap, two: ExpertMap, path: StrPath, names: tuple[str, str], top_n: int = 20) -> None:
    """Draw the agreement of two maps: RD against RD, correlation by layer, overlap of the first experts.

    Where both have effects, also effect against effect of what both tried.

    Raises UsageError and ModelMismatchError as `plot_map` and `compare`.
    """
    require_drawable(path)
    from matplotlib.figure import Figure

    result = compare(one, two, top_n)
    a, b = (plain(name) for name in names)
    layers = list(result.layers)
    x, y = one.rd[layers], two.rd[layers]
    limit = max(1.05 * max(np.abs(x).max(), np.abs(y).max()), LEAST_RD)
    effects = compare_effects(one, two)
    figure = Figure(figsize=(17 if effects else 13, 5.7), dpi=DPI)
    widths = [1.15, 1, 1, 1.15] if effects else [1.15, 1, 1]
    grid = figure.add_gridspec(
        1, len(widths), width_ratios=widths, left=0.065, right=0.985, top=0.83, bottom=0.2, wspace=0.28
    )
    figure.suptitle(
        f"{a}  against  {b}\nPearson {result.pearson:+.3f}, Spearman {result.spearman:+.3f}, "
        f"first {result.top_n} experts shared {result.overlap:.0%} (by chance {result.chance:.1%})",
        fontsize=12,
        parse_math=False,
    )
    scatter, by_layer, shared = (figure.add_subplot(grid[0, column]) for column in range(3))
    scatter.axhline(0, color="#999999", lw=0.6)
    scatter.axvline(0, color="#999999", lw=0.6)
    scatter.plot([-limit, limit], [-limit, limit], color="#999999", lw=0.8, ls="--")
    scatter.scatter(x.ravel(), y.ravel(), s=9, color=NEGATIVE, alpha=0.45, lw=0)
    scatter.set(xlim=(-limit, limit), ylim=(-limit, limit), title="each expert")
    scatter.set_xlabel(f"RD, {plain(a, 32)}", parse_math=False)
    scatter.set_ylabel(f"RD, {plain(b, 32)}", parse_math=False)
    scatter.locator_params(nbins=5)
    by_layer.barh(layers, result.by_layer, color=NEGATIVE, height=0.75)
    by_layer.axvline(0, color="#333333", lw=0.6)
    low = min(0.0, *result.by_layer)
    by_layer.set(
        xlim=(1.05 * low if low < 0 else 0, 1.02), xlabel="correlation", ylabel="layer", title="Pearson by layer"
    )
    by_layer.set_ylim(layers[-1] + 0.6, layers[0] - 0.6)
    by_layer.set_yticks(ticks(layers[-1] + 1, 24))
    sizes = np.unique(np.geomspace(1, x.size, 40).astype(int))
    few: dict[str, Any] = {"marker": "o", "ms": 4} if len(sizes) < 4 else {}  # one point makes no line
    shared.plot(sizes, [overlap(x, y, int(n)) for n in sizes], color=NEGATIVE, lw=1.6, label="shared, same sign", **few)
    shared.plot(sizes, sizes / x.size / 2, color=NEUTRAL, lw=1, ls="--", label="by chance", **few)
    shared.set(xscale="log", xlim=(0.9, max(10.0, 1.1 * x.size)), ylim=(0, 1.03))
    shared.set(xlabel="first n experts by |RD|", ylabel="share", title="overlap")
    legend_below(shared, 2)
    tried = _effects(figure.add_subplot(grid[0, 3]), one, two, (a, b)) if effects else []

    def spots() -> list[Spot]:
        found = []
        for row, expert in np.ndindex(*x.shape):
            left, up = point(figure, scatter, float(x[row, expert]), float(y[row, expert]))
            words = f"layer {layers[row]}, expert {expert}: {x[row, expert]:+.4f} / {y[row, expert]:+.4f}"
            found.append((left - 2, up - 2, 4.0, 4.0, words))
        for value, other, words in tried:
            left, up = point(figure, figure.axes[3], value, other)
            found.append((left - 2, up - 2, 4.0, 4.0, words))
        return found

    save(figure, path, f"{a} against {b}", spots)


def _effects(axes: Any, one: ExpertMap, two: ExpertMap, names: tuple[str, str]) -> list[tuple[float, float, str]]:
    """Draw effect against effect of each action that both tried; returns (x, y, words) of the points."""
    assert one.effects is not None
    assert two.effects is not None
    found: list[tuple[float, float, str]] = []
    for (name, action), colour, marker in zip(ACTIONS.items(), (POSITIVE, NEGATIVE), MARKERS.values(), strict=True):
        x, y = (m.effects.table(action, "effect", m.identity.shape) for m in (one, two) if m.effects is not None)
        places = np.argwhere(~np.isnan(x) & ~np.isnan(y)).tolist()
        points = [(float(x[layer, expert]), float(y[layer, expert])) for layer, expert in places]
        found += [
            (*at, f"layer {layer}, expert {expert}, {name}: {at[0]:+.4f} / {at[1]:+.4f}")
            for at, (layer, expert) in zip(points, places, strict=True)
        ]
        axes.scatter(
            *zip(*points, strict=True) if points else ([], []),
            s=14,
            color=colour,
            marker=marker,
            alpha=0.6,
            lw=0,
            label=name,
        )
    limit = 1.05 * max((max(abs(x), abs(y)) for x, y, _ in found), default=1.0)
    limit = max(limit, LEAST_EFFECT)
    axes.axhline(0, color="#999999", lw=0.6)
    axes.axvline(0, color="#999999", lw=0.6)
    axes.plot([-limit, limit], [-limit, limit], color="#999999", lw=0.8, ls="--")
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), title="effects, nats a token")
    axes.set_xlabel(f"effect, {plain(names[0], 32)}", parse_math=False)
    axes.locator_params(nbins=5)
    legend_below(axes, 2)
    return found
