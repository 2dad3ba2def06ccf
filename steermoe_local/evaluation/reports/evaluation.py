"""The report of an evaluation: tables, Markdown, and its picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..._util.files import StrPath
from ...maps.colours import LEAST_POINTS
from ..measuring.measurements import Answer
from ..metrics.formatting import draws_below, number, percent, points, signed
from ..metrics.intervals import Interval
from ..studies.controls.controls import ControlResult
from ..studies.evaluate import Evaluation
from ..studies.signatures import NAMES
from ..studies.steerings import EFFECT, NEGATIVE, POSITIVE
from .document import Block, Document, Heading, Listed, Table, Words, how_to_repeat, one_line, sections
from .figure import BLUE, GREY, RED, error_bars, legend_below, new_figure, plain, save, widen
from .verdicts import of_evaluation

_LONGEST = 100  # characters of an answer that is shown
_EXAMPLES = 4
_METHODS = {"wilson": "Wilson's intervals", "newcombe": "Newcombe's paired intervals", "bootstrap": "bootstrap"}


def statistics(evaluation: Evaluation) -> str:
    """The effect, its place among random draws and the failure signatures in one line."""
    name, effect = evaluation.headline
    words = f"{name} {points(effect)} on {effect.n} items"
    for control in evaluation.controls:
        if control.kind == "random" and control.percentile is not None:
            words += f"; larger than {draws_below(control.percentile)} of {control.n} draws of random experts"
    fired = sorted({signature.name for signature in evaluation.signatures}, key=NAMES.index)
    return f"{words}; {'found: ' + ', '.join(fired) if fired else 'no failure signature'}"


def tables(evaluation: Evaluation) -> list[Table]:
    """Sides, effects, where conditions held (if there are any), controls (if any were run), and side effects."""
    found = [_sides(evaluation), _effects(evaluation)]
    if any(measured.conditional for measured in evaluation.measurements):
        found.append(_conditions(evaluation))
    if evaluation.controls:
        found.append(_controls(evaluation))
    return [*found, _fluency(evaluation)]


def _sides(evaluation: Evaluation) -> Table:
    labels = sorted(
        {label for side in evaluation.sides for label in side.labels} - {"positive", "negative", "right", "wrong"}
    )
    rows = [
        (
            side.name,
            f"{side.n_active} / {side.n_inactive}",
            str(side.rate),
            *(percent(side.labels.get(label, 0.0)) for label in labels),
        )
        for side in evaluation.sides
    ]
    header = ("side", "experts + / -", evaluation.positive or "rate", *labels)
    return Table("Rates", header, tuple(rows), _method(evaluation.sides[0].rate))


def _effects(evaluation: Evaluation) -> Table:
    names = {EFFECT: f"{POSITIVE} - {NEGATIVE}"}
    rows = [(names.get(name, f"{name} - unsteered"), points(e)) for name, e in evaluation.effects.items()]
    note = _method(next(iter(evaluation.effects.values()))) + ", over the same items"
    return Table("Effects", ("difference", "points (95% interval)"), tuple(rows), note)


def _conditions(evaluation: Evaluation) -> Table:
    rows = [
        (side.name, percent(side.steered), percent(side.benign_steered))
        for side, measured in zip(evaluation.sides, evaluation.measurements, strict=True)
        if measured.conditional
    ]
    note = "share of the answers with a token, of reasoning or answer, that was drawn under a rule that steers"
    return Table("Steered answers", ("side", "of the task", "of benign prompts"), tuple(rows), note)


def _controls(evaluation: Evaluation) -> Table:
    name, effect = evaluation.headline
    return Table(
        f"Controls of the {name} ({signed(effect.value)} points)",
        ("experts or map", "draws", "size of the effect", "draws below", "p", "note"),
        control_rows(evaluation.controls),
        "size: mean and 95% range of |effect| in points; draws below: the real effect's percentile",
    )


def control_rows(controls: Iterable[ControlResult]) -> tuple[tuple[str, ...], ...]:
    """Rows on controls: kind, draws, size with its 95% range, draws below, p, note."""
    rows: list[tuple[str, ...]] = []
    for control in controls:
        if control.mean is None or control.low is None or control.high is None:
            rows.append((control.kind, "0", "-", "-", "-", control.note))
            continue
        size = f"{100 * control.mean:.0f} ({100 * control.low:.0f} to {100 * control.high:.0f})"
        below = "-" if control.percentile is None else draws_below(control.percentile)
        rows.append((control.kind, str(control.n), size, below, number(control.p, 3), control.note))
    return tuple(rows)


def _fluency(evaluation: Evaluation) -> Table:
    rows = [
        (
            side.name,
            number(side.fluency.perplexity, 2),
            number(side.fluency.perplexity_ratio, 3),
            number(side.fluency.kl, 4),
            percent(side.fluency.same_top),
            f"{side.fluency.distinct_2:.2f}",
            percent(side.fluency.looping),
            percent(side.fluency.empty),
            percent(side.fluency.cut),
            "-" if side.fluency.refused is None else str(side.fluency.refused),
        )
        for side in evaluation.sides
    ]
    texts = ("side", "perplexity", "ratio", "KL", "same top")
    answers = ("distinct-2", "looping", "empty", "cut", "benign refused")
    note = "perplexity, KL (nats) and same top token: on the neutral text; refused: benign prompts"
    return Table("Fluency", (*texts, *answers), tuple(rows), note)


def document(evaluation: Evaluation, command: str = "", pictures: Sequence[str] = ()) -> Document:
    """The report. `command` makes it again; `pictures` are names of files in the same folder."""
    facts, settings = evaluation.provenance, evaluation.provenance.get("settings", {})
    model: dict[str, Any] = facts.get("model", {})
    where = f" on {model['file']}" if "file" in model else ""
    fired = tuple(
        f"{signature.name} ({signature.side}): {signature.found}. Rule: {signature.rule}."
        for signature in evaluation.signatures
    )
    digests = {"task": settings.get("task_sha256"), "map": evaluation.steering.get("map_sha256")}
    blocks: list[Block] = [
        Words(f"{statistics(evaluation)}.", lead="In figures"),
        *_question(evaluation, model, settings),
        *sections(tables(evaluation), pictures),
        Heading("Failure signatures"),
        Listed(fired) if fired else Words(f"None of the rules fired ({', '.join(NAMES)})."),
        examples(evaluation),
        *how_to_repeat(command, facts, digests),
    ]
    return Document(f"{evaluation.steering['name']}{where}", of_evaluation(evaluation).text, tuple(blocks))


def _question(evaluation: Evaluation, model: dict[str, Any], settings: dict[str, Any]) -> list[Block]:
    steering = evaluation.steering
    what = steering.get("map") or steering.get("bias") or steering["name"]
    side = f" to its side {steering['side']}" if steering.get("side") else ""
    side += f" by the experts of largest {steering['rank']}" if "rank" in steering else ""
    n = evaluation.sides[0].rate.n
    sampling = settings.get("sampling", {})
    greedy = sampling.get("temperature", 0) == 0
    how = "greedily" if greedy else f"at temperature {sampling['temperature']:g} with seeds {settings.get('seeds')}"
    quantization = f" ({model['quantization']})" if model.get("quantization") else ""
    rules = settings.get("placement") or [rule["text"] for rule in steering.get("rules", ())]
    words = (
        f"Does {what} steer the model{quantization}{side}? {n} items of the task {evaluation.task}, answered {how}."
        + (" It is in force by the first of these rules that matches a token:" if rules else "")
    )
    return [Words(words), *([Listed(tuple(rules), code=True)] if rules else [])]


def examples(evaluation: Evaluation, n: int = _EXAMPLES) -> Table:
    """Answers of the items on which the sides differ most, the first of equal ones."""
    sides = [measured.answers for measured in evaluation.measurements]
    spread = [max(a.value for a in row) - min(a.value for a in row) for row in zip(*sides, strict=True)]
    chosen = sorted(sorted(range(len(spread)), key=lambda i: -spread[i])[:n])
    rows = [(sides[0][i].item, *(_shown(answers[i]) for answers in sides)) for i in chosen]
    return Table("Some answers", ("item", *(side.name for side in evaluation.sides)), tuple(rows))


def _shown(answer: Answer) -> str:
    line = one_line(answer.text)
    text = line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
    return f"{text or '(empty)'} [{answer.label}]"


def _method(interval: Interval) -> str:
    return f"95%, {_METHODS[interval.method]}"


#
# the picture
#


def draw_effect(evaluation: Evaluation, paths: Sequence[StrPath]) -> None:
    """Draw the rates of the sides, and the effect among its controls, to each of the paths (.png or .svg).

    Raises UsageError without matplotlib, or when a file cannot be written.
    """
    controls = [control for control in evaluation.controls if control.n]
    model = evaluation.provenance.get("model", {}).get("file", "")
    figure = new_figure((9 if controls else 5, 3.9), f"{evaluation.steering['name']} {model}", fontsize=10)
    axes = figure.subplots(1, 2, width_ratios=[1, 1.4], squeeze=False)[0] if controls else [figure.subplots()]
    _draw_rates(axes[0], evaluation)
    if controls:
        _draw_controls(axes[1], evaluation, controls)
    save(figure, paths)


_SHAPES = {"unsteered": "o", NEGATIVE: "v"}  # in grey, too, the sides differ


def _draw_rates(axes: Any, evaluation: Evaluation) -> None:
    colours = {"unsteered": GREY, NEGATIVE: BLUE}
    for x, side in enumerate(evaluation.sides):
        (value,), bars = error_bars([side.rate])
        axes.errorbar(
            x, value, yerr=bars, fmt=_SHAPES.get(side.name, "^"), color=colours.get(side.name, RED), capsize=4
        )
    names = [side.name for side in evaluation.sides]
    axes.set_xticks(range(len(names)), names)
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(-4, 104), ylabel=plain(f"{evaluation.positive or 'rate'}, %", 40))
    axes.set_title("rate, 95% intervals", fontsize=9, loc="left")
    axes.grid(axis="y", alpha=0.3)


def _draw_controls(axes: Any, evaluation: Evaluation, controls: Sequence[ControlResult]) -> None:
    name, effect = evaluation.headline
    axes.axhspan(100 * effect.low, 100 * effect.high, color=RED, alpha=0.15, lw=0)
    axes.axhline(100 * effect.value, color=RED, label=f"this steering, {name}")
    axes.axhline(0, color="#333333", lw=0.6)
    rng = np.random.default_rng(0)  # only to draw equal points side by side
    for x, control in enumerate(controls):
        across = x + rng.uniform(-0.2, 0.2, control.n)
        axes.plot(across, 100 * np.asarray(control.effects), "o", ms=3, color=GREY, alpha=0.7)
    axes.set_xticks(range(len(controls)), [f"{control.kind}\n{control.n}" for control in controls])
    axes.set(xlim=(-0.6, len(controls) - 0.4), ylabel=f"{name}, points")
    axes.set_title("the effect among its controls", fontsize=9, loc="left")
    axes.grid(axis="y", alpha=0.3)
    widen(axes, y=(-LEAST_POINTS, LEAST_POINTS))
    legend_below(axes, fontsize=8)
