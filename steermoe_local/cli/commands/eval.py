"""steermoe eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...errors import UsageError
from ...pairs.pairs import load_pairs
from ..options.common import FILE
from ..options.evaluation_setup import RECORDS, EvaluationSetup, evaluation_options
from ..options.groups import is_given
from ..output import print_json, print_reports, say, say_written
from ..streams import console

if TYPE_CHECKING:
    from ...evaluation.studies.evaluate import Controls, Evaluation

_PICTURES = ("effect.png", "effect.svg")


@click.command("eval")
@evaluation_options(without=("where",))
@click.option("--no-away", is_flag=True, help="Do not measure the reverse.")
@click.option(
    "--controls/--no-controls", default=True, help="Measure random experts and control maps, too.  [default: controls]"
)
@click.option(
    "--control-draws",
    type=click.IntRange(1, 10_000),
    default=20,
    show_default=True,
    metavar="N",
    help="Draws of each random control.",
)
@click.option(
    "--pairs",
    "pairs_file",
    type=FILE,
    metavar="FILE",
    help="Pairs that the map was made from, for control maps.  [default: a shipped map's]",
)
def eval_(setup: EvaluationSetup, no_away: bool, controls: bool, control_draws: int, pairs_file: Path | None) -> None:
    """Measure whether a steering does what it should, and what it costs.

    Answers the items of a task unsteered, steered towards the map's positive side, and away from it; scores them, and
    gives rates and differences with 95% intervals, the same for random experts and control maps, and guards:
    perplexity and KL on a neutral text, loops, empty and cut answers, refusals of benign prompts. Of a plan of one
    choice of experts all this is measured where its rules steer; one of several is measured as a whole. Failures are
    named by the rule that found them (docs/evaluation.md). OUT gets summary.json, report.md, records.jsonl (all
    answers), effect.png and effect.svg. A run that was interrupted goes on with --resume.

    \b
    Examples:
      steermoe eval -m tiny --map digits-words -o out
      steermoe eval -m olmoe.gguf --map map.json --activate 10 --deactivate 50 --task questions.jsonl -o out
      steermoe eval -m tiny --steer "answer: digits-words" -o out
      steermoe eval -m olmoe.gguf --bias bias.gguf --task questions.jsonl --scorer contains --no-controls -o out
    """
    from ...evaluation.reports.evaluation import draw_effect, markdown, verdict
    from ...evaluation.studies.evaluate import evaluate
    from ...evaluation.studies.steerings import has_reverse

    steering = setup.whole  # wrong input fails before anything is written or loaded
    _ = setup.task, setup.scorer, setup.guards
    wanted = _controls(setup, control_draws, pairs_file) if controls else None
    for option, given in (("--pairs", pairs_file is not None), ("--control-draws", is_given("control_draws"))):
        if given and not controls:
            raise UsageError(f"{option} is for controls; leave it out, or --no-controls")
    setup.check_output("summary.json", "report.md", RECORDS, *_PICTURES)
    away = has_reverse(steering) and not no_away
    shorter = "-n N, --control-draws N or --no-controls" if wanted else "-n N or --no-away" if away else "-n N"
    with setup.evaluator(shorter=shorter) as evaluator:
        evaluation = evaluate(evaluator, steering, away=away, controls=wanted, seed=setup.seed)
        # inside: should the disk be full now, --resume finds all answers
        drawn = setup.draw(lambda paths: draw_effect(evaluation, paths), _PICTURES)
        data = setup.write_summary(evaluation.to_dict())
        setup.write("report.md", markdown(evaluation, setup.command, drawn))
    if setup.as_json:
        print_json(data)
        return
    _print(evaluation)
    say_written(setup.path("report.md"), before=f"\n{verdict(evaluation)}\n")


def _controls(setup: EvaluationSetup, n_draws: int, pairs_file: Path | None) -> Controls | None:
    from ...evaluation.measuring.opening import pairs_of
    from ...evaluation.studies.evaluate import Controls
    from ...steering.plan import SteeringPlan

    if isinstance(setup.whole, SteeringPlan):
        say(f"{setup.whole.name}: no controls, as its rules steer by several choices of experts")
        return None
    pairs = load_pairs(pairs_file) if pairs_file is not None else pairs_of(setup.steering)
    return Controls(n_draws=n_draws, pairs=pairs)


def _print(evaluation: Evaluation) -> None:
    from ...evaluation.reports.evaluation import tables

    print_reports(tables(evaluation))
    for signature in evaluation.signatures:
        console().print(
            f"\n{signature.name} ({signature.side}): {signature.found}\n  rule: {signature.rule}", markup=False
        )
