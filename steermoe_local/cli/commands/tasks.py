"""steermoe tasks: make tasks from data sets, check them, list what there is."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from ..._util.visible import visible
from ..failures import EXIT_ERROR
from ..options.common import (
    FILE,
    hub_offline_option,
    json_option,
    lock_output,
    other_model_option,
    output_option,
    selection_options,
    template_options,
)
from ..options.system_text import NameOrPath
from ..output import facts_table, print_json, print_left_out, say
from ..streams import console

if TYPE_CHECKING:
    from ...evaluation.measuring.task_check import TaskCheck

_SHOWN = 20  # problems that are printed; --json has them all


@click.group("tasks")
def tasks() -> None:
    """Make tasks for `eval` from data sets, check them, list what there is."""


@tasks.command()
@click.argument("layout")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--closed-book", is_flag=True, help="Leave the document out: what the model answers from memory.")
@click.option("--instruction", metavar="TEXT", help="Last lines of every prompt.  [default: the layout's]")
@click.option(
    "--answer-as",
    type=click.Choice(["letter", "text", "free"]),
    help="Multiple choice: compare the probabilities of letters or texts, or let the model write.  [default: letter]",
)
@click.option(
    "--match",
    type=click.Choice(["lenient", "strict"]),
    help="FaithEval: take any of its phrases, or one.  [default: lenient]",
)
@click.option(
    "--hops",
    type=click.Choice(["single", "multi"]),
    help="MQuAKE: ask for a changed fact, or what follows.  [default: single]",
)
@click.option("--all-questions", is_flag=True, help="MQuAKE: all three wordings of a multi-hop question.")
@click.option("--column", metavar="NAME", help="Column of the prompts in a list of prompts.")
@click.option("--answers", type=FILE, metavar="FILE", help="MCTest: the .ans of a .tsv.")
@click.option("--system", default="", metavar="TEXT", help="System prompt of the task.")
@click.option(
    "--max-tokens", type=click.IntRange(1), metavar="N", help="Longest answer.  [default: 64; 128 for lists of prompts]"
)
@click.option(
    "--max-chars",
    type=click.IntRange(1),
    default=200_000,
    show_default=True,
    help="Leave out longer items.",
    metavar="N",
)
@click.option("--name", "task_name", default="", metavar="TEXT", help="Name of the task.  [default: the layout's]")
@click.option("--license", "license_", default="", metavar="TEXT", help="Licence of the data, kept in the file.")
@selection_options("items")
@hub_offline_option
@output_option("Task file to write, JSONL.", metavar="FILE")
@json_option
def build(
    layout: str,
    sources: tuple[str, ...],
    column: str | None,
    answers: Path | None,
    system: str,
    max_tokens: int | None,
    task_name: str,
    license_: str,
    wanted: dict[str, Any],
    offline: bool,
    output: Path,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Make a task file from data in a known LAYOUT (`steermoe tasks list` names them).

    Each SOURCE is a file (JSON, JSON Lines, CSV, Parquet, compressed or not) or hub:USER/NAME:SPLIT. No data comes with
    the program. Data sets stand in some order, so --sample gives more variety than --limit.

    \b
    Examples:
      steermoe tasks build mquake MQuAKE-CF-3k-v2.json --sample 500 -o mquake.jsonl
      steermoe tasks build faitheval-unanswerable hub:Salesforce/FaithEval-unanswerable-v1.0:test -o unanswerable.jsonl
    """
    from ...evaluation.datasets.builders import (
        BuildOptions,
        Tally,
        dataset_rows,
        select,
        task_head,
        task_items,
        write_task,
    )
    from ...models import hub

    lock_output(output)
    options = BuildOptions(**chosen)
    head = task_head(layout, options, task_name=task_name, max_tokens=max_tokens, system=system, license=license_)
    formats = hub.ROWS + hub.TABLES
    paths = (path for name in sources for path in hub.local_files(name, offline=offline, formats=formats))
    tally = Tally()
    items = task_items(layout, dataset_rows(layout, paths, column=column, answers=answers), tally, options)
    write_task(select(items, tally, **wanted), output, head, tally)
    skipped = dict(sorted(tally.skipped.items()))
    if as_json:
        print_json(
            {
                "output": str(output),
                "items": tally.items,
                "sources": list(sources),
                "rows": tally.rows,
                "skipped": skipped,
                "task": head,
            }
        )
        return
    say(f"{tally.items:,} items from {tally.rows:,} rows of {', '.join(sources)}: {output}")
    print_left_out(skipped)


