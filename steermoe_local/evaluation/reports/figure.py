"""Figures of reports: making without a display, colours, error bars, saving. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..._util.files import StrPath, replacing
from ..._util.package import away_from
from ...errors import UsageError
from ...maps.colours import NEGATIVE as BLUE
from ...maps.colours import NEUTRAL as GREY
from ...maps.colours import POSITIVE as RED
from ...maps.picture import legend_below, widen
from ..metrics.intervals import Interval

__all__ = [
    "BLUE", "GREY", "RED", "error_bars", "legend_below", "missing_matplotlib", "new_figure", "plain", "save", "widen",
]  # fmt: skip


def missing_matplotlib() -> str:
    """What to say when nothing can be drawn; "" if it can."""
    try:
        with away_from("matplotlibrc"):
            import matplotlib  # noqa: F401
    except ImportError:
        return "no pictures: they need matplotlib; run pip install 'steermoe-local[plot]'"
    return ""


def new_figure(size: tuple[float, float], title: str, *, dpi: int = 160, **font: Any) -> Any:
    """A figure of `size` inches; `title` may be any text. Raises UsageError without matplotlib."""
    if problem := missing_matplotlib():
        raise UsageError(problem)
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    figure.suptitle(plain(title), **font)
    return figure


def error_bars(intervals: Sequence[Interval]) -> tuple[list[float], list[list[float]]]:
    """(values, [lengths below, lengths above]) in points or percent."""
    below = [max(0.0, 100 * (found.value - found.low)) for found in intervals]
    above = [max(0.0, 100 * (found.high - found.value)) for found in intervals]
    return [100 * found.value for found in intervals], [below, above]


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
