"""steermoe attribute."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, Literal, cast

import click

from ...maps.effects import ACTIONS, Effects
from ...maps.expert_map import ExpertMap
from ...model_files.model_info import model_info
from ...models.shipped_maps import map_path
from ..options.common import (
    Parsed,
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
from ..output import print_json, print_verdict, say_written, warn
from ..streams import console
from .map_effects import effects_table

_SHOWN = 20  # effects on the terminal; the map has all
_AUTO = 0  # draws until the first experts are stable
_SHORTER = "--draws N, --candidates N or fewer items"


def _draws(text: str) -> int:
    if text == "auto":
        return _AUTO
    if text.isdecimal() and 0 < int(text) < 1 << 31:
        return int(text)
    raise ValueError(f"{text!r} is neither `auto` nor a number of draws.")


@click.command()
@in_help(rare=("neutral_name", "n_text", "draws", "action", "rate", "steer", "first", "seed", "force"))
@model_option
@click.option("--map", "map_name", required=True, metavar="MAP", help="Expert map whose first experts are tried.")
@item_options
@output_option("Map to write, with RD and effects; may be MAP itself.")
@click.option(
    "--candidates",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    metavar="N",
    help="Experts with the largest |RD|; as many others are drawn at random as control.",
)
@click.option(
    "--draws",
    type=Parsed("draws", int, _draws),
    default="auto",
    show_default=True,
    metavar="N|auto",
    help="Random interventions of each action; auto: until the first experts are stable.",
)
@click.option(
    "--items",
    "n_items",
    type=click.IntRange(2),
    metavar="N",
    help="Items to use, half of them to confirm.  [default: all]",
)
@click.option(
    "--action",
    type=click.Choice(["both", *ACTIONS]),
    default="both",
    show_default=True,
    help="What is done to the candidates.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="P",
    help="Probability with which a draw takes a candidate.  [default: 0.12, less where layers would fill up]",
)
@click.option(
    "--steer",
    allow_from_autoenv=False,  # `run` has other rules
    type=click.Choice(["answer", "all"]),
    default="answer",
    show_default=True,
    help="Steer the answers only, whose prompt is then computed once, or the prompts, too.",
)
@click.option(
    "--first", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="Experts to confirm one by one."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of random draws.")
@click.option("--force", is_flag=True, help="Also with a map of another model of the same shape.")
@resume_options()
@template_options
@recording_options
@json_option
def attribute(
    model: Path,
    map_name: str,
    item_flags: ItemFlags,
    output: Path,
    candidates: int,
    draws: int,
    n_items: int | None,
    action: str,
    rate: float | None,
    steer: str,
    first: int,
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
    """Estimate which experts cause a behaviour: steer random sets of them, and see what the answers do.

    RD counts which experts differ between the sides; only an intervention shows which of them matter. The first experts
    of the map and as many others are promoted, and suppressed, at random, many sets in one batch. The response is the
    log-probability margin of the positive over the negative answer (pairs of one prompt and two answers), or of a
    task's right choices over the others. Each expert gets an effect, and a cost on neutral text, with standard errors;
    the first ones are tried alone on items that chose nothing. `--rank effect` then chooses experts by it.

    What is computed is kept in OUTPUT.partial: an interrupted run goes on with the same command and --resume, and may
    be given more draws.

    \b
    Example:
      steermoe attribute -m tiny --pairs pairs.jsonl --map map.json -o map2.json
    """
    from ...attribution.attribute import AttributionOptions
    from ...attribution.attribute import attribute as run
    from ...generation.answer_file import AnswerFile

    check_resume(resume, restart)
    kept = click.get_current_context().with_resource(AnswerFile(output))  # its lock, until the command ends
    check_unfinished(kept, resume, restart)
    expert_map = ExpertMap.load(map_path(map_name))
    options = AttributionOptions(
        n_candidates=candidates,
        draws=draws or "auto",
        n_items=n_items,
        actions=tuple(ACTIONS) if action == "both" else (action,),
        rate=rate,
        steer=cast(Literal["answer", "all"], steer),
        n_text=item_flags.n_text,
        first=first,
        seed=seed,
        **decoder_arguments(flags),
        force=force,
    )
    facts = model_info(model)
    warn(*expert_map.identity.require_same(facts.require_moe(), map_name, str(model), force))
    rendering = {"thinking": thinking, "template_arguments": template_arguments, "date": date}
    with interventions(facts, model, item_flags, rendering, flags, kept, resume, _SHORTER) as (llama, items, common):
        result = run(llama, items, expert_map, response=item_flags.response, options=options, **common)
    result.save(output)
    kept.discard()
    effects = result.effects
    assert effects is not None
    if as_json:
        print_json(
            {
                "verdict": _verdict(result),
                "map": str(output),
                "attribution": effects.facts.to_dict(),
                "effects": effects.rows(),
                **_of_rd(result),
            }
        )
        return
    print_verdict(_verdict(result))
    _print(result, effects)
    say_written(output, before="\n")


def _of_rd(expert_map: ExpertMap) -> dict[str, Any]:
    """How many of the first experts by RD have a significant effect by any action."""
    effects = expert_map.effects
    assert effects is not None
    by_rd = [i for i in range(len(effects.layer)) if not effects.control[i]]
    tried = {(int(effects.layer[i]), int(effects.expert[i])) for i in by_rd}
    acting = {(int(effects.layer[i]), int(effects.expert[i])) for i in by_rd if effects.significant[i]}
    return {"first_by_rd": len(tried), "of_them_with_an_effect": len(acting)}


def _verdict(expert_map: ExpertMap) -> str:
    from ...evaluation.reports.verdicts import of_effects

    counts, effects = _of_rd(expert_map), expert_map.effects
    assert effects is not None
    stable = all(effects.facts.stable.values())
    return of_effects(counts["first_by_rd"], counts["of_them_with_an_effect"], stable=stable)


def _print(expert_map: ExpertMap, effects: Effects) -> None:
    for part in effects_table(expert_map, _SHOWN):
        console().print(part)
    counts = _of_rd(expert_map)
    for action, n in effects.facts.n_draws.items():
        facts = effects.facts
        stable = "" if facts.stable[action] else "; not stable: give more draws"
        console().print(
            f"{action}: {n} draws, R2 on held-out draws {facts.r2[action]:.2f}; another run would find "
            f"{facts.agreement[action]:.0%} of its first {facts.first} experts again{stable}"
        )
    console().print(
        f"of the first {counts['first_by_rd']} experts by RD, {counts['of_them_with_an_effect']} have an effect; "
        f"effects in nats per token towards {expert_map.positive or 'the positive side'}, standard errors by the draws"
    )
