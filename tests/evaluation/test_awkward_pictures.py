"""Pictures of awkward results: nothing but noise, one point, constant values, names that do not fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace as Made
from typing import Any

import pytest

from steermoe_local.evaluation.experiments.picture import draw_experiment
from steermoe_local.evaluation.metrics.intervals import Interval
from steermoe_local.evaluation.reports.audit import draw_audit
from steermoe_local.evaluation.reports.sweep import draw_sweep
from steermoe_local.evaluation.reports.tuning import draw_tuning
from steermoe_local.maps.colours import LEAST_POINTS
from steermoe_local.maps.difference_plot import plot_difference
from tests.support.builders import table_map
from tests.support.figures import checked_figures

pytest.importorskip("matplotlib")
ABOUT = {
    "positive": "formal", "negative": "casual", "settings": {"task": "t"}, "steering": {"name": "x", "reverse": False}
}  # fmt: skip


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that are saved; no legend lies on data."""
    import matplotlib.figure as matplotlib_figure

    figures: list[Any] = []
    real = matplotlib_figure.Figure.savefig

    def savefig(figure: Any, *arguments: Any, **options: Any) -> Any:
        figures.append(figure)
        return real(figure, *arguments, **options)

    monkeypatch.setattr(matplotlib_figure.Figure, "savefig", savefig)
    with checked_figures():
        yield figures


def trial(active: int, inactive: int, gain: float | None) -> Made:
    return Made(n_active=active, n_inactive=inactive, activate=active, deactivate=inactive, gain=gain)


def tuning(*trials: Made) -> Any:
    return Made(metadata=ABOUT, trials=trials, chosen=trials[0], n_grid=9, budget="perplexity +5%")


@pytest.mark.parametrize("gains", [(0.0,), (1e-6, 2e-6, 3e-6), (-1e-6, 0.0), (0.05, 0.05)])
def test_colours_of_gains_do_not_show_noise(tmp_path: Path, saved: list[Any], gains: tuple[float, ...]) -> None:
    draw_tuning(tuning(*(trial(2**n, 2**n, gain) for n, gain in enumerate(gains))), [tmp_path / "a.png"])
    axes = saved[0].axes[0]
    low, high = next(found for found in axes.collections if found.get_array() is not None).get_clim()
    assert high - low >= LEAST_POINTS
    assert low <= 0 <= high


def test_no_choice_lies_on_the_frame(tmp_path: Path, saved: list[Any]) -> None:
    draw_tuning(tuning(trial(0, 0, None), trial(1000, 3000, None)), [tmp_path / "a.png"])
    axes = saved[0].axes[0]
    assert axes.get_xlim()[0] < 0
    assert axes.get_xlim()[1] > 1000
    assert axes.get_ylim()[0] < 0
    assert axes.get_ylim()[1] > 3000


@pytest.mark.parametrize("n", [1, 4])
def test_a_front_of_equal_numbers(tmp_path: Path, saved: list[Any], n: int) -> None:
    choice = Made(activate=4, deactivate=0, reverse=False, layers=None, cap=None, scale=None)
    points = [
        Made(choice=choice, n_active=4, n_inactive=0, gain=0.0, fluency=Made(perplexity_ratio=1.0, kl=0.0), front=True)
    ]
    assert draw_sweep(Made(points=points * n, metadata=ABOUT, cost="ppl"), [tmp_path / "a.png"])  # type: ignore[arg-type]
    axes, bar = saved[0].axes
    assert all(float(tick).is_integer() for tick in bar.get_yticks()), "there are no half experts"
    assert axes.get_xlim()[0] < 0
    assert axes.get_ylim()[0] < 0


def overlapping(axes: Any) -> bool:
    """Whether two names below an axis overlap that are not turned."""
    boxes = [text.get_window_extent() for text in axes.get_xticklabels() if not text.get_rotation()]
    return any(one.x1 > two.x0 for one, two in itertools.pairwise(boxes))


def test_long_names_of_rules(tmp_path: Path, saved: list[Any]) -> None:
    found = {"rates": {"unsteered": 0.2, "towards": 0.9, "away": 0.1}, "swing": {"value": 0.0, "low": 0.0, "high": 0.0}}
    rules = dict.fromkeys(("hard", "soft", "capped", "weighted by significance"), found)
    made: Any = Made(name="routing-kinds", question="Which?", figures={"rules": rules})
    draw_experiment(made, [tmp_path / "a.png"])
    assert not any(overlapping(axes) for axes in saved[0].axes)


def audited(name: str, rates: tuple[float, ...], n_blocks: int = 0) -> Any:
    kept = Made(share=Interval(1.0, 0.9, 1.0, 40, "wilson"), draws=[1.0] * 3)

    def point(rate: float, layer: int) -> Any:
        facts = {"rate": rate, "behaviour": kept, "unrelated": kept, "text": kept, "layers": (layer, layer + 1)}
        return Made(action="suppress", **facts)

    points = [point(rate, 0) for rate in rates]
    blocks = [point(rates[0], 2 * n) for n in range(n_blocks)]
    return Made(name=name, of=lambda action: points * (action == "suppress"), blocks=blocks, kept=kept.share)


def test_an_audit_at_one_rate(tmp_path: Path, saved: list[Any]) -> None:
    models = [audited("F16", (0.1,))]
    draw_audit(Made(base=models[0], models=models, task="t", unrelated=None, level=0.5), [tmp_path / "a.png"])  # type: ignore[arg-type]
    low, high = saved[0].axes[0].get_xlim()
    assert high - low >= 0.04, "not the distance of the signs that are side by side"


def test_an_audit_of_many_quantizations(tmp_path: Path, saved: list[Any]) -> None:
    models = [audited("F16", (0.1, 0.2), 16), *(audited(f"some-model-Q{n}_K_M.gguf", (0.1, 0.2)) for n in range(2, 9))]
    draw_audit(Made(base=models[0], models=models, task="t", unrelated="u", level=0.5), [tmp_path / "a.png"])  # type: ignore[arg-type]
    assert not any(overlapping(axes) for axes in saved[0].axes)
    assert not any(axes.texts for axes in saved[0].axes), "names of lines that end together would lie on each other"
    assert [text.get_text() for text in saved[0].legends[0].get_texts()].count("its quantizations") == 1


@pytest.mark.parametrize("draw", [lambda: (table_map([[0.5]], 1),) * 2, lambda: (table_map([[1e-6, -1e-6]], 1),) * 2])
def test_maps_of_few_experts(tmp_path: Path, saved: list[Any], draw: Callable[[], Any]) -> None:
    plot_difference(*draw(), tmp_path / "a.png", ("a name that goes on and on and on " * 2, "b"))
    scatter, _, shared = saved[0].axes
    assert not overlapping(scatter)
    assert all(line.get_marker() == "o" for line in shared.get_lines()), "a point is seen"
    assert shared.get_xlim()[0] >= 0.5
