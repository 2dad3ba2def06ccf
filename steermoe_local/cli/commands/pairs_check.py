"""steermoe pairs check."""

from __future__ import annotations

import datetime
import functools
import json
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
from rich.text import Text

from ..._util.visible import visible
from ...detection.pair_check import CheckedPair, CheckedSide, Checker, candidates
from ..failures import EXIT_ERROR
from ..options.common import FILE, json_option, template_options
from ..options.model import model_option
from ..output import facts_table, print_json
from ..streams import TextConsole, console

_MAX_PROBLEMS = 10_000
_AROUND = 160  # characters shown before and behind a target
_visible = functools.partial(visible, lines=True)
_STYLES = {"positive": "bold green", "negative": "bold red"}


@click.command()
@click.argument("pairs_file", metavar="FILE", type=FILE)
@model_option
@click.option(
    "--limit", type=click.IntRange(0), default=5, show_default=True, help="Pairs to show; all of them are checked."
)
@click.option("--full", is_flag=True, help="Show the prompts as a whole.")
@click.option(
    "-c",
    "--ctx-size",
    type=click.IntRange(0),
    default=0,
    help="Warn of prompts with more tokens.  [default: the model's training context]",
)
@template_options
@json_option
def check(
    pairs_file: Path,
    model: Path,
    limit: int,
    full: bool,
    ctx_size: int,
    thinking: bool,
    template_arguments: dict[str, Any] | None,
    date: datetime.date | None,
    as_json: bool,
) -> None:
    """Render pairs with a model's chat template and find the targets, as recording will.

    Shows the targets in colour (in «» where there is none), counts tokens, and lists what cannot be located and why.
    Reads the model's vocabulary only. Exit status 1 if anything cannot be located.

    \b
    Example:
      steermoe pairs check numbers.jsonl -m tiny
    """
    tally = _Tally()
    shown: list[CheckedPair] = []
    with Checker(model, thinking=thinking, template_arguments=template_arguments, date=date) as checker:
        context = ctx_size or checker.training_context
        for candidate in candidates(pairs_file):
            pair = checker.check(candidate)
            tally.add(pair, context)
            if len(shown) < limit:
                shown.append(pair)
            if tally.is_full:
                break
        summary = tally.summary() | {"context": context, "template_arguments": checker.template_arguments}
        summary["date"] = checker.date
    if as_json:
        print_json({"file": str(pairs_file), "model": str(model), **summary})
    else:
        _print(console(), shown, summary, full)
    if summary["problems"]:
        sys.exit(EXIT_ERROR)


class _Tally:
    """What is kept of the pairs that were checked: lengths, problems and warnings."""

    def __init__(self) -> None:
        self._n = self._located = 0
        self._lengths: dict[str, dict[str, list[int]]] = {
            name: {"prompt_tokens": [], "target_tokens": []} for name in _STYLES
        }
        self._problems: list[dict[str, str]] = []
        self._warnings: list[dict[str, str]] = []

    @property
    def is_full(self) -> bool:
        """Whether there are too many problems to go on: a file of another kind may have one in each of its lines."""
        return len(self._problems) > _MAX_PROBLEMS

    def add(self, pair: CheckedPair, context: int) -> None:
        problems = [{"id": pair.id, "side": side, "reason": reason} for side, reason in pair.problems()]
        self._n += 1
        self._located += not problems
        self._problems += problems
        if self.is_full:
            reason = f"more than {_MAX_PROBLEMS} problems, checked no further; correct these first"
            self._problems.append({"id": pair.id, "side": "", "reason": reason})
        self._warnings += [{"id": pair.id, "side": side, "reason": reason} for side, reason in pair.warnings(context)]
        for side in pair.sides:
            if side.located:
                self._lengths[side.name]["prompt_tokens"].append(side.n_tokens)
                self._lengths[side.name]["target_tokens"].append(side.n_target)

    def summary(self) -> dict[str, Any]:
        return {
            "pairs": self._n,
            "located": self._located,
            "sides": {
                name: {what: _lengths(values) for what, values in lengths.items()}
                for name, lengths in self._lengths.items()
            },
            "problems": self._problems,
            "warnings": self._warnings,
        }


def _lengths(values: list[int]) -> dict[str, float]:
    if not values:
        return {"total": 0, "shortest": 0, "median": 0, "mean": 0, "longest": 0}
    return {
        "total": sum(values),
        "shortest": min(values),
        "median": median(values),
        "mean": round(mean(values), 1),
        "longest": max(values),
    }


def _print(out: TextConsole, shown: list[CheckedPair], summary: dict[str, Any], full: bool) -> None:
    say = functools.partial(out.print, soft_wrap=True)
    colour = out.is_terminal and out.color_system is not None and not out.no_color
    for pair in shown:
        say(Text(_visible(pair.id), style="bold"))
        for side in pair.sides:
            if side.located:
                say(_shown(side, full, colour=colour))
        for name, _ in pair.problems():
            say(Text(f"  {name or 'line'}: cannot be located, see the problems below", style="yellow"))
        say()
    switches = ", ".join(f"{name}={json.dumps(value)}" for name, value in summary["template_arguments"].items())
    rows = [
        ("pairs", f"{summary['pairs']}, located {summary['located']}"),
        ("template", switches or "no switch for thinking"),
        *([("date in prompts", summary["date"])] if summary["date"] else []),
    ]
    for name, lengths in summary["sides"].items():
        rows += [(name, "; ".join(f"{what.split('_')[0]} {_figures(lengths[what])}" for what in lengths))]
    out.print(facts_table(rows))
    for kind, style in (("warnings", ""), ("problems", "yellow")):
        if summary[kind]:
            say(Text(f"\n{kind}: {len(summary[kind])}", style="bold"))
        for entry in summary[kind]:
            name = f", {entry['side']}" if entry["side"] else ""
            say(Text(f"  {_visible(entry['id'])}{name}: {_visible(entry['reason'])}", style=style))


def _figures(lengths: dict[str, float]) -> str:
    return (
        f"tokens {lengths['total']:,} (a pair {lengths['shortest']} to {lengths['longest']}, "
        f"mean {lengths['mean']}, median {lengths['median']:g})"
    )


def _shown(side: CheckedSide, full: bool, *, colour: bool) -> Text:
    before, target, behind = side.parts
    if not full:
        before = ("…" + before[-_AROUND:]) if len(before) > _AROUND else before
        behind = (behind[:_AROUND] + "…") if len(behind) > _AROUND else behind
    text = Text(f"  {side.name}, {side.n_target} of {side.n_tokens} tokens: ")
    text.append(_visible(before), style="dim")
    text.append(_visible(target) if colour else f"«{_visible(target)}»", style=_STYLES[side.name])
    text.append(_visible(behind), style="dim")
    return text
