"""steermoe audit."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import click

from ..._util.files import human_duration
from ...errors import UsageError
from ..options.common import SHARE, SHARES, WORDS
from ..options.evaluation_setup import NONE, EvaluationSetup, evaluation_options
from ..options.models_measured import COLUMNS, QuantizerBar, models_done, say_models_kept
from ..options.steering import SteeringFlags
from ..options.system_text import NameOrPath
from ..output import print_json, print_reports, say, say_written, warn
from ..streams import console

if TYPE_CHECKING:
    from ...evaluation.studies.audit.audit import Work
    from ...evaluation.studies.audit.perturbations import Perturbations
    from ...evaluation.studies.audit.results import Audit
    from ...evaluation.tasks.tasks import Scorer, Task

_PICTURES = ("audit.png", "audit.svg")
_STEERING = tuple(field.name for field in fields(SteeringFlags))  # experts are drawn, not chosen


@click.command()
@click.option(
    "--task",
    "task_name",
    type=NameOrPath(),
    metavar="TASK",
    help="Task whose positive side is the behaviour: a file (docs/tasks.md), or builtin:NAME.  [required]",
)
@evaluation_options(without=(*_STEERING, "benign_name", "task_name"))
@click.option(
    "--suppress",
    type=SHARES,
    metavar="RATES",
    help="Shares of each layer's experts to suppress, like 5%,10%, `none` for none.  [default: 5%,10%,20%,40%, those "
    "that the model can carry out]",
)
@click.option(
    "--promote",
    type=SHARES,
    metavar="RATES",
    help="The same to promote.  [default: a quarter, half and all of the experts that a token uses]",
)
@click.option(
    "--draws", type=click.IntRange(2, 10_000), default=20, show_default=True, metavar="N", help="Draws at each rate."
)
@click.option(
    "--layer-draws",
    type=click.IntRange(0, 10_000),
    default=10,
    show_default=True,
    metavar="N",
    help="Draws in each block of layers alone, at the highest rate, 0: no blocks.",
)
@click.option(
    "--blocks",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    metavar="N",
    help="Blocks of neighbouring layers, at most.",
)
@click.option(
    "--unrelated",
    "unrelated_name",
    type=NameOrPath(),
    metavar="TASK",
    help="Task that has nothing to do with the behaviour: a file, builtin:NAME, or `none`.  "
    "[default: builtin:neutral for the embedded model; for others the neutral text alone is compared]",
)
@click.option(
    "--level", type=SHARE, default="80%", show_default=True, metavar="SHARE", help="Less kept than this is broken."
)
@click.option(
    "--quants",
    type=WORDS,
    default=NONE,
    show_default=True,
    metavar="TYPE,...",
    help="Quantizations to make and measure as well, as llama-quantize names them.",
)
@click.option("--keep/--no-keep", default=False, help="Keep the quantized models in OUT/models.  [default: no-keep]")
def audit(
    setup: EvaluationSetup,
    suppress: tuple[float, ...] | None,
    promote: tuple[float, ...] | None,
    draws: int,
    layer_draws: int,
    blocks: int,
    unrelated_name: str | None,
    level: float,
    quants: tuple[str, ...],
    keep: bool,
) -> None:
    """Measure how a behaviour holds when random experts are suppressed or promoted.

    The behaviour is the task's positive side, on the items that show it unsteered: which share of them still does, at
    several rates, with intervals over items and draws; in which layers it breaks first; and whether it breaks before
    an unrelated task and the predictions of a neutral text do (docs/audit.md). With --quants the same on quantizations.
    Random draws are no attack: what holds here may break under experts that were chosen for it. OUT gets summary.json,
    report.md, audit.png, audit.svg, columns.jsonl, and all answers of each model. A run that was interrupted goes on
    with --resume.

    \b
    Examples:
      steermoe audit -m tiny --task builtin:refuse-comply -o out
      steermoe audit -m olmoe.gguf --task refusals.jsonl --scorer refusal --unrelated capitals.jsonl \\
        --suppress 10%,30% --promote none -o out
      steermoe audit -m olmoe-f16.gguf --task format.jsonl --quants Q8_0,Q4_K_M --draws 10 -o out
    """
    from ...evaluation.reports.audit import audit_markdown, draw_audit
    from ...evaluation.studies.audit.audit import audit_quantizations
    from ...evaluation.studies.audit.perturbations import Perturbations
    from ...evaluation.studies.audit.results import ModelAudit
    from ...evaluation.studies.transfer.quantize import Quantizer, file_type
    from ...generation.answer_file import AnswerFile

    kinds = [] if quants == (NONE,) else [file_type(name) for name in quants]
    wanted = Perturbations(suppress, promote, draws, layer_draws, blocks, setup.seed)
    if not 0 < level <= 1:
        raise UsageError(f"--level: {level:g} is no share above 0 and at most 1, like 80%")
    wanted.plan(setup.identity, range(setup.identity.n_layer))  # wrong input fails before anything is written or loaded
    setup = replace(setup, second=_unrelated(setup, unrelated_name))
    _ = setup.task, setup.scorer, setup.guards
    setup.check_output("summary.json", "report.md", COLUMNS, *_PICTURES)
    folder = setup.path("models")
    settings = _settings(setup, wanted)
    if kinds:
        quantizer = Quantizer(setup.facts, folder)
        warn(*filter(None, [quantizer.warning]))
        settings["base_sha256"] = quantizer.sha256
    with ExitStack() as stack:
        kept = stack.enter_context(AnswerFile(setup.path(COLUMNS)))
        done = {str(one.pop("id")): ModelAudit.from_dict(one) for one in models_done(setup, kept, settings)}
        stack.push(lambda kind, *_: say_models_kept(kept) if kind else None)
        bar = QuantizerBar()
        stack.callback(bar.close)
        found = audit_quantizations(
            setup.model,
            lambda path, name: setup.evaluator(model=path, kept=None if name in done else f"{name}.records.jsonl"),
            wanted,
            quants=[kind.name for kind in kinds],
            folder=folder,
            keep=keep,
            level=level,
            n_threads=setup.flags.threads,
            done=done,
            on_model=lambda model: kept.add({"id": model.name, **model.to_dict(items=True)}),
            on_work=_say_work,
            progress=bar,
        )
        drawn = setup.draw(lambda paths: draw_audit(found, paths), _PICTURES)
        data = setup.write_summary(found.to_dict())
        setup.write("report.md", audit_markdown(found, setup.command, drawn))
        kept.finish([model.name for model in found.models])
    if setup.as_json:
        print_json(data)
        return
    _print(found)
    say_written(setup.path("report.md"), before="\n")


def _unrelated(setup: EvaluationSetup, name: str | None) -> tuple[Task, Scorer] | None:
    """The task to compare with. Raises UsageError for the one that is audited."""
    found = setup.unrelated(name)
    if found is None or found[0].sha256 != setup.task.sha256:
        return found
    if name is None:
        return None
    raise UsageError(f"--unrelated {name}: is the task that is audited; name another, or `none`")


def _settings(setup: EvaluationSetup, wanted: Perturbations) -> dict[str, Any]:
    """What must be the same to go on with an interrupted run."""
    second, neutral = setup.guards
    return {
        **setup.metadata,
        **{name: value for name, value in asdict(wanted).items() if name != "seed"},
        "task_sha256": setup.task.sha256,
        "unrelated_sha256": None if second is None else second[0].sha256,
        "neutral_sha256": None if neutral is None else neutral.sha256,
        **setup.settings.to_dict(),
        "seed": setup.seed,
    }


def _say_work(work: Work) -> None:
    """How much there is to do, and how long it takes."""
    took = "" if work.seconds is None else f", about {human_duration(work.seconds)} at the unsteered model's speed"
    shorter = " (shorter with --draws N or -n N)"
    say(f"{work.name}: {work.n_steerings:,} random steerings, {work.n_answers:,} answers{took}{shorter}")


def _print(found: Audit) -> None:
    from ...evaluation.reports.audit import audit_tables, conclusions

    print_reports(audit_tables(found))
    for line in (*conclusions(found), *(f"note: {note}" for note in found.notes)):
        console().print(f"\n{line}", soft_wrap=True, markup=False)
