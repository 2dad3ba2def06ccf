"""The colours of both sides: one scheme in Python and in the page's style sheet, apart for every eye and in grey."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.maps import colours, plots
from tests.support.builders import table_map
from tests.support.figures import checked_figures, legends_on_data
from tests.support.paths import ROOT

TOKENS = ROOT / "steermoe_local" / "server" / "page" / "tokens.css"
MISSING = {  # Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
    "nothing": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def test_the_page_has_the_same_colours() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", TOKENS.read_text("utf-8"))[:2]
    for text, pair in ((light, colours.PAGE_LIGHT), (dark, colours.PAGE_DARK)):
        found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", text))
        assert (found["up"], found["down"]) == pair
    page = (TOKENS.parent / "page.css").read_text("utf-8")
    assert not re.search(r"--(up|down): ", page), "one place"
    least = re.search(r"export const LEAST = ([\d.]+);", (TOKENS.parent / "drawing.js").read_text("utf-8"))
    assert least is not None
    assert float(least[1]) == colours.LEAST_RD


@pytest.mark.parametrize("pair", [(colours.POSITIVE, colours.NEGATIVE), colours.PAGE_LIGHT, colours.PAGE_DARK])
@pytest.mark.parametrize("cones", MISSING)
def test_both_sides_are_apart_for_every_eye(pair: tuple[str, str], cones: str) -> None:
    ends = np.array([[int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)] for colour in pair])
    linear = np.where(ends <= 0.04045, ends / 12.92, ((ends + 0.055) / 1.055) ** 2.4)
    one, two = np.clip(linear @ np.array(MISSING[cones]).T, 0, 1) ** (1 / 2.2)
    assert np.linalg.norm(one - two) > 0.3


def drawn(expert_map: Any, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    figures: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(plots, "save", lambda figure, *_: figures.append(figure))
        plots.plot_map(expert_map, path, **options)
    return figures[0]


def test_sides_differ_in_grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    made = table_map([[0.5, -0.1, 0.2, 0.0], [-0.25, 0.05, 0.0, 0.4]])
    figure = drawn(made, tmp_path / "a.png", monkeypatch, signs=made.choose(2, 1), top=4)
    heat, _, _, bars = figure.axes
    promoted, suppressed = heat.collections
    assert promoted.get_facecolor()[0].tolist() != suppressed.get_facecolor()[0].tolist()
    assert promoted.get_paths()[0].vertices.tolist() != suppressed.get_paths()[0].vertices.tolist()
    hatched = [bool(bar.get_hatch()) for bar in bars.containers[0]]
    assert hatched == [bar.get_height() < 0 for bar in bars.containers[0]]


@pytest.mark.parametrize("size", [1e-4, 0.01, 0.019])
def test_noise_does_not_fill_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    pytest.importorskip("matplotlib")
    made = table_map(np.array([[1, -0.5, 0.25, 0], [-1, 0.5, 0.25, 0]]) * size)
    heat, depth, _, bars = drawn(made, tmp_path / "a.png", monkeypatch, top=4).axes
    assert heat.images[0].get_clim() == (-colours.LEAST_RD, colours.LEAST_RD)
    assert depth.get_xlim()[1] >= colours.LEAST_RD
    assert bars.get_ylim()[0] <= -colours.LEAST_RD
    assert bars.get_ylim()[1] >= colours.LEAST_RD


def test_a_legend_on_data_is_found() -> None:
    """The check that the other tests of pictures make of every figure can fail."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.add_subplot()
    axes.plot([0, 1], label="a line")
    axes.legend(loc="upper left")
    assert legends_on_data(figure)
    with checked_figures(), pytest.raises(AssertionError):
        figure.savefig("/dev/null", format="svg")
