"""steermoe fit."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from ...maps.expert_map import ExpertMap
from ...maps.ranks import require_effects
from ...model_files.model_info import model_info
from ...models.shipped_maps import map_path
from ...steering.bias_file import write_bias
from ..options.common import (
    check_resume,
    check_unfinished,
    json_option,
    output_option,
    resume_options,
    template_options,
)
from ..options.groups import in_help
from ..options.items import ItemFlags, decoder_arguments, interventions, item_options
from ..options.llama import RecordingFlags, recording_options
from ..options.model import model_option
from ..output import facts_table, print_json, print_verdict, say_written, warn
from ..streams import console

if TYPE_CHECKING:
    from ...attribution.fitted import Comparison, Fit, Shift

_MOST = 1e6
_SHORTER = "--evaluations N, --method none or fewer items"


# the ranges are those of FitOptions, which is imported with the native library
@click.command()
@in_help(rare=("neutral_name", "n_text", "method", "evaluations", "population", "bound", "seed", "force"))
@model_option
@click.option("--map", "map_name", required=True, metavar="MAP", help="Expert map with effects (steermoe attribute).")
@item_options
@output_option("Bias file to write.")
@click.option(
    "--budget",
    type=click.FloatRange(0, _MOST, min_open=True, max_open=True),
    required=True,
    metavar="KL",
    help="Most KL from the unsteered model on the neutral text, in nats per token, like 0.02.",
)
@click.option("--reverse", is_flag=True, help="Towards the negative side.")
@click.option(
    "--experts",
    "n_experts",
    type=click.IntRange(1, 1024),
    default=16,
    show_default=True,
    metavar="N",
    help="Experts that get a value, at most.",
)
@click.option(
    "--method",
    type=click.Choice(["cma", "none"]),
    default="cma",
    show_default=True,
    help="Refine the start by CMA-ES, or only find its scale.",
)
@click.option(
    "--evaluations",
    type=click.IntRange(1, 1 << 31),
    default=640,
    show_default=True,
    metavar="N",
    help="Steerings that the search measures.",
)
@click.option(
    "--population",
    type=click.IntRange(4, 1024),
    default=32,
    show_default=True,
    metavar="N",
    help="Steerings of a generation, which share their batches.",
)
@click.option(
    "--bound",
    type=click.FloatRange(0, _MOST, min_open=True, max_open=True),
    default=8.0,
    show_default=True,
    metavar="X",
    help="Largest value of an expert, in logits.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of the search.")
@click.option("--force", is_flag=True, help="Also with a map of another model of the same shape.")
@resume_options()
@template_options
@recording_options
@json_option
def fit(
    model: Path,
    map_name: str,
    item_flags: ItemFlags,
    output: Path,
    budget: float,
    reverse: bool,
    n_experts: int,
    method: str,
    evaluations: int,
    population: int,
    bound: float,
    seed: int,
    force: bool,
    resume: bool,
    restart: bool,
    thinking: bool,
    template_arguments: dict[str, Any] | None,
    date: datetime.date | None,
    flags: RecordingFlags,
    as_json: bool,
) -> None:
    """Fit a soft bias: a value for each expert that moves the answers most within a budget of KL.

    Starts from the effects and costs that steermoe attribute has found: values proportional to effect / cost, whose
    scale is measured. CMA-ES then changes the values, and what it finds is taken if it is better than the start on
    items that it has not seen. Both are measured at the end on the items that the attribution has kept to confirm, and
    on other neutral text. The pairs or the task are those of the attribution; docs/fit.md has the mathematics.

    What is computed is kept in OUTPUT.partial: an interrupted run goes on with the same command and --resume, and may
    be given another budget, or more evaluations.

    \b
    Example:
      steermoe fit -m tiny --pairs pairs.jsonl --map map2.json --budget 0.02 -o bias.gguf
    """
    from ...attribution.fit import fit as run
    from ...attribution.fitted import FitOptions
    from ...generation.answer_file import AnswerFile

    check_resume(resume, restart)
    kept = click.get_current_context().with_resource(AnswerFile(output))  # its lock, until the command ends
    check_unfinished(kept, resume, restart)
    path = map_path(map_name)
    expert_map = ExpertMap.load(path)
    require_effects(expert_map, str(path))
    options = FitOptions(
        budget=budget,
        n_experts=n_experts,
        method=cast(Literal["cma", "none"], method),
        evaluations=evaluations,
        population=population,
        bound=bound,
        reverse=reverse,
        n_text=item_flags.n_text,
        seed=seed,
        force=force,
        **decoder_arguments(flags),
    )
    facts = model_info(model)
    warn(*expert_map.identity.require_same(facts.require_moe(), map_name, str(model), force))
    rendering = {"thinking": thinking, "template_arguments": template_arguments, "date": date}
    with interventions(facts, model, item_flags, rendering, flags, kept, resume, _SHORTER) as (llama, items, common):
        result = run(llama, items, expert_map, options=options, **common)
    write_bias(result.bias, output)
    kept.discard()
    if result.confirmed_on is not None and not result.is_confirmed:
        warn(f"{output}: on other items the margin does not move to the wanted side by two standard errors")
    if result.confirmed_on is not None and result.confirmed_on.fitted.kl > budget:
        cost = result.confirmed_on.fitted
        warn(f"{output}: on other text the KL is {_with_error(cost.kl, cost.kl_se)}, above the budget of {budget:g}")
    verdict = _verdict(result)
    if as_json:
        print_json({"verdict": verdict, "bias": str(output), "bias_digest": result.bias.key, **result.to_dict()})
        return
    print_verdict(verdict)
    _print(result)
    say_written(output, before="\n")


def _verdict(result: Fit) -> str:
    from ...evaluation.reports.verdicts import of_fit

    found, options = result.confirmed_on, result.options
    if found is None:
        return of_fit(0.0, None, 0.0, options.budget, 0, confirmed=False).text
    moved, sign = found.fitted, -1 if options.reverse else 1
    return of_fit(
        sign * moved.change,
        moved.change_se,
        moved.kl,
        options.budget,
        found.n_items,
        confirmed=result.is_confirmed,
    ).text


def _print(result: Fit) -> None:
    start, fitted = result.start.dense(), result.bias.dense()
    searched = result.choice is not None and result.choice.taken == "search"
    rows = [
        (
            f"layer {layer}, expert {expert}",
            (f"{start[layer, expert]:+.2f} -> " if searched else "") + f"{fitted[layer, expert]:+.2f}",
        )
        for layer, expert in result.experts
    ]
    console().print(facts_table([("expert", "logits, start -> fitted" if searched else "logits"), *rows]))
    for name, compared in (("items and text of the fit", result.fitted_on), ("others", result.confirmed_on)):
        if compared is not None:
            console().print("", facts_table(_of(name, compared, searched)), sep="\n")
    if (choice := result.choice) is not None and choice.gain is not None and choice.gain_se is not None:
        verdict = "it was taken" if choice.taken == "search" else "the start was kept"
        console().print(
            f"\nthe search against the start, on {choice.n_items} items that it has not seen: "
            f"{choice.gain:+.3f} ± {choice.gain_se:.3f}"
            + ("" if choice.kl is None else f", KL {choice.kl:.4f} on other text")
            + f"; {verdict}"
        )
    console().print(
        f"{result.n_evaluations} steerings measured; margins and KL in nats per token, ± one standard error, budget "
        f"{result.options.budget:g}"
    )


def _of(name: str, compared: Comparison, searched: bool) -> list[tuple[str, str]]:
    """The rows of a comparison; without a search that was taken, the start is the fitted bias."""

    def shift(of: Shift) -> str:
        change, kl = _with_error(of.change, of.change_se, "+"), _with_error(of.kl, of.kl_se)
        return f"margin {of.margin:+.3f} ({change}), KL {kl}"

    rows = [
        (name, f"{compared.n_items} items, {compared.n_text} tokens"),
        ("unsteered", f"margin {compared.unsteered:+.3f}"),
        ("fitted", shift(compared.fitted)),
    ]
    if searched:
        rows[2:2] = [("start", shift(compared.start))]
        rows.append(("fitted - start", _with_error(compared.difference, compared.difference_se, "+")))
    return rows


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if error is None else f"{value:{sign}.4f} ± {error:.4f}"
