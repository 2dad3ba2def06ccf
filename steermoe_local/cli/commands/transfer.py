"""steermoe transfer."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from ...pairs.pairs import Pair, PairsFile, pairs_digest
from ..options.common import WORDS
from ..options.evaluation_setup import NONE, EvaluationSetup, evaluation_options
from ..options.models_measured import COLUMNS, QuantizerBar, models_done, say_models_kept
from ..options.system_text import NameOrPath
from ..output import print_json, print_reports, say, say_written, warn
from ..streams import console

if TYPE_CHECKING:
    from ...evaluation.studies.transfer.results import Transfer

_PICTURES = ("transfer.png", "transfer.svg")
_QUANTS = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0,Q3_K_M,Q2_K,IQ4_XS"


@click.command()
@evaluation_options(without=("benign_name", "reverse", "bias", "where"))
@click.option(
    "--pairs",
    "pairs_file",
    type=NameOrPath(),
    metavar="FILE",
    help="Pairs that the map was made from, for each model's own map; `none` for none.  [default: a shipped map's]",
)
@click.option(
    "--quants",
    type=WORDS,
    default=_QUANTS,
    show_default=True,
    metavar="TYPE,...",
    help="Quantizations to make, as llama-quantize names them.",
)
@click.option("--keep/--no-keep", default=False, help="Keep the quantized models in OUT/models.  [default: no-keep]")
@click.option(
    "--top-n", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="First experts to compare."
)
@click.option(
    "--n-agreement-tokens",
    "n_agreement",
    type=click.IntRange(1),
    default=500,
    show_default=True,
    metavar="N",
    help="Tokens on which routing and predictions are compared with the base's.",
)
def transfer(
    setup: EvaluationSetup, pairs_file: str | None, quants: tuple[str, ...], keep: bool, top_n: int, n_agreement: int
) -> None:
    """Quantize a model, and measure whether a map made on it serves the quantizations.

    Makes the quantizations with llama.cpp's quantizer. For each: how its own map agrees with the map (RD correlation,
    first experts), how its routing and its predictions agree with the base's on the same text, what steering by the map
    and by its own does on the task, perplexity, size, and the types that its tensors really have (docs/transfer.md).
    OUT gets summary.json, report.md, transfer.png, transfer.svg, a map and all answers of each model. A run that was
    interrupted goes on with --resume, without the models that are done.

    \b
    Examples:
      steermoe transfer -m tiny --map digits-words -o out
      steermoe transfer -m olmoe-f16.gguf --map map.json --pairs pairs.jsonl --task questions.jsonl \\
        --activate 10 --deactivate 50 --quants Q8_0,Q4_K_M --keep -o out
    """
    from ...evaluation.reports.transfer import draw_transfer, markdown
    from ...evaluation.studies.transfer.quantize import Quantizer, file_type
    from ...evaluation.studies.transfer.results import Column
    from ...evaluation.studies.transfer.transfer import transfer as measure
    from ...generation.answer_file import AnswerFile

    kinds = [file_type(name) for name in quants]  # an unknown name fails before anything is read
    steering = setup.steering  # wrong input fails before anything is written
    _ = setup.task, setup.scorer, setup.guards
    pairs = _pairs(setup, pairs_file)
    setup.check_output("summary.json", "report.md", COLUMNS, *_PICTURES)
    folder = setup.path("models")
    quantizer = Quantizer(setup.facts, folder)
    warn(*filter(None, [quantizer.warning]))
    names = ", ".join(kind.name for kind in kinds)
    say(f"transfer: the same on {len(kinds) + 1} models, one after the other: base, {names}")
    with ExitStack() as stack:
        kept = stack.enter_context(AnswerFile(setup.path(COLUMNS)))
        done = models_done(
            setup, kept, {**_settings(setup, pairs, top_n, n_agreement), "base_sha256": quantizer.sha256}
        )
        columns = {str(record.pop("id")): Column.from_dict(record, folder) for record in done}

        def keep_column(column: Column) -> None:
            kept.add({"id": column.name, **column.to_dict(items=True)})

        stack.push(lambda kind, *_: say_models_kept(kept) if kind else None)
        bar = QuantizerBar()
        stack.callback(bar.close)
        found = measure(
            setup.model,
            steering,
            lambda path, name: setup.evaluator(
                model=path,
                kept=None if name in columns else f"{name}.records.jsonl",
                shorter="-n N, fewer --quants or --pairs none",
            ),
            folder=folder,
            quants=[kind.name for kind in kinds],
            pairs=pairs,
            keep=keep,
            top_n=top_n,
            n_agreement=n_agreement,
            n_threads=setup.flags.threads,
            seed=setup.seed,
            done=columns,
            on_column=keep_column,
            on_map=lambda name, expert_map: expert_map.save(setup.path(f"{name}.map.json")),
            progress=bar,
        )
        drawn = setup.draw(lambda paths: draw_transfer(found, paths), _PICTURES)
        data = setup.write_summary(found.to_dict())
        setup.write("report.md", markdown(found, setup.command, drawn))
        kept.finish([found.base.name, *(column.name for column in found.columns)])
    if setup.as_json:
        print_json(data)
        return
    _print(found)
    say_written(setup.path("report.md"), before="\n")


def _pairs(setup: EvaluationSetup, name: str | None) -> Collection[Pair] | None:
    """The pairs that are named, else those of a shipped map."""
    from ...evaluation.measuring.opening import pairs_of

    if name == NONE:
        return None
    return PairsFile(name) if name is not None else pairs_of(setup.steering)


def _settings(setup: EvaluationSetup, pairs: Collection[Pair] | None, top_n: int, n_agreement: int) -> dict[str, Any]:
    """What must be the same to go on with an interrupted run."""
    neutral = setup.guards[1]
    steering = {key: value for key, value in setup.steering.to_dict().items() if key not in ("map", "name")}
    return {
        **setup.metadata,
        "steering": steering,
        "task_sha256": setup.task.sha256,
        "neutral_sha256": None if neutral is None else neutral.sha256,
        "pairs_sha256": None if pairs is None else pairs_digest(pairs),
        **setup.settings.to_dict(),
        "top_n": top_n,
        "n_agreement": n_agreement,
        "seed": setup.seed,
    }


def _print(found: Transfer) -> None:
    from ...evaluation.reports.transfer import conclusions, rates, table, types

    print_reports((table(found), rates(found), types(found)))
    for line in (*conclusions(found), *(f"note: {warning}" for warning in found.warnings)):
        console().print(f"\n{line}", soft_wrap=True)
