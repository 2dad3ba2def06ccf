"""What pictures of expert maps have in common: PNG, SVG, or an HTML page that names the expert under the pointer.

Needs matplotlib (the extra `plot`), which is imported when something is drawn.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .._util.files import StrPath, replacing
from .._util.html_page import html_page
from .._util.package import away_from
from ..errors import UsageError

SUFFIXES = (".png", ".svg", ".html")
DPI = 160
_STYLE = """body{font-family:sans-serif;margin:1.5em;color:#222}svg{max-width:100%;height:auto}
rect.cell,circle.cell{fill:#000;fill-opacity:0;pointer-events:all}
rect.cell:hover,circle.cell:hover{stroke:#000;stroke-width:1;fill-opacity:.15}"""

_NO_GLYPH = "Glyph .* missing from"  # such characters are drawn as boxes

Spot = tuple[float, float, float, float, str]
"""(x, y, width, height, words) in points from the top left corner."""


def require_drawable(path: StrPath) -> None:
    """Check before long work that a plot can be written to `path`. Raises UsageError."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: a picture is {', '.join(SUFFIXES)}; name the file so")
    try:
        with away_from("matplotlibrc"):
            import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("plots need matplotlib; run pip install 'steermoe-local[plot]'") from None


def point(figure: Any, axes: Any, x: float, y: float) -> tuple[float, float]:
    """Position of data in the SVG, in points from the top left corner."""
    across, up = figure.dpi_scale_trans.inverted().transform(axes.transData.transform((x, y)))
    return float(across) * 72, (float(figure.get_figheight()) - float(up)) * 72


def ticks(n: int, most: int) -> list[int]:
    """Ticks of an axis of n rows or columns, at most so many."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1024) if n / step <= most)
    return list(range(0, n, step))


def widen(axes: Any, *, x: tuple[float, float] | None = None, y: tuple[float, float] | None = None) -> None:
    """Make axes reach at least from the first to the second of these values, so that noise does not fill a picture."""
    for ends, get, change in ((x, axes.get_xlim, axes.set_xlim), (y, axes.get_ylim, axes.set_ylim)):
        if ends is not None:
            low, high = get()
            change(min(low, ends[0]), max(high, ends[1]))


def legend_below(axes: Any, columns: int = 1, **options: Any) -> Any:
    """Put the legend below the labels of the horizontal axis, where no data is. For axes that are complete."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.figure
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_NO_GLYPH)
        figure.draw_without_rendering()  # the labels have their sizes now
    box = axes.xaxis.get_tightbbox()
    below = 0.0 if box is None else max(0.0, axes.bbox.y0 - box.y0) / figure.dpi
    place = axes.transAxes + ScaledTranslation(0, -below - 0.06, figure.dpi_scale_trans)
    return axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=place, ncols=columns, frameon=False, borderaxespad=0,
        **options,
    )  # fmt: skip


def plain(text: str, most: int = 70) -> str:
    """A name from a file as one printable line."""
    line = "".join(char if char.isprintable() else " " for char in text).strip()
    return line if len(line) <= most else line[: most - 1] + "…"


def save(figure: Any, path: StrPath, title: str, spots: Callable[[], Sequence[Spot]]) -> None:
    """Write a figure in the format of the suffix; the same figure gives the same bytes. `spots` are the page's."""
    import matplotlib

    suffix = Path(path).suffix.lower()
    kind = "png" if suffix == ".png" else "svg"
    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "steermoe", "svg.fonttype": "path"}):
        # characters that the font lacks are drawn as boxes; the title of the page has them
        warnings.filterwarnings("ignore", message=_NO_GLYPH)
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    data = buffer.getvalue()
    if suffix == ".html":
        data = _page(data.decode("utf-8"), title, spots()).encode("utf-8")
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _page(svg: str, title: str, spots: Sequence[Spot]) -> str:
    """One page without outside resources: the plot, and a title over each spot."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], count=1, flags=re.DOTALL)
    cells = "\n".join(
        f'<rect class="cell" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}">'
        f"<title>{html.escape(words)}</title></rect>"
        for x, y, width, height, words in spots
    )
    end = body.rindex("</svg>")
    return html_page(title, _STYLE, f"{body[:end]}<g>\n{cells}\n</g>\n{body[end:]}")
