"""Checks every figure that is saved: no legend lies on the data of any axes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def legends_on_data(figure: Any) -> list[str]:
    """The legends of a figure that overlap the area of some axes by more than a pixel."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.draw_without_rendering()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    found = []
    for legend in legends:
        box = legend.get_window_extent()
        for axes in figure.axes:
            area = axes.patch.get_window_extent()
            across = min(box.x1, area.x1) - max(box.x0, area.x0)
            down = min(box.y1, area.y1) - max(box.y0, area.y0)
            if across > 1 and down > 1:
                found.append(f"{[text.get_text() for text in legend.get_texts()]} on {axes.get_title(loc='left')!r}")
    return found


@contextmanager
def checked_figures() -> Iterator[None]:
    """Meanwhile, saving a figure with a legend on its data raises AssertionError."""
    try:
        import matplotlib.figure as matplotlib_figure
    except ImportError:  # nothing is drawn
        yield
        return
    real = matplotlib_figure.Figure.savefig

    def savefig(figure: Any, *arguments: Any, **options: Any) -> Any:
        result = real(figure, *arguments, **options)
        assert legends_on_data(figure) == []
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib_figure.Figure, "savefig", savefig)
        yield
