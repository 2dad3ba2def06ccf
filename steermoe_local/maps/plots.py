"""The picture of a map: heatmaps, RD by depth, the first experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._util.files import StrPath
from .colours import HATCH, LEAST_EFFECT, LEAST_RD, MARKERS, NEGATIVE, NOTHING, POSITIVE, SCALE
from .effects import ACTIONS
from .expert_map import ExpertMap
from .picture import DPI, Spot, plain, point, require_drawable, save, ticks, widen
from .significance import half_widths


def plot_map(expert_map: ExpertMap, path: StrPath, signs: npt.NDArray[np.int8] | None = None, top: int = 20) -> None:
    """Draw a map: layers x experts, RD by depth, the effects if there are any, and the `top` experts by |RD|.

    `signs` [n_layer, n_expert] marks chosen experts: +1 promoted, -1 suppressed. The suffix of `path` selects the
    format: .png, .svg or .html.

    Raises UsageError for another suffix, without matplotlib, or when the file cannot be written.
    """
    require_drawable(path)
    from matplotlib.figure import Figure

    n_layer = expert_map.identity.n_layer
    rows = min(max(2.4, 0.21 * n_layer), 8.5)
    top = min(top, expert_map.rd.size)
    with_effects = expert_map.effects is not None
    height = 2 * rows + 6.3 if with_effects else rows + 4.9
    figure = Figure(figsize=(13, height), dpi=DPI)
    grid = figure.add_gridspec(
        3 if with_effects else 2,
        3,
        height_ratios=[rows, rows, 2.6] if with_effects else [rows, 2.6],
        width_ratios=[10, 2.2, 0.22],
        left=0.06,
        right=0.945,
        top=1 - 0.95 / height,
        bottom=0.85 / height,
        hspace=0.95 / ((2 * rows + 2.6) / 3 if with_effects else (rows + 2.6) / 2),
        wspace=0.065,
    )
    heat = figure.add_subplot(grid[0, 0])
    depth = figure.add_subplot(grid[0, 1], sharey=heat)
    write_title(figure, expert_map, height)
    image = _heatmap(heat, expert_map)
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[0, 2]))
    bar.set_label("RD")
    if signs is not None:
        _mark(heat, signs)
    _by_depth(depth, expert_map.rd)
    heats = [heat, *(_effect_heatmaps(figure, grid[1, :], expert_map) if with_effects else [])]
    _top_experts(figure.add_subplot(grid[-1, :]), expert_map, top)

    def spots() -> list[Spot]:
        return [spot for axes in heats for spot in _cells(figure, axes, expert_map, signs)]

    save(figure, path, plain(expert_map.behaviour), spots)


def _counted(expert_map: ExpertMap) -> str:
    """Pairs and tokens in words; an imported ranking does not tell its pairs."""
    pairs = f"{expert_map.n_pairs} pairs" if expert_map.n_pairs else "unknown number of pairs"
    tokens = f"{expert_map.n1:,} / {expert_map.n2:,}" if expert_map.n1 and expert_map.n2 else "unknown number of"
    return f"{pairs}, {tokens} target tokens"


def write_title(figure: Any, expert_map: ExpertMap, height: float) -> None:
    """Write what a map is of over a figure that is `height` inches high."""
    sides = f"  ({plain(expert_map.positive)} / {plain(expert_map.negative)})" if expert_map.positive else ""
    facts = f"{expert_map.identity.short}, {_counted(expert_map)}"
    if expert_map.confidence is not None and not expert_map.confidence.differs_from_shuffled:
        facts += "; does NOT differ from shuffled pairs"
    title = (plain(expert_map.behaviour) or "expert map") + sides
    figure.text(0.06, 1 - 0.3 / height, title, fontsize=14, weight="bold", va="center", parse_math=False)
    figure.text(0.06, 1 - 0.58 / height, facts, fontsize=10, color="#444444", va="center", parse_math=False)


def _heatmap(axes: Any, expert_map: ExpertMap) -> Any:
    from matplotlib import colormaps

    n_layer, n_expert = expert_map.identity.shape
    colours = colormaps[SCALE].with_extremes(bad=NOTHING)
    routed: npt.NDArray[np.bool_] = np.any(expert_map.rd, axis=1)
    if expert_map.a1 is not None:
        routed = routed | np.any(expert_map.a1, axis=1)
    shown = np.ma.masked_array(expert_map.rd, np.broadcast_to(~routed[:, None], expert_map.rd.shape))
    limit = max(float(np.abs(expert_map.rd).max()), LEAST_RD)
    image = axes.imshow(shown, cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_xticks(ticks(n_expert, 32 if n_expert <= 100 else 22))
    axes.set_yticks(ticks(n_layer, 24))
    axes.set_title("risk difference" + ("" if routed.all() else " (grey: no router)"), fontsize=10, loc="left")
    return image


def _effect_heatmaps(figure: Any, place: Any, expert_map: ExpertMap) -> list[Any]:
    """A heatmap of the effects of each action that was tried, with a dot on those that are significant."""
    from matplotlib import colormaps

    effects, shape = expert_map.effects, expert_map.identity.shape
    assert effects is not None
    tried = [(name, action) for name, action in ACTIONS.items() if action in effects.action]
    inner = place.subgridspec(1, len(tried) + 1, width_ratios=[6.2 if len(tried) > 1 else 12.4] * len(tried) + [0.22])
    colours = colormaps[SCALE].with_extremes(bad=NOTHING)
    limit = max(float(np.abs(effects.effect).max()), LEAST_EFFECT)
    drawn = []
    for column, (name, action) in enumerate(tried):
        axes = figure.add_subplot(inner[0, column])
        shown = np.ma.masked_invalid(effects.table(action, "effect", shape))
        image = axes.imshow(shown, cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        layers, experts = np.nonzero(effects.table(action, "significant", shape) == 1)
        size = float(np.clip(700 / shape[1], 3, 20))
        axes.scatter(experts, layers, s=size, c="black", edgecolors="white", linewidths=0.4)
        axes.set(xlabel="expert", ylabel="" if column else "layer")
        axes.set_xticks(ticks(shape[1], 16 if len(tried) > 1 else 32))
        axes.set_yticks(ticks(shape[0], 24))
        title = f"effect: {name} (grey: not tried; dot: significant)"
        axes.set_title(title, fontsize=10, loc="left")
        drawn.append(axes)
    figure.colorbar(image, cax=figure.add_subplot(inner[0, len(tried)])).set_label("nats a token")
    return drawn


def _mark(axes: Any, signs: npt.NDArray[np.int8]) -> None:
    n_expert = signs.shape[1]
    size = float(np.clip(2200 / n_expert, 26, 70))
    for sign, (words, marker) in zip((1, -1), MARKERS.items(), strict=True):
        layers, experts = np.nonzero(signs == sign)
        if len(layers):
            axes.scatter(
                experts, layers, s=size, marker=marker, c="black" if sign > 0 else "white",
                edgecolors="white" if sign > 0 else "black", linewidths=0.6 if sign > 0 else 1.1, clip_on=False,
                label=f"{words}: {len(layers)}",
            )  # fmt: skip
    if signs.any():
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=2,
            frameon=False,
            borderaxespad=0.1,
            fontsize=9,
            handletextpad=0,
        )


def _by_depth(axes: Any, rd: npt.NDArray[np.float64]) -> None:
    layers = np.arange(len(rd))
    axes.barh(layers, np.abs(rd).max(axis=1), height=0.8, color="#bdbdbd", label="max")
    axes.barh(layers, np.abs(rd).mean(axis=1), height=0.8, color="#404040", label="mean")
    axes.tick_params(labelleft=False)
    axes.set_xlabel("|RD|")
    axes.set_xlim(left=0)
    widen(axes, x=(0, LEAST_RD))
    axes.locator_params(axis="x", nbins=3)
    axes.set_title("by depth", fontsize=10, loc="left")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.04, 1), ncols=2, frameon=False, fontsize=8, borderaxespad=0.1,
        handlelength=0.8, handletextpad=0.3, columnspacing=0.7,
    )  # fmt: skip


def _top_experts(axes: Any, expert_map: ExpertMap, top: int) -> None:
    cells = expert_map.top(top)
    values = [value for _, _, value in cells]
    errors = None
    words = "first experts by |RD|"
    if expert_map.se is not None and expert_map.confidence is not None:
        half = half_widths(expert_map.se, expert_map.confidence.n_pairs)
        # no bar where there is no spread, which does not mean an exact value
        errors = [half[layer, expert] or np.nan for layer, expert, _ in cells]
        words += ", with 95% confidence intervals"
    bars = axes.bar(
        range(top), values, color=[POSITIVE if value > 0 else NEGATIVE for value in values], yerr=errors, width=0.75,
        error_kw={"elinewidth": 1, "capsize": 2.5},
    )  # fmt: skip
    for bar, value in zip(bars, values, strict=True):
        if value < 0:
            bar.set(hatch=HATCH, edgecolor="white", linewidth=0)
    axes.axhline(0, color="#333333", lw=0.6)
    axes.set_xticks(range(top), [f"L{layer} E{expert}" for layer, expert, _ in cells], fontsize=8)
    axes.tick_params(axis="x", rotation=60 if top > 12 else 0)
    axes.set(xlim=(-0.7, top - 0.3), ylabel="RD")
    widen(axes, y=(-LEAST_RD if min(values) < 0 else 0, LEAST_RD if max(values) > 0 else 0))
    axes.set_title(words, fontsize=10, loc="left")


def _cells(figure: Any, axes: Any, expert_map: ExpertMap, signs: npt.NDArray[np.int8] | None) -> list[Spot]:
    spots = []
    rates = expert_map.a1 is not None and expert_map.a2 is not None
    for layer, expert in np.ndindex(*expert_map.rd.shape):
        left, up = point(figure, axes, expert - 0.5, layer - 0.5)
        right, down = point(figure, axes, expert + 0.5, layer + 0.5)
        words = f"layer {layer}, expert {expert}: RD {expert_map.rd[layer, expert]:+.4f}"
        if rates and expert_map.a1 is not None and expert_map.a2 is not None:
            p1, p2 = expert_map.a1[layer, expert] / expert_map.n1, expert_map.a2[layer, expert] / expert_map.n2
            words += f" ({p1:.4f} / {p2:.4f})"
        words += effect_words(expert_map, layer, expert)
        if signs is not None and signs[layer, expert]:
            words += ", promoted" if signs[layer, expert] > 0 else ", suppressed"
        spots.append((left, up, right - left, down - up, words))
    return spots


def effect_words(expert_map: ExpertMap, layer: int, expert: int, only: str | None = None) -> str:
    """What is known of an expert's effects, to follow its RD: those of both actions, or of `only` one."""
    if expert_map.effects is None:
        return ""
    words = ""
    for name, row in expert_map.effects.at(layer, expert).items():
        if only in (None, name):
            star = "significant" if row["significant"] else "not significant"
            words += f"; {name}: effect {row['effect']:+.4f}, se {row['effect_se']:.4f}, {star}"
            words += f", cost {row['cost']:.4f}" if "cost" in row else ""
            words += ", random control" if row["control"] else ""
    return words
