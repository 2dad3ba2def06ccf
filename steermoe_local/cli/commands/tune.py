"""steermoe tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..._util.visible import visible
from ..._util.writing import remove
from ...errors import UsageError
from ...steering.bias_file import write_bias
from ..failures import EXIT_ERROR
from ..options.common import FILE, SHARE, lock_output
from ..options.evaluation_setup import RECORDS, REPORTS, EvaluationSetup, evaluation_options
from ..options.groups import in_help, is_given
from ..output import print_json, print_verdict, rich_table, say, say_written
from ..streams import console

_PICTURES = ("tuning.png", "tuning.svg")


@click.command()
@in_help(rare=("max_refusal_increase", "max_looping_increase", "choosing_share", "exhaustive", "bias_output"))
@evaluation_options(without=("activate", "deactivate", "preset"))
@click.option("--max-ppl-increase", type=SHARE, metavar="SHARE", help="Most increase of the perplexity, like 5%.")
@click.option("--max-kl", type=click.FloatRange(0), metavar="X", help="Most KL from the unsteered model, in nats.")
@click.option(
    "--max-refusal-increase",
    type=SHARE,
    metavar="SHARE",
    help="Most benign prompts refused beyond the unsteered model's, like 5%.",
)
@click.option(
    "--max-looping-increase",
    type=SHARE,
    metavar="SHARE",
    help="Most looping answers beyond the unsteered model's, like 5%.",
)
@click.option("--max-activate", type=click.IntRange(0), metavar="N", help="Promote no more experts.  [default: any]")
@click.option("--max-deactivate", type=click.IntRange(0), metavar="N", help="Suppress no more experts.  [default: any]")
@click.option(
    "--max-choices",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    metavar="N",
    help="Most choices to look at.",
)
@click.option(
    "--choosing-share",
    type=SHARE,
    default="50%",
    show_default=True,
    metavar="SHARE",
    help="Share of the items to choose on; the others are held out.",
)
@click.option(
    "--exhaustive", is_flag=True, help="Look at every choice there is, instead of searching: slow, to compare with."
)
@click.option(
    "--write",
    "bias_output",
    type=FILE,
    metavar="BIAS",
    help="Bias file to write.  [default: bias.gguf in the folder of the results]",
)
def tune(
    setup: EvaluationSetup,
    max_ppl_increase: float | None,
    max_kl: float | None,
    max_refusal_increase: float | None,
    max_looping_increase: float | None,
    max_activate: int | None,
    max_deactivate: int | None,
    max_choices: int,
    choosing_share: float,
    exhaustive: bool,
    bias_output: Path | None,
) -> None:
    """Find how many experts to steer: the strongest effect inside a budget of fluency.

    Searches along the order of |RD|, on a part of the items, and reports the effect on the others; docs/tuning.md says
    how. --reverse tunes the other side, --layers and --strength hold for all choices. With --steer the rules say where
    the choices of their map are in force, as --where does; their own numbers of experts are not used. OUT gets
    bias.gguf, summary.json, report.md, report.html, records.jsonl (all answers), tuning.png and tuning.svg. A search
    that was interrupted goes on with --resume.

    Exit status 1, and no bias, if nothing inside the budget has an effect, or if the held-out items do not confirm it.

    \b
    Examples:
      steermoe tune -m tiny --map digits-words --max-ppl-increase 5% -o out
      steermoe tune -m tiny --map digits-words --max-kl 0.05 --where answer -o out
      steermoe tune -m olmoe.gguf --map map.json --task questions.jsonl --max-kl 0.05 --max-refusal-increase 5% -o out
    """
    from ...evaluation.reports.tuning import draw_tuning, tuning_document, tuning_statistics, tuning_tables
    from ...evaluation.reports.verdicts import of_tuning
    from ...evaluation.studies.search import tune as search
    from ...evaluation.studies.search.candidate_evaluator import split
    from ...evaluation.studies.search.objective import Budget, search_space

    if exhaustive and is_given("max_choices"):
        raise UsageError("--max-choices is for the search, and --exhaustive looks at every choice; give one of them")
    budget = Budget(max_ppl_increase, max_kl, max_refusal_increase, max_looping_increase)
    # wrong input fails before anything is written or loaded
    steering = setup.map_steering
    whole = search_space(steering)
    split([str(item.id) for item in setup.task.items], setup.seed, choosing_share)
    budget.check_guards(*setup.guards)
    target = bias_output or setup.path("bias.gguf")
    if bias_output:
        lock_output(bias_output)
    setup.check_output("bias.gguf", "summary.json", *REPORTS, RECORDS, *_PICTURES)
    common: dict[str, Any] = {"seed": setup.seed, "share": choosing_share}
    n = len(setup.task.items)
    words = "every choice is looked at" if exhaustive else f"at most {max_choices} choices are looked at"
    shorter = "-n N, --max-activate N or --max-deactivate N" if exhaustive else "-n N or --max-choices N"
    with setup.evaluator(shorter=shorter) as evaluator:
        say(f"{whole.n_choices} choices there are; {words}, on {round(choosing_share * n)} of {n} items")
        if exhaustive:
            only = [None if most is None else range(most + 1) for most in (max_activate, max_deactivate)]
            result = search.exhaustive(evaluator, steering, budget, activate=only[0], deactivate=only[1], **common)
        else:
            limits: dict[str, Any] = {
                "max_activate": max_activate,
                "max_deactivate": max_deactivate,
                "max_trials": max_choices,
            }
            result = search.tune(evaluator, steering, budget, **limits, **common)
        # inside: should the disk be full now, --resume finds all answers
        drawn = setup.draw(lambda paths: draw_tuning(result, paths), _PICTURES)
        if result.bias is not None:
            write_bias(result.bias, target)
        else:  # the result of an earlier search would pass for this one's
            remove(target)
        facts = {"verdict": of_tuning(result).text, **result.to_dict()}
        data = setup.write_summary({**facts, "bias": str(target) if result.bias else None})
        setup.write_report(tuning_document(result, setup.command, drawn))
    if setup.as_json:
        print_json(data)
    else:
        print_verdict(of_tuning(result).text)
        for table in tuning_tables(result):
            console().print(rich_table(table), "")
        written = [setup.path("report.md"), *([target] if result.bias else [])]
        say_written(*written, before=f"{visible(tuning_statistics(result))}\n")
    if result.bias is None:
        if setup.as_json:
            say(visible(tuning_statistics(result)))
        raise SystemExit(EXIT_ERROR)
