"""steermoe map."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from ..expert_map import ExpertMap
from ._common import console, facts_table, json_option, print_json


@click.group("map")
def map_() -> None:
    """Look at expert maps."""


@map_.command()
@click.argument("map_file", metavar="MAP", type=click.Path(path_type=Path))
@click.option("-n", "--top", type=click.IntRange(1), default=20, show_default=True, help="Experts to show.")
@json_option
def show(map_file: Path, top: int, as_json: bool) -> None:
    """Show a map: where it comes from, and its experts in the order of |RD|.

    \b
    Example:
      steermoe map show map.json -n 5
    """
    expert_map = ExpertMap.load(map_file)
    if as_json:
        print_json(
            {
                "model": expert_map.identity.to_dict(),
                "behaviour": expert_map.behaviour,
                "positive": expert_map.positive,
                "negative": expert_map.negative,
                "n_pairs": expert_map.n_pairs,
                "n1": expert_map.n1,
                "n2": expert_map.n2,
                "sha256": expert_map.sha256,
                "created": expert_map.created,
                "tool": expert_map.tool,
                "license": expert_map.license,
                "n_positive": int((expert_map.rd > 0).sum()),
                "n_negative": int((expert_map.rd < 0).sum()),
                "top": [{"layer": layer, "expert": expert, "rd": rd} for layer, expert, rd in expert_map.top(top)],
            }
        )
        return
    print_map(expert_map, top)


def print_map(expert_map: ExpertMap, top: int) -> None:
    """Print a map's origin and its first experts."""
    rd = expert_map.rd
    out = console()
    sides = f" ({expert_map.positive} / {expert_map.negative})" if expert_map.positive else ""
    rows = [
        ("behaviour", expert_map.behaviour + sides),
        ("model", expert_map.identity.short),
        ("pairs", f"{expert_map.n_pairs}, target tokens {expert_map.n1:,} / {expert_map.n2:,}"),
        ("experts", f"RD > 0: {int((rd > 0).sum())}, RD < 0: {int((rd < 0).sum())}"),
    ]
    out.print(facts_table(rows))
    out.print()
    table = Table(box=None, pad_edge=False)
    with_rates = expert_map.a1 is not None and expert_map.a2 is not None
    for name in ("layer", "expert", "RD", *(("p1", "p2") if with_rates else ())):
        table.add_column(name, justify="right")
    for layer, expert, value in expert_map.top(top):
        row = [str(layer), str(expert), f"{value:+.4f}"]
        if expert_map.a1 is not None and expert_map.a2 is not None:
            row += [
                f"{expert_map.a1[layer, expert] / expert_map.n1:.4f}",
                f"{expert_map.a2[layer, expert] / expert_map.n2:.4f}",
            ]
        table.add_row(*row)
    out.print(table)
