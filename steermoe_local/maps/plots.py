"""Plots of expert maps as PNG, SVG, or an HTML page that names the expert under the pointer.

Needs matplotlib (the extra `plot`), which is imported when something is drawn.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util.files import StrPath, replacing
from .._util.package import away_from
from ..errors import UsageError
from .expert_map import ExpertMap
from .significance import compare, half_widths, overlap

SUFFIXES = (".png", ".svg", ".html")
# red and blue differ under every common colour blindness; grey is for rows without a router
_COLOURS, _PLUS, _MINUS, _NOTHING = "RdBu_r", "#b2182b", "#2166ac", "#d9d9d9"
_DPI = 160
_STYLE = """body{font-family:sans-serif;margin:1.5em;color:#222}svg{max-width:100%;height:auto}
rect.cell,circle.cell{fill:#000;fill-opacity:0;pointer-events:all}
rect.cell:hover,circle.cell:hover{stroke:#000;stroke-width:1;fill-opacity:.15}"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

# (x, y, width, height, words) in points from the top left corner
_Spot = tuple[float, float, float, float, str]


def require_drawable(path: StrPath) -> None:
    """Check before long work that a plot can be written to `path`. Raises UsageError."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: a picture is {', '.join(SUFFIXES)}; name the file so")
    try:
        with away_from("matplotlibrc"):
            import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("plots need matplotlib; run pip install 'steermoe-local[plot]'") from None


def plot_map(expert_map: ExpertMap, path: StrPath, signs: npt.NDArray[np.int8] | None = None, top: int = 20) -> None:
    """Draw a map: layers x experts, RD by depth, and the `top` experts by |RD|.

    `signs` [n_layer, n_expert] marks chosen experts: +1 promoted, -1 suppressed. The suffix of `path` selects the
    format: .png, .svg or .html.

    Raises UsageError for another suffix, without matplotlib, or when the file cannot be written.
    """
    require_drawable(path)
    from matplotlib.figure import Figure

    n_layer = expert_map.identity.n_layer
    rows = min(max(2.4, 0.21 * n_layer), 8.5)
    top = min(top, expert_map.rd.size)
    figure = Figure(figsize=(13, rows + 4.9), dpi=_DPI)
    grid = figure.add_gridspec(
        2,
        3,
        height_ratios=[rows, 2.6],
        width_ratios=[10, 2.2, 0.22],
        left=0.06,
        right=0.945,
        top=1 - 0.95 / (rows + 4.9),
        bottom=0.85 / (rows + 4.9),
        hspace=0.95 / ((rows + 2.6) / 2),
        wspace=0.065,
    )
    heat = figure.add_subplot(grid[0, 0])
    depth = figure.add_subplot(grid[0, 1], sharey=heat)
    _write_title(figure, expert_map, rows + 4.9)
    image = _heatmap(heat, expert_map)
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[0, 2]))
    bar.set_label("RD")
    if signs is not None:
        _mark(heat, signs)
    _by_depth(depth, expert_map.rd)
    _top_experts(figure.add_subplot(grid[1, :]), expert_map, top)
    _save(figure, path, _plain(expert_map.behaviour), lambda: _cells(figure, heat, expert_map, signs))


def plot_difference(one: ExpertMap, two: ExpertMap, path: StrPath, names: tuple[str, str], top_n: int = 20) -> None:
    """Draw the agreement of two maps: RD against RD, correlation by layer, overlap of the first experts.

    Raises UsageError and ModelMismatchError as `plot_map` and `compare`.
    """
    require_drawable(path)
    from matplotlib.figure import Figure

    result = compare(one, two, top_n)
    a, b = (_plain(name) for name in names)
    layers = list(result.layers)
    x, y = one.rd[layers], two.rd[layers]
    limit = 1.05 * max(np.abs(x).max(), np.abs(y).max())
    figure = Figure(figsize=(13, 5.2), dpi=_DPI)
    grid = figure.add_gridspec(
        1, 3, width_ratios=[1.15, 1, 1], left=0.065, right=0.985, top=0.83, bottom=0.13, wspace=0.28
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
    scatter.scatter(x.ravel(), y.ravel(), s=9, color=_MINUS, alpha=0.45, lw=0)
    scatter.set(xlim=(-limit, limit), ylim=(-limit, limit), title="each expert")
    scatter.set_xlabel(f"RD, {a}", parse_math=False)
    scatter.set_ylabel(f"RD, {b}", parse_math=False)
    by_layer.barh(layers, result.by_layer, color=_MINUS, height=0.75)
    by_layer.axvline(0, color="#333333", lw=0.6)
    low = min(0.0, *result.by_layer)
    by_layer.set(
        xlim=(1.05 * low if low < 0 else 0, 1.02), xlabel="correlation", ylabel="layer", title="Pearson by layer"
    )
    by_layer.set_ylim(layers[-1] + 0.6, layers[0] - 0.6)
    by_layer.set_yticks(_ticks(layers[-1] + 1, 24))
    sizes = np.unique(np.geomspace(1, x.size, 40).astype(int))
    shared.plot(sizes, [overlap(x, y, int(n)) for n in sizes], color=_MINUS, lw=1.6, label="shared, same sign")
    shared.plot(sizes, sizes / x.size / 2, color="#777777", lw=1, ls="--", label="by chance")
    shared.set(xscale="log", ylim=(0, 1.03), xlabel="first n experts by |RD|", ylabel="share", title="overlap")
    shared.legend(frameon=False, loc="best")

    def spots() -> list[_Spot]:
        found = []
        for row, expert in np.ndindex(*x.shape):
            left, up = _point(figure, scatter, float(x[row, expert]), float(y[row, expert]))
            words = f"layer {layers[row]}, expert {expert}: {x[row, expert]:+.4f} / {y[row, expert]:+.4f}"
            found.append((left - 2, up - 2, 4.0, 4.0, words))
        return found

    _save(figure, path, f"{a} against {b}", spots)


def _counted(expert_map: ExpertMap) -> str:
    """Pairs and tokens in words; an imported ranking does not tell its pairs."""
    pairs = f"{expert_map.n_pairs} pairs" if expert_map.n_pairs else "unknown number of pairs"
    tokens = f"{expert_map.n1:,} / {expert_map.n2:,}" if expert_map.n1 and expert_map.n2 else "unknown number of"
    return f"{pairs}, {tokens} target tokens"


def _write_title(figure: Any, expert_map: ExpertMap, height: float) -> None:
    sides = f"  ({_plain(expert_map.positive)} / {_plain(expert_map.negative)})" if expert_map.positive else ""
    facts = f"{expert_map.identity.short}, {_counted(expert_map)}"
    if expert_map.confidence is not None and not expert_map.confidence.differs_from_shuffled:
        facts += "; does NOT differ from shuffled pairs"
    title = (_plain(expert_map.behaviour) or "expert map") + sides
    figure.text(0.06, 1 - 0.3 / height, title, fontsize=14, weight="bold", va="center", parse_math=False)
    figure.text(0.06, 1 - 0.58 / height, facts, fontsize=10, color="#444444", va="center", parse_math=False)


def _heatmap(axes: Any, expert_map: ExpertMap) -> Any:
    from matplotlib import colormaps

    n_layer, n_expert = expert_map.identity.shape
    colours = colormaps[_COLOURS].with_extremes(bad=_NOTHING)
    routed: npt.NDArray[np.bool_] = np.any(expert_map.rd, axis=1)
    if expert_map.a1 is not None:
        routed = routed | np.any(expert_map.a1, axis=1)
    shown = np.ma.masked_array(expert_map.rd, np.broadcast_to(~routed[:, None], expert_map.rd.shape))
    limit = float(np.abs(expert_map.rd).max()) or 1.0
    image = axes.imshow(shown, cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_xticks(_ticks(n_expert, 32 if n_expert <= 100 else 22))
    axes.set_yticks(_ticks(n_layer, 24))
    axes.set_title("risk difference" + ("" if routed.all() else " (grey: no router)"), fontsize=10, loc="left")
    return image


def _mark(axes: Any, signs: npt.NDArray[np.int8]) -> None:
    n_expert = signs.shape[1]
    size = float(np.clip(2200 / n_expert, 26, 70))
    for sign, marker, words in ((1, "^", "promoted"), (-1, "v", "suppressed")):
        layers, experts = np.nonzero(signs == sign)
        if len(layers):
            axes.scatter(
                experts, layers, s=size, marker=marker, c="black", edgecolors="white", linewidths=0.6, clip_on=False,
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
    axes.bar(
        range(top), values, color=[_PLUS if value > 0 else _MINUS for value in values], yerr=errors, width=0.75,
        error_kw={"elinewidth": 1, "capsize": 2.5},
    )  # fmt: skip
    axes.axhline(0, color="#333333", lw=0.6)
    axes.set_xticks(range(top), [f"L{layer} E{expert}" for layer, expert, _ in cells], fontsize=8)
    axes.tick_params(axis="x", rotation=60 if top > 12 else 0)
    axes.set(xlim=(-0.7, top - 0.3), ylabel="RD")
    axes.set_title(words, fontsize=10, loc="left")


def _cells(figure: Any, axes: Any, expert_map: ExpertMap, signs: npt.NDArray[np.int8] | None) -> list[_Spot]:
    spots = []
    rates = expert_map.a1 is not None and expert_map.a2 is not None
    for layer, expert in np.ndindex(*expert_map.rd.shape):
        left, up = _point(figure, axes, expert - 0.5, layer - 0.5)
        right, down = _point(figure, axes, expert + 0.5, layer + 0.5)
        words = f"layer {layer}, expert {expert}: RD {expert_map.rd[layer, expert]:+.4f}"
        if rates and expert_map.a1 is not None and expert_map.a2 is not None:
            p1, p2 = expert_map.a1[layer, expert] / expert_map.n1, expert_map.a2[layer, expert] / expert_map.n2
            words += f" ({p1:.4f} / {p2:.4f})"
        if signs is not None and signs[layer, expert]:
            words += ", promoted" if signs[layer, expert] > 0 else ", suppressed"
        spots.append((left, up, right - left, down - up, words))
    return spots


def _point(figure: Any, axes: Any, x: float, y: float) -> tuple[float, float]:
    """Position of data in the SVG, in points from the top left corner."""
    across, up = figure.dpi_scale_trans.inverted().transform(axes.transData.transform((x, y)))
    return float(across) * 72, (float(figure.get_figheight()) - float(up)) * 72


def _ticks(n: int, most: int) -> list[int]:
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1024) if n / step <= most)
    return list(range(0, n, step))


def _plain(text: str, most: int = 70) -> str:
    """A name from a file as one printable line."""
    line = "".join(char if char.isprintable() else " " for char in text).strip()
    return line if len(line) <= most else line[: most - 1] + "…"


def _save(figure: Any, path: StrPath, title: str, spots: Any) -> None:
    import matplotlib

    suffix = Path(path).suffix.lower()
    kind = "png" if suffix == ".png" else "svg"
    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "steermoe", "svg.fonttype": "path"}):
        # characters that the font lacks are drawn as boxes; the title of the page has them
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    data = buffer.getvalue()
    if suffix == ".html":
        data = _page(data.decode("utf-8"), title, spots()).encode("utf-8")
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _page(svg: str, title: str, spots: Sequence[_Spot]) -> str:
    """One page without outside resources: the plot, and a title over each spot."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], count=1, flags=re.DOTALL)
    cells = "\n".join(
        f'<rect class="cell" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}">'
        f"<title>{html.escape(words)}</title></rect>"
        for x, y, width, height, words in spots
    )
    end = body.rindex("</svg>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        f"{body[:end]}<g>\n{cells}\n</g>\n{body[end:]}</body></html>\n"
    )
