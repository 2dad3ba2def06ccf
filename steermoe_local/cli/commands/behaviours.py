"""steermoe behaviours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from ...behaviours import behaviour as find
from ...behaviours import behaviours as all_behaviours
from ..options.common import json_option
from ..output import print_json, print_lines
from ..streams import console

if TYPE_CHECKING:
    from ...behaviours import BuiltinBehaviour

_ANY = "any"


@click.command()
@click.argument("name", required=False)
@json_option
def behaviours(name: str | None, as_json: bool) -> None:
    """List the behaviours that ship with the package, or show one: its sides, pairs, and how answers are scored.

    Each has about 120 contrastive pairs, about 100 held-out prompts, and a scorer by rules. "errors" is the scorer's
    share of errors on labelled answers, "model" the model that it is for (any: any instruct model). NAME is also a
    task: --task builtin:NAME.

    \b
    Examples:
      steermoe behaviours
      steermoe behaviours formal
    """
    if name is not None:
        _show(find(name), as_json)
        return
    if as_json:
        print_json([one.to_dict() for one in all_behaviours()])
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("name", "sides", "model", "errors", "what for"):
        table.add_column(title, overflow="fold", justify="right" if title == "errors" else "left")
    for one in all_behaviours():
        table.add_row(*map(Text, (one.name, _sides(one), one.model or _ANY, _errors(one), one.about)))
    console().print(table)


def _show(one: BuiltinBehaviour, as_json: bool) -> None:
    """Everything about one behaviour, with two of its pairs."""
    pairs, heldout = one.pairs(), one.heldout()
    shown = [pairs[0], pairs[len(pairs) // 2]]
    if as_json:
        facts = {**one.to_dict(), "n_pairs": len(pairs), "n_heldout": len(heldout)}
        print_json({**facts, "examples": [pair.to_dict() for pair in shown]})
        return
    rows = [
        ("behaviour", f"{one.name} ({one.title})"),
        ("what for", one.about),
        ("model", one.model or "any instruct model"),
        ("positive side", f"{one.positive}: {one.like}"),
        ("negative side", f"{one.negative}: {one.unlike}"),
        ("directions", f"towards {one.positive} only" if one.one_way else "both"),
        ("pairs", f"{len(pairs)}"),
        ("held out", f"{len(heldout)} prompts, --task builtin:{one.name}"),
        ("scorer", f"{one.scorer}, wrong on {_errors(one)} of {one.n_labelled} labelled answers{_test(one)}"),
        ("files", f"{one.folder}"),
    ]
    lines = [f"{title:14} {text}" for title, text in rows]
    for pair in shown:
        # of a pair of messages the last is the answer
        prompt = pair.positive if isinstance(pair.positive, str) else pair.positive[-2].content
        lines += ["", f"prompt         {prompt}", f"{one.positive:14} {pair.positive_target}"]
        lines.append(f"{one.negative:14} {pair.negative_target}")
    print_lines("\n".join([*lines, "", f"steermoe learn {one.name} -m {one.model or 'MODEL'}"]))


def _test(one: BuiltinBehaviour) -> str:
    """The errors on answers that were written when the scorer was finished."""
    return f", on {one.n_test_errors} of the {one.n_test} that it was not written with in view" if one.n_test else ""


def _sides(one: BuiltinBehaviour) -> str:
    return f"{one.positive} only" if one.one_way else f"{one.positive} / {one.negative}"


def _errors(one: BuiltinBehaviour) -> str:
    return f"{one.error_rate:.1%}"
