"""The picture of an evaluation: rates of the sides, and the effect among its controls. Needs matplotlib."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..._util.files import StrPath, replacing
from ...errors import UsageError
from ..studies.evaluate import Evaluation

__all__ = ["draw_effect", "missing_matplotlib", "save"]

_PLUS, _MINUS, _GREY = "#b2182b", "#2166ac", "#777777"  # as in pictures of maps
_COLOURS = {"unsteered": _GREY, "away": _MINUS}
_DPI = 160


def missing_matplotlib() -> str:
    """What to say when nothing can be drawn; "" if it can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "no pictures: they need matplotlib; run pip install 'steermoe-local[plot]'"
    return ""


def draw_effect(evaluation: Evaluation, paths: Sequence[StrPath]) -> None:
    """Draw to each of the paths, .png or .svg. Raises UsageError without matplotlib, or when it cannot be written."""
    if problem := missing_matplotlib():
        raise UsageError(problem)
    from matplotlib.figure import Figure

    controls = [control for control in evaluation.controls if control.n]
    figure = Figure(figsize=(9 if controls else 5, 3.6), dpi=_DPI, layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=[1, 1.4], squeeze=False)[0] if controls else [figure.subplots()]
    _rates(axes[0], evaluation)
    if controls:
        _controls(axes[1], evaluation, controls)
    model = evaluation.provenance.get("model", {}).get("file", "")
    figure.suptitle(plain(f"{evaluation.steering['name']} {model}"), fontsize=10)
    save(figure, paths)


def _rates(axes: Any, evaluation: Evaluation) -> None:
    for place, side in enumerate(evaluation.sides):
        r = side.rate
        bars = [[100 * (r.value - r.low)], [100 * (r.high - r.value)]]
        colour = _COLOURS.get(side.name, _PLUS)
        axes.errorbar(place, 100 * r.value, yerr=np.abs(bars), fmt="o", color=colour, capsize=4)
    names = [side.name for side in evaluation.sides]
    axes.set_xticks(range(len(names)), names)
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(-4, 104), ylabel=plain(f"{evaluation.positive or 'rate'}, %", 40))
    axes.set_title("rate, 95% intervals", fontsize=9, loc="left")
    axes.grid(axis="y", alpha=0.3)


def _controls(axes: Any, evaluation: Evaluation, controls: Sequence[Any]) -> None:
    name, effect = evaluation.headline
    axes.axhspan(100 * effect.low, 100 * effect.high, color=_PLUS, alpha=0.15, lw=0)
    axes.axhline(100 * effect.value, color=_PLUS, label=f"this steering, {name}")
    axes.axhline(0, color="#333333", lw=0.6)
    rng = np.random.default_rng(0)  # only to set equal points beside each other
    for place, control in enumerate(controls):
        across = place + rng.uniform(-0.2, 0.2, control.n)
        axes.plot(across, 100 * np.asarray(control.effects), "o", ms=3, color=_GREY, alpha=0.7)
    axes.set_xticks(range(len(controls)), [f"{control.kind}\n{control.n}" for control in controls])
    axes.set(xlim=(-0.6, len(controls) - 0.4), ylabel=f"{name}, points")
    axes.set_title("the effect among its controls", fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="best")
    axes.grid(axis="y", alpha=0.3)


def plain(text: str, most: int = 80) -> str:
    """A name from a file as one line that can be drawn: no control characters, no mathematics."""
    line = "".join(char if char.isprintable() else " " for char in text).strip().replace("$", r"\$")
    return line if len(line) <= most else line[: most - 1] + "…"


def save(figure: Any, paths: Sequence[StrPath]) -> None:
    """Write a figure as .png or .svg, the same bytes every time. Raises UsageError."""
    import matplotlib

    for path in paths:
        kind = Path(path).suffix.lower().removeprefix(".")
        buffer = io.BytesIO()
        with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "steermoe", "svg.fonttype": "path"}):
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # drawn as boxes
            figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
        with replacing(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
