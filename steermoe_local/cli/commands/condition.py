"""steermoe condition."""

from __future__ import annotations

import datetime
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from ..._util.files import replacing, require_writable
from ...detection.checkpoint import CheckpointFile
from ...errors import UsageError
from ...maps.expert_map import ExpertMap
from ...maps.significance import DRAWS
from ...model_files.model_info import model_info
from ...models.shipped_maps import map_path
from ...pairs.pairs import PairsFile
from ...steering.plan_rules import BY, MAX_LAST
from ..options.common import (
    FILE,
    Parsed,
    check_resume,
    check_unfinished,
    json_option,
    lock_output,
    longest_prompt_option,
    output_option,
    require_distinct,
    resume_options,
    template_options,
)
from ..options.groups import in_help
from ..options.llama import RecordingFlags, recording_options
from ..options.model import model_option
from ..options.opening import open_model
from ..output import facts_table, print_json, print_verdict, say, say_written, warn
from ..streams import console
from .recording_display import RecordingDisplay

if TYPE_CHECKING:
    from ...evaluation.metrics.intervals import Interval
    from ...evaluation.studies.conditions.fit import ConditionFit

_PROMPT = 0


def _over(text: str) -> int:
    """Tokens of `last:N`, 0 for the prompt."""
    if text == "prompt":
        return _PROMPT
    name, _, number = text.partition(":")
    if name != "last" or not (number.isdecimal() and len(number) < 10 and 1 <= int(number) <= MAX_LAST):
        raise ValueError(f"{text!r} is neither prompt nor last:N, N from 1 to {MAX_LAST}.")
    return int(number)


@click.group("condition")
def condition() -> None:
    """Conditions of steering plans: steer only where the routing of a text says that it matters."""


# the ranges are those of ConditionOptions, which is imported with the native library
@condition.command("fit")
@in_help(rare=("by", "n_folds", "draws", "seed", "force", "ctx_size"))
@model_option
@click.option("--pairs", "pairs_file", type=FILE, required=True, help="Contrastive pairs, JSONL.")
@click.option(
    "--map",
    "map_name",
    metavar="MAP",
    help="Expert map of other pairs.  [default: one of these pairs, cross-fitted]",
)
@click.option(
    "--over",
    type=Parsed("span", int, _over),
    metavar="prompt|last:N",
    help="What is scored: the prompts, or the last N tokens of the replies.  [default: the prompts if they differ, "
    "else last:16]",
)
@click.option(
    "--by", type=click.Choice(BY), default=BY[0], show_default=True, help="Score of the map that weighs the experts."
)
@click.option(
    "--steer-when",
    type=click.Choice(["positive", "negative"]),
    default="negative",
    show_default=True,
    help="Side that the condition is to hold for.",
)
@click.option(
    "--folds", "n_folds", type=click.IntRange(3, 10), default=5, show_default=True, help="Parts of the pairs."
)
@click.option(
    "--draws",
    type=click.IntRange(19, 99_999),
    default=DRAWS,
    show_default=True,
    help="Swaps of the sides, for the control.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of folds and swaps.")
