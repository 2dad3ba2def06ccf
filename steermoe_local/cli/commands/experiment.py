"""steermoe experiment."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import UsageError
from ...models.embedded import TINY
from ...pairs.pairs import load_pairs
from ..options.common import FILE
from ..options.evaluation_setup import RECORDS, EvaluationSetup, evaluation_options
from ..options.groups import is_default
from ..options.system_text import NameOrPath
from ..output import print_json, print_reports, say, say_written

if TYPE_CHECKING:
    from ...evaluation.experiments.experiments import ExperimentResult

_NAMES = ("random10", "top20", "activate-benign", "superficial", "random-matched", "layers", "routing-kinds")
_FILES = ("report.md", "summary.json", RECORDS)
_PICTURES = ("layers.png", "layers.svg")
_DEFAULTS = {"model": TINY, "map_file": "digits-words"}
_ABSENT = ("output", "reverse", "preset", "where")


@click.command()
@click.argument("name", type=click.Choice(_NAMES), metavar="NAME")
@evaluation_options(without=_ABSENT)
@click.option(
    "-o",
    "--output",
    "folder",
    type=FILE,
    allow_from_autoenv=False,
    metavar="DIR",
    help="Folder of the results; it is made.  [default: experiment-NAME]",
)
@click.option(
    "--draws", type=click.IntRange(1, 10_000), default=20, show_default=True, metavar="N", help="Draws of each control."
)
@click.option(
    "--pairs",
    "pairs_file",
    type=FILE,
    metavar="FILE",
    help="Pairs that the map was made from, for `superficial`.  [default: a shipped map's]",
)
@click.option(
    "--ability",
    type=NameOrPath(),
    metavar="TASK",
    help="Task that steering should leave alone, for `activate-benign`: a file, builtin:NAME, or `none`.  "
    "[default: builtin:neutral for the embedded model]",
)
def experiment(
    name: str, setup: EvaluationSetup, folder: Path | None, draws: int, pairs_file: Path | None, ability: str | None
) -> None:
    """Run a named experiment on a map, beside its control, and answer its question.

    \b
    random10         ten random experts: does the behaviour change?
    top20            the twenty experts of largest |RD|, both ways
    activate-benign  the behaviour's experts promoted: do neutral abilities stay?
    superficial      maps of pairs that differ in form alone
    random-matched   random experts that are activated as often
    layers           effect of each third of the depth, and of each layer
    routing-kinds    hard and soft rules, promoting or suppressing alone

    Without -m and --map it runs on the embedded model and its map digits-words. DIR gets report.md, summary.json and
    records.jsonl (all answers). A run that was interrupted goes on with --resume. docs/experiments.md says what each
    experiment steers, what it is compared with, and what result would speak for or against the map.

    \b
    Examples:
      steermoe experiment random10
      steermoe experiment top20 -m olmoe.gguf --map map.json --activate 10 --deactivate 50 --task questions.jsonl -o out
    """
    from ...evaluation.experiments.experiments import ExperimentSetup, run_experiment
    from ...evaluation.measuring.opening import pairs_of

    _check(name, setup, ability)
    setup = dataclasses.replace(setup, output=folder or Path(f"experiment-{name}"))
    steering = setup.steering  # wrong input fails before anything is written or loaded
    _ = setup.task, setup.scorer, setup.guards
    pairs = load_pairs(pairs_file) if pairs_file is not None else pairs_of(steering)
    harmless = setup.unrelated(ability) if name == "activate-benign" else None
    setup.check_output(*_FILES, *(_PICTURES if name == "layers" else ()))
    with setup.evaluator(shorter="-n N or --draws N") as evaluator:
        found = run_experiment(
            name,
            ExperimentSetup(
                evaluator,
                steering,
                pairs=pairs,
                ability=harmless,
                settings=setup.settings,
                n_draws=draws,
                seed=setup.seed,
                log=say,
            ),
        )
        # inside: should the disk be full now, --resume finds all answers
        data = setup.write_summary(found.to_dict())
        setup.write("report.md", found.markdown(setup.command, _draw(found, setup)))
    if setup.as_json:
        print_json(data)
        return
    print_reports(found.tables)
    say_written(setup.path("report.md"), before=f"\n{found.finding}\n")


def _check(name: str, setup: EvaluationSetup, ability: str | None) -> None:
    """Raise UsageError for an option without effect, and for the default map on another model."""
    from ...evaluation.tasks.builtin import is_embedded

    if ability is not None and name != "activate-benign":
        raise UsageError(f"--ability is for activate-benign; leave it out of {name}")
    if is_default("map_file") and "map" in setup.steering_flags.source and not is_embedded(setup.identity):
        raise UsageError(
            f"{setup.model}: which map? {_DEFAULTS['map_file']} is of the embedded model alone; give --map MAP, with "
            "--activate and --deactivate, and --task"
        )


def _draw(found: ExperimentResult, setup: EvaluationSetup) -> tuple[str, ...]:
    """The picture of an experiment by depth; names of the files for the report."""
    if "divided" not in found.figures:
        return ()
    from ...evaluation.measuring.json_values import from_plain
    from ...evaluation.reports.layers import draw_layers
    from ...evaluation.studies.layers import LayerEffects

    effects = from_plain(LayerEffects, found.figures["divided"])
    return setup.draw(lambda paths: draw_layers(effects, paths), _PICTURES)


def _with_defaults(command: Any) -> None:
    """Make the embedded model and its map the defaults."""
    for param in command.params:
        if param.name in _DEFAULTS:
            param.required, param.default, param.show_default = False, _DEFAULTS[param.name], True


_with_defaults(experiment)