@tasks.command("list")
@json_option
def list_(as_json: bool) -> None:
    """What tasks ship, which layouts `build` reads, which scorers there are.

    \b
    Example:
      steermoe tasks list
    """
    from ...evaluation.datasets.builders import ADAPTERS
    from ...evaluation.tasks.builtin import BUILTIN, builtin_names, builtin_task
    from ...evaluation.tasks.scorers import SCORERS, option_names

    shipped = {name: builtin_task(name) for name in builtin_names()}
    if as_json:
        print_json(
            {
                "builtin": [
                    {"name": BUILTIN + name, "items": len(task.items), "scorer": task.scorer}
                    for name, task in shipped.items()
                ],
                "layouts": [
                    {"name": name, "what": layout.what, "source": layout.source, "columns": layout.columns}
                    for name, layout in ADAPTERS.items()
                ],
                "scorers": [{"name": name, "options": option_names(name)} for name in SCORERS],
            }
        )
        return
    out = console()
    tables = {
        "tasks that ship": [
            (BUILTIN + name, f"{len(task.items)} items, {task.positive} / {task.negative} ({task.scorer})")
            for name, task in shipped.items()
        ],
        "layouts of data sets that you bring": [
            (name, f"{layout.what}; {layout.source}") for name, layout in ADAPTERS.items()
        ],
        "scorers": [(name, ", ".join(option_names(name)) or "no options") for name in SCORERS],
    }
    for title, lines in tables.items():
        out.print(Text(title, style="bold"))
        out.print(facts_table(lines))
        out.print()


@tasks.command()
@click.argument("task_name", type=NameOrPath(), metavar="TASK")
@other_model_option("Count the prompts' tokens with this model's vocabulary and chat template.")
@click.option("--scorer", metavar="NAME", help="Check for this scorer.  [default: the task's]")
@template_options
@json_option
def check(
    task_name: str,
    model: Path | None,
    scorer: str | None,
    thinking: bool,
    template_arguments: dict[str, Any] | None,
    date: datetime.date | None,
    as_json: bool,
) -> None:
    """Read TASK (a file, or builtin:NAME) and check that every item has what its scorer needs.

    With a model, render and count all prompts; its vocabulary alone is loaded. Exit status 1 if an item cannot be used.

    \b
    Examples:
      steermoe tasks check builtin:digits-words -m tiny
      steermoe tasks check mquake.jsonl
    """
    from ...evaluation.measuring.task_check import check_task
    from ...evaluation.tasks.builtin import open_task

    task = open_task(task_name, scorer=scorer)
    found = check_task(task, model, thinking=thinking, template_arguments=template_arguments, date=date)
    if as_json:
        print_json({**found.to_dict(), "model": None if model is None else str(model)})
    else:
        _print(found)
    if found.problems:
        sys.exit(EXIT_ERROR)


def _print(found: TaskCheck) -> None:
    task, out = found.task, console()
    options = ", ".join(f"{key}={json.dumps(value)}" for key, value in task.options.items())
    rows = [
        ("task", visible(task.name)),
        (
            "items",
            f"{len(task.items):,}" + (f", usable {len(task.items) - len(found.problems):,}" * bool(found.problems)),
        ),
        ("scorer", task.scorer + (f" ({options})" if options else "")),
        ("sides", visible(f"{task.positive or 'right'} / {task.negative or 'wrong'}")),
        ("longest answer", f"{task.max_tokens} tokens"),
        ("licence", visible(task.license) or "not told"),
        ("sha256", task.sha256),
    ]
    if (n := found.lengths) is not None:
        figures = f"{n.shortest} to {n.longest}, mean {n.mean}, median {n.median:g}"
        rows += [
            ("prompt tokens", figures),
            ("context needed", f"{n.needed} of {n.trained or '?'} that the model was trained with"),
        ]
    out.print(facts_table(rows))
    for kind, entries in (("warnings", found.warnings), ("problems", found.problems)):
        if not entries:
            continue
        out.print(Text(f"\n{kind}: {len(entries)}", style="bold"))
        for name, reason in entries[:_SHOWN]:
            text = reason if kind == "problems" else f"{name}: {reason}"
            out.print(Text(f"  {visible(text)}"), soft_wrap=True)
        if len(entries) > _SHOWN:
            out.print(f"  and {len(entries) - _SHOWN} more (--json has them all)")