@click.option("--force", is_flag=True, help="Also with a map of another model of the same shape.")
@output_option("Report to write, JSON, with the scores of each pair.", required=False)
@click.option("--write-map", "map_file", type=FILE, help="Map of all pairs to write, for the rule; not with --map.")
@resume_options("Go on with an interrupted run, from the last batch that was recorded.")
@longest_prompt_option
@template_options
@recording_options
@json_option
def fit(
    model: Path,
    pairs_file: Path,
    map_name: str | None,
    over: int | None,
    by: str,
    steer_when: str,
    n_folds: int,
    draws: int,
    seed: int,
    force: bool,
    output: Path | None,
    map_file: Path | None,
    resume: bool,
    restart: bool,
    ctx_size: int,
    thinking: bool,
    template_arguments: dict[str, Any] | None,
    date: datetime.date | None,
    flags: RecordingFlags,
    as_json: bool,
) -> None:
    """Find the threshold of a condition `when MAP < X over prompt`, and how well it tells the sides apart.

    Scores the prompts of both sides as requests have them (but their last token, which draws the answer), or the ends
    of their replies, by how their routing leans: the mean over the tokens of the sum of the map's scores of the experts
    that a token selects. What is reported is of held-out pairs: each is scored by a map, and judged by a threshold,
    that other pairs have made. The control is the same with sides swapped at random. The model runs unsteered.

    With -o or --write-map, what is recorded is kept beside that file until it is written: an interrupted run goes on
    with the same command and --resume.

    \b
    Example:
      steermoe condition fit -m tiny --pairs pairs.jsonl --write-map lean.json -o condition.json
    """
    from ...evaluation.studies.conditions.fit import ConditionOptions, fit_condition

    if map_name is not None and map_file is not None:
        raise UsageError("--write-map writes the map that is made of the pairs, and --map gives one; leave out one")
    outputs = [path for path in (output, map_file) if path]
    require_distinct(*outputs)
    check_resume(resume, restart)
    if (resume or restart) and not outputs:
        raise UsageError("--resume, --restart: what is recorded is kept beside an output; give -o, or --write-map")
    checkpoint = CheckpointFile(outputs[0]) if outputs else None
    for path in [*outputs, *([checkpoint.path] if checkpoint else [])]:
        require_writable(path)
    pairs = PairsFile(pairs_file)
    for path in outputs[1:]:
        lock_output(path)
    if checkpoint:
        click.get_current_context().with_resource(checkpoint)  # the lock of the output, until the command ends
        check_unfinished(checkpoint, resume, restart)
        if restart:
            checkpoint.remove()
    expert_map = None if map_name is None else ExpertMap.load(map_path(map_name))
    facts = model_info(model)
    if expert_map is not None and map_name is not None:
        warn(*expert_map.identity.require_same(facts.require_moe(), map_name, str(model), force))
    behaviour = pairs_file.name.split(".")[0]
    options = ConditionOptions(
        over="prompt" if over == _PROMPT else over,
        by=by,
        steer_when=cast(Literal["positive", "negative"], steer_when),
        n_folds=n_folds,
        draws=draws,
        seed=seed,
        name=map_name or (str(map_file) if map_file else behaviour),
        force=force,
    )
    display = RecordingDisplay("condition fit")
    with open_model(facts, flags, max(ctx_size, flags.batch_size), path=model) as llama:
        try:
            with ExitStack() as shown:
                shown.enter_context(display.shown())
                found = fit_condition(
                    llama,
                    pairs,
                    expert_map,
                    options=options,
                    checkpoint=checkpoint,
                    on_skip=display.skipped,
                    on_batch=display.update,
                    on_recorded=shown.close,
                    behaviour=behaviour,
                    n_ctx=ctx_size,
                    **flags.context_arguments(),
                    thinking=thinking,
                    template_arguments=template_arguments,
                    date=date,
                )
        except KeyboardInterrupt:
            if checkpoint and checkpoint.exists():
                say(f"{display.summary()}; go on with the same command and --resume")
            raise
    report = {"format": "steermoe-condition", "version": 1, "verdict": _verdict(found), **found.to_dict()}
    if map_file:
        assert found.expert_map is not None
        found.expert_map.save(map_file)
    if output:
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", "utf-8", newline="\n")
    if checkpoint:
        checkpoint.remove()
    warn(*found.warnings)
    if found.condition is not None and not (map_name or map_file):
        say("the map of the condition is made of all these pairs; write it with --write-map FILE")
    if as_json:
        del report["pairs"]
        files = {"report": output and str(output), "written_map": map_file and str(map_file)}
        print_json({**report, **files, **display.figures()})
        return
    print_verdict(report["verdict"])
    console().print(facts_table(_rows(found)))
    if outputs:
        say_written(*outputs, before="\n")


def _verdict(found: ConditionFit) -> str:
    from ...evaluation.reports.verdicts import of_condition

    errors = [None if share is None else share.value for share in (found.false_alarms, found.misses)]
    return of_condition(*errors, differs=found.differs_from_shuffled)


def _rows(found: ConditionFit) -> list[tuple[str, str]]:
    steered, other = ("positive", "negative") if found.options.steer_when == "positive" else ("negative", "positive")
    skipped = f", {found.n_skipped} others skipped" if found.n_skipped else ""
    shared = "" if found.n_clusters == len(found.scores) else f", {found.n_clusters} that share no text"
    rows = [
        ("condition", f"when {found.when}" if found.when else "none: all spans have the same score"),
        ("pairs", f"{len(found.scores)}{shared}{skipped}; {found.options.n_folds} folds"),
    ]
    if found.auc is None or found.control is None or found.false_alarms is None or found.misses is None:
        return rows
    control = found.control
    verdict = (
        "differs from swapped sides: needed, not enough, as other words are routed otherwise, whatever they mean"
        if found.differs_from_shuffled
        else "does not differ from swapped sides: nothing to steer by"
    )
    return [
        *rows,
        ("AUC, held out", _plain(found.auc)),
        ("with sides swapped", f"{control.median:.2f}, 95% below {control.q95:.2f}; p = {control.p:.2g}"),
        ("false alarms", f"{found.false_alarms} of the {other} sides"),
        ("misses", f"{found.misses} of the {steered} sides"),
        ("", verdict),
    ]


def _plain(share: Interval) -> str:
    return f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})"
