"""Pictures: every format, every shape, the marks and titles where they belong, hostile names, no outside resource."""

from __future__ import annotations

import html
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.errors import ModelMismatchError, UsageError
from steermoe_local.maps import colours, picture, plots, significance
from steermoe_local.maps.difference_plot import plot_difference
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.pair_counts import PairCounts
from tests.support.builders import identity, random_counts, table_map
from tests.support.paths import ROOT
from tests.support.random_pairs import random_pairs, write

SHAPES = [(5, 24, 3), (16, 64, 8), (48, 128, 8), (1, 1, 1), (2, 3, 1)]


def random_map(n_layer: int, n_expert: int, k: int, seed: int = 0, **changes: Any) -> ExpertMap:
    rng = np.random.default_rng(seed)
    rd = np.clip(rng.standard_t(3, size=(n_layer, n_expert)) / 20, -1, 1)
    return table_map(rd, k, **({"n1": 100, "n2": 90, "n_pairs": 5} | changes))


def size_of_png(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def cells(page: str) -> list[tuple[list[float], str]]:
    """([x, y, width, height], title) of what a pointer finds."""
    found = re.findall(
        r'<rect class="cell" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"><title>(.*?)</title></rect>', page
    )
    return [([float(value) for value in spot[:4]], html.unescape(spot[4])) for spot in found]


@pytest.mark.parametrize("shape", SHAPES)
def test_formats(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    made = random_map(*shape)
    for suffix in picture.SUFFIXES:
        plots.plot_map(made, tmp_path / f"a{suffix}")
    width, height = size_of_png(tmp_path / "a.png")
    assert width == 2080
    assert 0.4 * width < height < 1.2 * width
    svg = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert svg.tag.endswith("svg")
    page = (tmp_path / "a.html").read_text("utf-8")
    assert len(cells(page)) == made.rd.size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.png", "a.svg"]


def test_the_same_map_gives_the_same_picture(tmp_path: Path) -> None:
    made = random_map(2, 6, 2)
    for suffix in picture.SUFFIXES:
        for name in ("a", "b"):
            plots.plot_map(made, tmp_path / f"{name}{suffix}", made.choose(2, 2))
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
        plots.plot_map(replace(made, rd=-made.rd), tmp_path / f"b{suffix}", made.choose(2, 2))
        assert (tmp_path / f"a{suffix}").read_bytes() != (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_titles_stand_over_their_cells(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    """The pointer's cells tile the box of the heatmap, row by row."""
    made = random_map(*shape)
    plots.plot_map(made, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text("utf-8")
    found = cells(page)
    outline = re.search(r'<g id="patch_2">\s*<path d="(.*?)"', page, re.DOTALL)
    assert outline is not None
    corners = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", outline[1]), dtype=float)
    boxes = np.array([box for box, _ in found])
    assert boxes[:, :2].min(axis=0) == pytest.approx(corners.min(axis=0), abs=0.02)
    assert (boxes[:, :2] + boxes[:, 2:]).max(axis=0) == pytest.approx(corners.max(axis=0), abs=0.02)
    assert (boxes[:, 2:].prod(axis=1)).sum() == pytest.approx(np.ptp(corners, axis=0).prod(), rel=0.02)
    n_layer, n_expert, _ = shape
    grid = boxes.reshape(n_layer, n_expert, 4)
    assert (np.diff(grid[:, :, 0], axis=1) > 0).all()
    assert (np.diff(grid[:, :, 1], axis=0) > 0).all()
    layer, expert = n_layer - 1, n_expert // 2
    words = found[layer * n_expert + expert][1]
    assert words == f"layer {layer}, expert {expert}: RD {made.rd[layer, expert]:+.4f}"


def test_titles_tell_rates_and_choice(tmp_path: Path) -> None:
    made = ExpertMap.from_counts(random_counts(1))
    signs = made.choose(1, 1)
    plots.plot_map(made, tmp_path / "a.html", signs)
    titles = [words for _, words in cells((tmp_path / "a.html").read_text("utf-8"))]
    assert sum(words.endswith(", promoted") for words in titles) == 1
    assert sum(words.endswith(", suppressed") for words in titles) == 1
    layer, expert = np.argwhere(signs > 0)[0].tolist()
    assert made.a1 is not None
    assert made.a2 is not None
    rates = f"({made.a1[layer, expert] / 7:.4f} / {made.a2[layer, expert] / 11:.4f})"
    assert f"expert {expert}: RD {made.rd[layer, expert]:+.4f} {rates}, promoted" in titles[layer * 4 + expert]


def drawn(expert_map: ExpertMap, monkeypatch: pytest.MonkeyPatch, path: Path, **options: Any) -> Any:
    """The figure that would be saved."""
    figures: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(plots, "save", lambda figure, *_: figures.append(figure))
        plots.plot_map(expert_map, path, **options)
    return figures[0]


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = table_map([[0, 0, 0, 0], [0.5, -0.1, 0.2, 0.0], [-0.25, 0.05, 0.0, 0.4]])
    figure = drawn(made, monkeypatch, tmp_path / "a.png", signs=made.choose(2, 1), top=4)
    heat, depth, _, bars = figure.axes
    image = heat.images[0]
    assert image.get_clim() == (-0.5, 0.5), "the colours are symmetric about 0"
    data = image.get_array()
    assert data.mask.tolist() == [[True] * 4, [False] * 4, [False] * 4]
    assert np.array_equal(data.data, made.rd)
    promoted, suppressed = heat.collections
    assert promoted.get_offsets().tolist() == [[0, 1], [3, 2]]
    assert suppressed.get_offsets().tolist() == [[0, 2]]
    assert [text.get_text() for text in heat.get_legend().get_texts()] == ["promoted: 2", "suppressed: 1"]
    largest, mean = depth.containers
    assert [bar.get_width() for bar in largest] == [0, 0.5, 0.4]
    assert [bar.get_width() for bar in mean] == pytest.approx([0, 0.2, 0.175])
    assert [bar.get_height() for bar in bars.containers[0]] == [0.5, 0.4, -0.25, 0.2]
    assert [text.get_text() for text in bars.get_xticklabels()] == ["L1 E0", "L2 E3", "L2 E0", "L1 E2"]


def test_intervals_and_warning_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = PairCounts.load(write(tmp_path / "a.npz", random_pairs(1, 20)))
    made = significance.annotate(ExpertMap.from_counts(pairs.total()), pairs, draws=99, repeats=5)
    figure = drawn(made, monkeypatch, tmp_path / "a.png")
    assert any("NOT differ" in text.get_text() for text in figure.texts)
    assert "95% confidence intervals" in figure.axes[3].get_title(loc="left")
    layer, expert, value = made.top(1)[0]
    assert made.se is not None
    half = significance.half_widths(made.se, 20)[layer, expert]
    errors = figure.axes[3].containers[0][2][0]
    assert errors.get_segments()[0][:, 1] == pytest.approx([value - half, value + half])


def test_colours_are_distinct_for_the_colour_blind() -> None:
    """Both ends of the scale differ from each other, and from the middle, seen with any one kind of cone missing.

    Matrices of Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
    """
    from matplotlib import colormaps

    missing = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    ends = np.array(colormaps[colours.SCALE]([0.05, 0.25, 0.5, 0.75, 0.95]))[:, :3]
    linear = np.where(ends <= 0.04045, ends / 12.92, ((ends + 0.055) / 1.055) ** 2.4)
    for matrix in missing.values():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=2)[~np.eye(5, dtype=bool)]
        assert distances.min() > 0.2


NAMES = [
    "<script>alert(1)</script>",
    "a\"b'c&amp;<title>",
    "$\\frac{1}$ $",
    "line\nbreak\x00\x1b[31m",
    "数字と言葉 \U0001f600",
    "x" * 5000,
    "",
    "</svg></title><img src=x onerror=alert(1)>",
]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_names(tmp_path: Path, name: str) -> None:
    made = random_map(2, 3, 1, behaviour=name, positive=name, negative=name)
    for suffix in (".png", ".html"):
        plots.plot_map(made, tmp_path / f"a{suffix}")
        plot_difference(made, made, tmp_path / f"b{suffix}", (name, name))
    for letter in "ab":
        page = (tmp_path / f"{letter}.html").read_text("utf-8")
        assert "<script" not in page
        assert "<img" not in page
        assert page.count("</svg>") == 1
        ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    plots.plot_map(random_map(5, 24, 3), tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text("utf-8")
    assert page.startswith("<!doctype html>")
    for target in re.findall(r'(?:href|src)="(.*?)"', page):
        assert target.startswith(("#", "data:image/png;base64,")), target
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    addresses = set(re.findall(r'"(https?://.*?)"', page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not addresses


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_map(2, 3, 1)
    for name in ("a.gif", "a", "a.pdf", "png"):
        with pytest.raises(UsageError, match=r"a picture is \.png, \.svg, \.html"):
            plots.plot_map(made, tmp_path / name)
    with pytest.raises(UsageError, match="create it first"):
        plots.plot_map(made, tmp_path / "no" / "a.png")
    with pytest.raises(ModelMismatchError, match="do not correspond"):
        plot_difference(made, random_map(3, 3, 1), tmp_path / "a.png", ("a", "b"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'steermoe-local\[plot\]'"):
        plots.plot_map(made, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    plots.plot_map(made, tmp_path / "A.PNG")


def test_a_map_of_zeros(tmp_path: Path) -> None:
    made = table_map(np.zeros((2, 3)))
    plots.plot_map(made, tmp_path / "a.png")
    with pytest.raises(UsageError, match="0 everywhere"):
        plot_difference(made, made, tmp_path / "b.png", ("a", "b"))


@pytest.mark.parametrize("shape", SHAPES)
def test_difference(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    one, two = random_map(*shape), random_map(*shape, seed=1)
    for suffix in picture.SUFFIXES:
        plot_difference(one, two, tmp_path / f"a{suffix}", ("one.json", "two.json"))
    titles = [words for _, words in cells((tmp_path / "a.html").read_text("utf-8"))]
    assert len(titles) == one.rd.size
    assert titles[-1] == (f"layer {shape[0] - 1}, expert {shape[1] - 1}: {one.rd[-1, -1]:+.4f} / {two.rd[-1, -1]:+.4f}")


def test_comparison_by_hand() -> None:
    one = table_map([[0, 0, 0, 0], [0.5, -0.1, 0.2, 0.0], [-0.25, 0.05, 0.0, 0.4]])
    same = significance.compare(one, one, 3)
    assert (same.pearson, same.spearman, same.overlap) == pytest.approx((1, 1, 1))
    assert same.layers == (1, 2)
    assert same.by_layer == pytest.approx((1, 1))
    assert same.chance == pytest.approx(3 / 8 / 2)
    opposite = significance.compare(one, replace(one, rd=-one.rd), 3)
    assert (opposite.pearson, opposite.overlap) == pytest.approx((-1, 0))
    assert significance.compare(one, one, 999).top_n == 8
    other = replace(one, identity=identity(3, 4, 1, router_sha256="9" * 64))
    assert significance.compare(one, other, 3) == same


def test_matplotlib_is_imported_when_something_is_drawn() -> None:
    code = "import sys; import steermoe_local.cli, steermoe_local.maps.plots; assert 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
