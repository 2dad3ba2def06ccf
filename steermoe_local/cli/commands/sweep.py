"""steermoe sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ...errors import UsageError
from ...steering.rules import EQUAL
from ..options.common import strength_option
from ..options.evaluation_setup import RECORDS, EvaluationSetup, evaluation_options
from ..options.groups import is_default
from ..options.steering import SOFT_WEIGHTS
from ..output import print_json, rich_table, say, say_written
from ..streams import console

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ...evaluation.studies.search.grid import Grid, Plan
    from ...evaluation.studies.search.sweep import Sweep

_PICTURES = ("pareto.png", "pareto.svg")
_ALL = "all"
_MOST_ROWS = 60  # of a table on the terminal; the files have all


@click.command()
@evaluation_options(
    without=(
        *("activate", "deactivate", "layers", "mode", "strength", "cap", "weights", "preset"),
        "bias",  # the grid chooses experts of one map
    )
)
@click.option(
    "--activate",
    "activates",
    allow_from_autoenv=False,
    metavar="LIST",
    help="Numbers of experts to promote, like 0,5,10.  [default: 0]",
)
@click.option(
    "--deactivate",
    "deactivates",
    allow_from_autoenv=False,
    metavar="LIST",
    help="Numbers of experts to suppress, like 0..200:20.  [default: 0]",
)
@click.option(
    "--layers",
    "layer_ranges",
    allow_from_autoenv=False,
    multiple=True,
    metavar="A-B",
    help="Steer only these layers, like 3-7,9, or `all`; may be given again.  [default: all]",
)
@strength_option(
    "strengths",
    allow_from_autoenv=False,
    default="hard",
    show_default=True,
    metavar="LIST",
    help="`hard` for the hard rule, numbers for the soft one, like hard,2,4.",
)
@click.option(
    "--cap",
    "caps",
    allow_from_autoenv=False,
    metavar="LIST",
    help="Numbers for the capped rule, in logits, like 1,2,inf; alone, without the others.",
)
@click.option(*SOFT_WEIGHTS[0], "soft_weights", allow_from_autoenv=False, **SOFT_WEIGHTS[1])
@click.option("--both-ways", is_flag=True, help="Measure each choice towards the behaviour and away from it.")
@click.option(
    "--cost",
    type=click.Choice(["ppl", "kl"]),
    default="ppl",
    show_default=True,
    help="What the front is drawn over: perplexity or KL on the neutral text.",
)
def sweep(
    setup: EvaluationSetup,
    activates: str | None,
    deactivates: str | None,
    layer_ranges: tuple[str, ...],
    strengths: str,
    caps: str | None,
    soft_weights: str | None,
    both_ways: bool,
    cost: str,
) -> None:
    """Measure a map over a grid of choices: effect against fluency.

    All combinations of the lists are measured; a..b:step is a range, b included. Choices that the model cannot carry
    out are listed, those that steer equally are measured once. With --steer the rules say where the choices of their
    map are in force, as --where does; their own numbers of experts are not used. OUT gets summary.json, report.md,
    table.csv, records.jsonl (all answers), pareto.png and pareto.svg. A sweep that was interrupted goes on with
    --resume.

    \b
    Examples:
      steermoe sweep -m tiny --map digits-words --activate 0..4 --deactivate 0..4 --both-ways -o out
      steermoe sweep -m tiny --map digits-words --activate 0..4 --where "answer[0:8]" -o out
      steermoe sweep -m olmoe.gguf --map map.json --activate 0,5,10 --deactivate 0..200:20 --layers all \\
        --layers 4-11 --strength hard,2,4 --cap 1,2 --task questions.jsonl -o out
    """
    from ...evaluation.reports.sweep import sweep_csv, sweep_markdown, sweep_tables
    from ...evaluation.studies.search.grid import plan
    from ...evaluation.studies.search.sweep import sweep as run

    # wrong input fails before anything is written or loaded
    soft_or_hard = None if caps is not None and is_default("strengths") else strengths
    grid = _grid(activates, deactivates, layer_ranges, (soft_or_hard, caps, soft_weights), both_ways)
    steering = setup.map_steering
    planned = plan(steering, grid, setup.identity)
    if not planned.n_measured:
        raise UsageError(f"{planned}; nothing to measure: give --activate or --deactivate numbers above 0")
    n_items, guards = len(setup.task.items), setup.guards
    setup.check_output("summary.json", "report.md", "table.csv", RECORDS, *_PICTURES)
    with setup.evaluator(shorter="-n N, or fewer numbers") as evaluator:
        _announce(planned, n_items, 0 if guards[0] is None else len(guards[0][0].items))
        result = run(evaluator, steering, grid, cost="kl" if cost == "kl" else "ppl", seed=setup.seed)
        # inside: should the disk be full now, --resume finds all answers
        drawn = setup.draw(lambda paths: _draw(result, paths), _PICTURES)
        data = setup.write_summary(result.to_dict())
        setup.write("table.csv", sweep_csv(result))
        setup.write("report.md", sweep_markdown(result, setup.command, drawn))
    if setup.as_json:
        print_json(data)
        return
    for table in sweep_tables(result):
        if len(table.rows) <= _MOST_ROWS:
            console().print(rich_table(table), "")
    say_written(setup.path("report.md"))


def _grid(
    activates: str | None,
    deactivates: str | None,
    layer_ranges: tuple[str, ...],
    rules: tuple[str | None, str | None, str | None],
    both_ways: bool,
) -> Grid:
    """The grid of the lists; `rules` are strengths, caps and weights."""
    from ...evaluation.studies.search.grid import Grid, parse_caps, parse_numbers, parse_strengths
    from ...maps.expert_map import parse_layers

    if activates is None and deactivates is None:
        raise UsageError("which numbers of experts? give --activate LIST, --deactivate LIST or both, like 0..20:5")
    strengths, caps, weights = rules
    for layers in layer_ranges:
        if layers != _ALL:
            parse_layers(layers)
    return Grid(
        activate=parse_numbers(activates or "0", "--activate"),
        deactivate=parse_numbers(deactivates or "0", "--deactivate"),
        layers=tuple(None if layers == _ALL else layers for layers in layer_ranges) or (None,),
        strengths=parse_strengths(strengths, "--strength") if strengths is not None else (),
        caps=parse_caps(caps, "--cap") if caps is not None else (),
        weights=None if weights == EQUAL else weights,
        both_ways=both_ways,
    )


def _draw(result: Sweep, paths: Sequence[Path]) -> bool:
    from ...evaluation.reports.sweep import draw_sweep

    drawn = draw_sweep(result, paths)
    if not drawn:
        say("no picture: without a neutral text there is no price to draw the effect against")
    return drawn


def _announce(planned: Plan, n_items: int, n_benign: int) -> None:
    """How much work there is."""
    benign = f" and {n_benign} benign prompts" if n_benign else ""
    say(f"{planned}; each, and the unsteered model, answers {n_items} items{benign}")
