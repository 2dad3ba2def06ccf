"""Pictures of sweeps, searches and layers, as PNG and SVG. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..._util.files import StrPath
from ...errors import UsageError
from ..studies.layers import LayerEffects, LayerPart
from ..studies.objective import cost_of
from ..studies.sweep import Point, Sweep
from ..studies.tune import Tuning
from .pictures import missing_matplotlib, plain, save

__all__ = ["draw_layers", "draw_sweep", "draw_tuning"]

_DPI = 160
_RED, _BLUE, _GREY = "#b2182b", "#2166ac", "#999999"
_COSTS = {"ppl": "perplexity of the neutral text, increase in %", "kl": "KL from the unsteered model, nats"}
_NAMED = 8  # marks with their numbers beside them; more would cover each other


def draw_sweep(result: Sweep, paths: Sequence[StrPath]) -> bool:
    """Gain against cost, one panel a direction, the front marked. False: the cost was not measured, nothing is drawn.

    Raises UsageError without matplotlib, or when a file cannot be written.
    """
    ways = sorted({point.choice.reverse for point in result.points})
    shown = {way: [p for p in result.points if p.choice.reverse == way and p.front is not None] for way in ways}
    if not any(shown.values()):
        return False
    figure = _figure((6.6 * len(ways), 4.9), f"{_task(result.about)}: effect against its price")
    for column, way in enumerate(ways, 1):
        axes = figure.add_subplot(1, len(ways), column)
        side = _side(result.about, way)
        _front(axes, result, shown[way])
        axes.set_title(plain(f"steered to {side}") if side else "steered", fontsize=10)
        axes.set(xlabel=_COSTS[result.cost], ylabel="gain over unsteered, points")
    save(figure, paths)
    return True


def _front(axes: Any, result: Sweep, points: Sequence[Point]) -> None:
    scale = 100 if result.cost == "ppl" else 1

    def at(point: Point) -> tuple[float, float]:
        return scale * (cost_of(point.fluency, result.cost) or 0.0), 100 * point.gain

    spots = [at(point) for point in points]
    sizes = [point.n_active + point.n_inactive for point in points]
    axes.axhline(0, color=_GREY, lw=0.6)
    axes.axvline(0, color=_GREY, lw=0.6)
    found = axes.scatter(*zip(*spots, strict=True), c=sizes, cmap="viridis_r", s=24, lw=0, alpha=0.85, zorder=2)
    axes.figure.colorbar(found, ax=axes, label="experts steered", pad=0.02)
    best = sorted({(*at(point), _numbers(point)) for point in points if point.front})
    axes.plot(
        [x for x, _, _ in best], [y for _, y, _ in best], color=_RED, lw=1.2, marker="o", mfc="none", ms=8, zorder=3,
        label="front",
    )  # fmt: skip
    step = max(1, -(-len(best) // _NAMED))
    for x, y, words in [*best[:-1:step], *best[-1:]]:
        axes.annotate(words, (x, y), textcoords="offset points", xytext=(6, -11), fontsize=8, color=_RED)
    # a choice that wrecks the text would squeeze all others into a line
    if len(spots) > 1 and max(x for x, _ in spots) > 20 * scale / 100 and min(x for x, _ in spots) >= -scale:
        axes.set_xscale("symlog", linthresh=scale / 100)
    axes.legend(frameon=False, loc="lower right")


def _numbers(point: Point) -> str:
    choice = point.choice
    words = f"+{choice.activate} -{choice.deactivate}"
    words += f" L{choice.layers}" if choice.layers is not None else ""
    return words + (f" x{choice.scale:g}" if choice.scale is not None else "")


def draw_tuning(result: Tuning, paths: Sequence[StrPath]) -> None:
    """What was looked at: gain by the numbers of experts, what broke the budget, and the pick.

    Raises UsageError without matplotlib, or when a file cannot be written.
    """
    side = _side(result.about, bool(result.about["steering"]["reverse"]))
    figure = _figure((7.4, 5.6), f"{_task(result.about)}{f': steered to {side}' if side else ''}")
    axes = figure.add_subplot()
    inside = [trial for trial in result.trials if trial.gain is not None]
    outside = [trial for trial in result.trials if trial.gain is None]
    axes.scatter(
        [trial.n_active for trial in outside], [trial.n_inactive for trial in outside], marker="x", c=_GREY, s=34,
        lw=1.2, label=f"over the budget: {len(outside)}",
    )  # fmt: skip
    if inside:
        found = axes.scatter(
            [trial.n_active for trial in inside], [trial.n_inactive for trial in inside],
            c=[100 * (trial.gain or 0) for trial in inside], cmap="viridis", s=44, lw=0, label=f"inside: {len(inside)}",
        )  # fmt: skip
        figure.colorbar(found, ax=axes, label="gain on the choosing part, points", pad=0.02)
    if result.chosen is not None:
        axes.scatter(
            result.chosen.n_active, result.chosen.n_inactive, s=170, facecolors="none", edgecolors=_RED, lw=1.8,
            label=f"pick: +{result.chosen.activate} -{result.chosen.deactivate}",
        )  # fmt: skip
    _count_axis(axes.xaxis, axes.set_xscale, max((trial.n_active for trial in result.trials), default=1))
    _count_axis(axes.yaxis, axes.set_yscale, max((trial.n_inactive for trial in result.trials), default=1))
    axes.set(xlabel="experts promoted", ylabel="experts suppressed", xlim=(-0.3, None), ylim=(-0.3, None))
    axes.set_title(f"{len(result.trials)} of {result.n_grid} choices looked at; {result.budget}", fontsize=9)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.13), ncols=3, fontsize=9)
    save(figure, paths)


def _count_axis(axis: Any, set_scale: Any, most: int) -> None:
    """0, 1, 2, 4, ... at equal distances."""
    set_scale("symlog", base=2, linthresh=1)
    ticks = [0, *(1 << power for power in range(max(1, most.bit_length())))]
    axis.set_ticks(ticks, [str(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def draw_layers(result: LayerEffects, paths: Sequence[StrPath]) -> None:
    """Effects of the parts, with their intervals. Raises UsageError without matplotlib, or an unwritable file."""
    groups = [("alone, by third", result.of("third")), ("all but a third", result.of("without"))]
    groups.append(("alone, by layer", result.of("layer")))
    whole = result.of("whole")[0].effect.value
    width = 6.5 + 0.32 * len(result.of("layer"))
    figure = _figure((max(9.0, min(width, 22.0)), 4.4), f"{_task(result.about)}: effect by depth")
    widths = [len(groups[0][1]) + 1.5, len(groups[1][1]) + 1.5, max(len(groups[2][1]) + 1.5, 5.0)]
    grid = figure.add_gridspec(1, len(groups), width_ratios=widths)
    first: Any = None
    for column, (words, parts) in enumerate(groups):
        axes = figure.add_subplot(grid[0, column], sharey=first)
        first = first or axes
        _bars(axes, parts, whole)
        axes.set_title(words, fontsize=10)
    first.set_ylabel("swing, points" if result.parts[0].swing is not None else "effect, points")
    save(figure, paths)


def _bars(axes: Any, parts: Sequence[LayerPart], whole: float) -> None:
    effects = [part.effect for part in parts]
    values = [100 * effect.value for effect in effects]
    below = [max(0.0, 100 * (effect.value - effect.low)) for effect in effects]
    above = [max(0.0, 100 * (effect.high - effect.value)) for effect in effects]
    axes.bar(
        range(len(parts)), values, yerr=[below, above], color=_BLUE, width=0.7, error_kw={"elinewidth": 1, "capsize": 3}
    )
    axes.axhline(0, color="#333333", lw=0.6)
    axes.axhline(100 * whole, color=_RED, lw=1, ls="--", label="all layers")
    names = [part.name.removeprefix("layer ") for part in parts]
    axes.set_xticks(range(len(parts)), names, rotation=90 if len(parts) > 12 else 20 if len(names[0]) > 7 else 0)
    axes.legend(frameon=False, fontsize=8)


def _task(about: dict[str, Any]) -> str:
    return str(about["settings"].get("task", "")) or str(about["steering"]["name"])


def _side(about: dict[str, Any], reverse: bool) -> str:
    return str(about["negative" if reverse else "positive"])


def _figure(size: tuple[float, float], title: str) -> Any:
    from matplotlib.figure import Figure

    if problem := missing_matplotlib():
        raise UsageError(problem)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    figure.suptitle(plain(title), fontsize=12, weight="bold")
    return figure
