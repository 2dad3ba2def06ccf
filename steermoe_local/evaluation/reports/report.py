"""An evaluation in words and tables: Markdown, and the same tables for a terminal."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..measuring.measurements import Answer
from ..metrics.formatting import draws_below, number, percent, points, signed
from ..metrics.intervals import Interval
from ..studies.control_runs import ControlResult
from ..studies.evaluate import Evaluation
from ..studies.signatures import NAMES

__all__ = [
    "Table",
    "control_rows",
    "escape",
    "examples",
    "how_to_repeat",
    "markdown",
    "markdown_table",
    "tables",
    "verdict",
]

_LONGEST = 100  # characters of an answer that is shown
_EXAMPLES = 4
_SPECIAL = re.compile(r"([\\`*_{}\[\]|#~$!])")


@dataclass(frozen=True)
class Table:
    """A table of texts; `note` stands below it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def verdict(evaluation: Evaluation) -> str:
    """The result in one line."""
    name, effect = evaluation.headline
    words = f"{name} {points(effect)} on {effect.n} items"
    for control in evaluation.controls:
        if control.kind == "random" and control.percentile is not None:
            words += f"; larger than {draws_below(control.percentile)} of {control.n} draws of random experts"
    fired = sorted({signature.name for signature in evaluation.signatures}, key=NAMES.index)
    return f"{words}; {'found: ' + ', '.join(fired) if fired else 'no failure signature'}"


def tables(evaluation: Evaluation) -> list[Table]:
    """Sides, effects, controls (if any were run), and what steering costs."""
    found = [_sides(evaluation), _effects(evaluation)]
    if evaluation.controls:
        found.append(_controls(evaluation))
    return [*found, _fluency(evaluation)]


def _sides(evaluation: Evaluation) -> Table:
    scale = evaluation.positive or "rate"
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
    return Table("Rates", ("side", "experts + / -", scale, *labels), tuple(rows), _method(evaluation.sides[0].rate))


def _effects(evaluation: Evaluation) -> Table:
    against = {"swing": "towards - away"}
    rows = [(against.get(name, f"{name} - unsteered"), points(e)) for name, e in evaluation.effects.items()]
    first = next(iter(evaluation.effects.values()))
    return Table(
        "Effects", ("difference", "points (95% interval)"), tuple(rows), _method(first) + ", over the same items"
    )


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
    rows = []
    for side in evaluation.sides:
        f = side.fluency
        rows.append(
            (
                side.name,
                number(f.perplexity, 2),
                number(f.perplexity_ratio, 3),
                number(f.kl, 4),
                percent(f.same_top),
                f"{f.distinct_2:.2f}",
                percent(f.looping),
                percent(f.empty),
                percent(f.cut),
                "-" if f.refused is None else str(f.refused),
            )
        )
    header = (
        "side",
        "perplexity",
        "ratio",
        "KL",
        "same top",
        "distinct-2",
        "looping",
        "empty",
        "cut",
        "benign refused",
    )
    return Table(
        "Fluency",
        header,
        tuple(rows),
        "perplexity, KL (nats) and same top token: on the neutral text; refused: benign prompts",
    )


def markdown(evaluation: Evaluation, command: str = "", pictures: Sequence[str] = ()) -> str:
    """A short report. `command` makes it again; `pictures` are names of files beside it."""
    facts, settings = evaluation.provenance, evaluation.provenance.get("settings", {})
    model: dict[str, Any] = facts.get("model", {})
    where = f" on {escape(str(model['file']))}" if "file" in model else ""
    parts = [f"# {escape(evaluation.steering['name'])}{where}", _asked(evaluation, model, settings), ""]
    parts += [f"**{escape(verdict(evaluation))}**", ""]
    for table in tables(evaluation):
        parts += [f"## {escape(table.title)}", "", markdown_table(table), ""]
    parts += ["## Failure signatures", ""]
    parts += [
        f"- **{signature.name}** ({signature.side}): {escape(signature.found)}. Rule: {escape(signature.rule)}."
        for signature in evaluation.signatures
    ] or [f"None of the rules fired ({', '.join(NAMES)})."]
    parts.append("")
    parts += [f"![{name}]({name})\n" for name in pictures]
    parts += ["## Some answers", "", markdown_table(examples(evaluation)), ""]
    digests = {"task": settings.get("task_sha256"), "map": evaluation.steering.get("map_sha256")}
    return "\n".join([*parts, *how_to_repeat(command, facts, digests)])


def _asked(evaluation: Evaluation, model: dict[str, Any], settings: dict[str, Any]) -> str:
    steering = evaluation.steering
    what = steering.get("map") or steering.get("bias") or steering["name"]
    side = f" to its side *{escape(steering['side'])}*" if steering.get("side") else ""
    n = evaluation.sides[0].rate.n
    sampling = settings.get("sampling", {})
    greedy = sampling.get("temperature", 0) == 0
    how = "greedily" if greedy else f"at temperature {sampling['temperature']:g} with seeds {settings.get('seeds')}"
    quantization = f" ({escape(str(model['quantization']))})" if model.get("quantization") else ""
    return (
        f"\nDoes {escape(str(what))} steer the model{quantization}{side}? {n} items of the task "
        f"{escape(evaluation.task)}, answered {how}."
    )


def how_to_repeat(
    command: str, about: Mapping[str, Any], digests: Mapping[str, str | None], first: str = ""
) -> list[str]:
    """The end of a report: the command that makes it again, tool, date, seed and digests (hex); `first` before them."""
    lines = ["## How to repeat it", "", *(["```sh", command, "```", ""] if command else [])]
    named = ", ".join(f"{name} {digest[:12]}" for name, digest in digests.items() if digest)
    return [*lines, f"{first}{about['tool']}, {about['created']}, seed {about['seed']}; SHA-256: {named}.", ""]


def examples(evaluation: Evaluation, n: int = _EXAMPLES) -> Table:
    """Answers of the items on which the sides differ most, the first of equal ones."""
    sides = [measured.answers for measured in evaluation.measurements]
    spread = [max(a.value for a in row) - min(a.value for a in row) for row in zip(*sides, strict=True)]
    chosen = sorted(sorted(range(len(spread)), key=lambda i: -spread[i])[:n])
    rows = [(sides[0][i].item, *(_shown(answers[i]) for answers in sides)) for i in chosen]
    return Table("Some answers", ("item", *(side.name for side in evaluation.sides)), tuple(rows))


def _shown(answer: Answer) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in answer.text).split())
    text = line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
    return f"{text or '(empty)'} [{answer.label}]"


def markdown_table(table: Table) -> str:
    """A table in Markdown; what stands in it is escaped."""
    rows = [table.header, tuple("---" for _ in table.header)]
    lines = ["| " + " | ".join(escape(cell) if rows[1] != row else cell for cell in row) + " |" for row in rows]
    lines += ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in table.rows]
    return "\n".join([*lines, *(["", f"({escape(table.note)})"] if table.note else [])])


def escape(text: str) -> str:
    """A text that stands in Markdown as it is: no markup, no HTML, no new line."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return _SPECIAL.sub(r"\\\1", html.escape(line, quote=False))


def _method(interval: Interval) -> str:
    names = {"wilson": "Wilson's intervals", "newcombe": "Newcombe's paired intervals", "bootstrap": "bootstrap"}
    return f"95%, {names[interval.method]}"
