"""Pictures of maps with effects of interventions: what is drawn where, and what the pointer finds."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.errors import ModelMismatchError, UsageError
from steermoe_local.maps import difference_plot, effect_plot, picture, plots
from steermoe_local.maps.expert_map import ExpertMap
from tests.support.builders import table_map
from tests.support.random_effects import RD, effects, effects_map, five_effects, random_effects

BOTH = ("promote", "suppress")
SHAPES = [(5, 24, BOTH), (5, 24, BOTH[1:]), (48, 128, BOTH), (1, 1, BOTH[:1])]


def some_map(n_layer: int, n_expert: int, seed: int = 0, **options: Any) -> ExpertMap:
    rng = np.random.default_rng(seed)
    rd = np.clip(rng.standard_t(3, size=(n_layer, n_expert)) / 20, -1, 1)
    return table_map(rd, effects=random_effects((n_layer, n_expert), seed, **options))


def titles(path: Path) -> list[str]:
    """The words that a pointer finds on a page."""
    found = re.findall(r'<rect class="cell" [^>]*><title>(.*?)</title></rect>', path.read_text("utf-8"))
    return [html.unescape(words) for words in found]


def drawn(monkeypatch: pytest.MonkeyPatch, module: Any, draw: Any, *args: Any, **options: Any) -> Any:
    """The figure that would be saved."""
    figures: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "save", lambda figure, *_: figures.append(figure))
        draw(*args, **options)
    return figures[0]


@pytest.mark.parametrize(("n_layer", "n_expert", "actions"), SHAPES)
def test_formats(tmp_path: Path, n_layer: int, n_expert: int, actions: tuple[str, ...]) -> None:
    made = some_map(n_layer, n_expert, actions=actions)
    assert made.effects is not None
    for suffix in picture.SUFFIXES:
        plots.plot_map(made, tmp_path / f"map{suffix}")
        effect_plot.plot_effects(made, tmp_path / f"effects{suffix}")
    for name in ("map", "effects"):
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")
    assert len(titles(tmp_path / "map.html")) == (1 + len(actions)) * made.rd.size
    assert len(titles(tmp_path / "effects.html")) == len(made.effects.layer)


def test_the_same_map_gives_the_same_picture(tmp_path: Path) -> None:
    for suffix in picture.SUFFIXES:
        for name in ("a", "b"):
            effect_plot.plot_effects(effects_map(), tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_heatmaps_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = effects_map()
    figure = drawn(monkeypatch, plots, plots.plot_map, made, tmp_path / "a.png", made.choose(1, 1), 3)
    heats = [axes for axes in figure.axes if axes.images and axes.get_xlabel() == "expert"]
    assert [axes.get_title(loc="left").split(" (")[0] for axes in heats] == [
        "risk difference",
        "effect: promote",
        "effect: suppress",
    ]
    rd, promote, suppress = (axes.images[0] for axes in heats)
    assert np.array_equal(rd.get_array(), made.rd)
    assert promote.get_clim() == suppress.get_clim() == (-0.75, 0.75), "one scale, symmetric about 0"
    assert made.effects is not None
    for image, action in ((promote, 1), (suppress, -1)):
        wanted = made.effects.table(action, "effect", (2, 4))
        assert np.array_equal(image.get_array().mask, np.isnan(wanted)), "grey where it was not tried"
        assert np.array_equal(image.get_array().compressed(), wanted[~np.isnan(wanted)])
    assert heats[1].collections[0].get_offsets().tolist() == [[0, 0]], "a dot where it is significant"
    assert heats[2].collections[0].get_offsets().tolist() == [[0, 0], [0, 1]]


def test_a_map_without_effects_is_drawn_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, plots, plots.plot_map, table_map(RD), tmp_path / "a.png")
    assert len(figure.axes) == 4
    assert figure.get_figheight() == pytest.approx(2.4 + 4.9)


def test_points_of_rd_against_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = effects_map()
    figure = drawn(monkeypatch, effect_plot, effect_plot.plot_effects, made, tmp_path / "a.png")
    assert [axes.get_title(loc="left").split(":")[0] for axes in figure.axes] == ["promote", "suppress"]
    found: list[tuple[Any, ...]] = []
    for axes in figure.axes:
        for points in axes.collections:
            if not hasattr(points, "get_sizes"):
                continue  # bars
            hollow = bool((points.get_facecolor()[0][:3] == 1).all())
            colour = tuple(points.get_edgecolor()[0][:3].round(3).tolist())
            found += [(*at, hollow, colour) for at in points.get_offsets().tolist()]
    first, random = (tuple(round(int(c[i : i + 2], 16) / 255, 3) for i in (1, 3, 5)) for c in ("#2166ac", "#e08214"))
    assert found == [
        (0.5, 0.5, False, first),
        (-0.9, 0.0625, True, first),
        (0.0, -0.25, True, random),
        (-0.9, 0.75, False, first),
        (0.5, -0.625, False, first),
    ]
    bars = [lines for axes in figure.axes for lines in axes.collections if not hasattr(lines, "get_sizes")]
    assert bars[0].get_segments()[0][:, 1] == pytest.approx([0.5 - 1.96 * 0.125, 0.5 + 1.96 * 0.125], abs=1e-3)
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["L0 E0", "L1 E0", "L0 E0"]


def test_only_the_first_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, effect_plot, effect_plot.plot_effects, effects_map(), tmp_path / "a.png", top=1)
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["L1 E0"]


def test_what_the_pointer_finds(tmp_path: Path) -> None:
    effect_plot.plot_effects(effects_map(), tmp_path / "a.html")
    found = titles(tmp_path / "a.html")
    assert found[0] == ("layer 0, expert 0: RD +0.5000; promote: effect +0.5000, se 0.1250, significant, cost 0.2500")
    assert found[2].endswith("; promote: effect -0.2500, se 0.1250, not significant, cost 0.0000, random control")
    plots.plot_map(effects_map(), tmp_path / "b.html")
    cells = titles(tmp_path / "b.html")
    assert len(cells) == 24
    assert cells[:8] == cells[8:16] == cells[16:], "each heatmap tells all"
    assert cells[0].count("effect") == 2
    assert cells[1] == "layer 0, expert 1: RD -0.4000"


def test_difference_shows_what_both_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = five_effects().rows()
    rows[0] |= {"effect": -0.5}
    one, two = effects_map(), effects_map(effects=effects(*rows[:4]))
    draw = difference_plot.plot_difference
    figure = drawn(monkeypatch, difference_plot, draw, one, two, tmp_path / "a.png", ("a", "b"))
    promote, suppress = figure.axes[3].collections
    assert promote.get_offsets().tolist() == [[0.5, -0.5], [-0.25, -0.25], [0.0625, 0.0625]]
    assert suppress.get_offsets().tolist() == [[0.75, 0.75]]
    draw(one, two, tmp_path / "a.html", ("a", "b"))
    assert titles(tmp_path / "a.html")[8:] == [
        "layer 0, expert 0, promote: +0.5000 / -0.5000",
        "layer 0, expert 3, promote: -0.2500 / -0.2500",
        "layer 1, expert 0, promote: +0.0625 / +0.0625",
        "layer 1, expert 0, suppress: +0.7500 / +0.7500",
    ]
    bare = drawn(monkeypatch, difference_plot, draw, one, replace(two, effects=None), tmp_path / "a.png", ("a", "b"))
    assert len(bare.axes) == 3
    apart = effects({"layer": 1, "expert": 3, "action": "promote"})
    draw(one, replace(two, effects=apart), tmp_path / "b.png", ("a", "b"))
    with pytest.raises(ModelMismatchError):
        draw(one, table_map(np.eye(3)), tmp_path / "c.png", ("a", "b"))


def test_effects_of_zero(tmp_path: Path) -> None:
    rows = ({"layer": 0, "expert": 0, "action": "promote", "effect_se": 0.0},)
    made = table_map(np.zeros((2, 3)), effects=effects(*rows))
    plots.plot_map(made, tmp_path / "a.png")
    effect_plot.plot_effects(made, tmp_path / "b.png")
    big = effects({"layer": 0, "expert": 0, "action": "promote", "effect": 1e9, "effect_se": 1e9, "p": 0.0})
    effect_plot.plot_effects(replace(made, effects=big), tmp_path / "c.png")


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_the_command(tmp_path: Path) -> None:
    effects_map(behaviour="<script>x</script>").save(tmp_path / "m.json")
    result = run("map", "plot", tmp_path / "m.json", "-o", tmp_path / "e.html", "--effects", "-n", 2)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"written: {tmp_path / 'e.html'}\n"
    assert len(titles(tmp_path / "e.html")) == 5
    assert "<script" not in (tmp_path / "e.html").read_text("utf-8")
    table_map(RD).save(tmp_path / "bare.json")
    for arguments, words in (
        (("m.json", "--effects", "--activate", 1), "--effects"),
        (("bare.json", "--effects"), "steermoe attribute"),
    ):
        result = run("map", "plot", tmp_path / arguments[0], "-o", tmp_path / "x.png", *arguments[1:])
        assert result.exit_code == 2
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "x.png").exists()
    with pytest.raises(UsageError, match="a picture is"):
        effect_plot.plot_effects(effects_map(), tmp_path / "a.gif")
