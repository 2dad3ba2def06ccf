"""steermoe demo."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from ..._util.disk import cannot_write
from ..._util.visible import visible
from ..options.announcing import Announcer
from ..options.common import json_option, lock_output
from ..options.system_text import UserPath
from ..output import print_json, print_lines, progress_bar
from ..streams import console

if TYPE_CHECKING:
    from ...evaluation.demo import BehaviourResult, DemoResult


@click.command()
@click.option(
    "-o",
    "--output",
    type=UserPath(path_type=Path, file_okay=False),
    default="demo-output",
    show_default=True,
    help="Folder for counts, maps and bias files.",
)
@click.option(
    "-n", "--prompts", type=click.IntRange(1), default=40, show_default=True, help="Held-out prompts a behaviour."
)
@click.option("--draws", type=click.IntRange(1), default=5, show_default=True, help="Draws of random experts.")
@click.option("--full", is_flag=True, help="All held-out prompts and 20 draws.")
@click.option("-s", "--seed", type=int, default=0, show_default=True, help="Seed of the random experts.")
@click.option("-t", "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads.")
@json_option
def demo(output: Path, prompts: int, draws: int, full: bool, seed: int, threads: int, as_json: bool) -> None:
    """Detect and steer three behaviours of the embedded model, and measure what it does.

    Every figure is measured in this run, with greedy decoding, on prompts that detection has not seen.

    \b
    Example:
      steermoe demo --full --json
    """
    from ...evaluation.demo import n_answers, run_demo

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(output, error) from None
    lock_output(output, folder=True)
    n_prompts, n_random = (None, 20) if full else (prompts, draws)
    total, answered = n_answers(n_prompts, n_random), Counter[str]()
    announcer = Announcer("-n N or --draws N, without --full" if full else "-n N or --draws N")
    announcer.announce("demo", f"{total:,} answers")
    timed = announcer.timed(lambda *_: None)
    with progress_bar() as show:

        def progress(what: str, done: int, of: int) -> None:
            show(what, done, of)
            if not what.endswith(": detect"):
                answered[what] = done
                timed("demo", answered.total(), total)

        result = run_demo(
            output, n_prompts=n_prompts, n_random=n_random, seed=seed, n_threads=threads, progress=progress
        )
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result)


def _print(result: DemoResult) -> None:
    out = console()
    out.print(Text(visible(result.model.short), style="bold"))
    out.print(
        "A positive control: training tied these behaviours to known experts, so that it can be checked whether\n"
        "detection finds them and steering moves them. It does not show that such experts arise by themselves.\n"
        "In a small model trained as usual such experts arose; steering them changed how likely a behaviour is, and\n"
        "hardly the greedy answers (docs/results.md, Planted and not planted).\n"
    )
    table = Table(title="share of replies on the first side, greedy, held-out prompts", title_justify="left", box=None)
    for name in ("behaviour", "n", "away", "base", "toward", "swing", "random swing", "max |RD|", "planted found"):
        table.add_column(name, justify="left" if name == "behaviour" else "right")
    for b in result.behaviours:
        table.add_row(
            f"{b.positive} / {b.negative}",
            str(b.n),
            *(f"{rate:.0%}" for rate in (b.away, b.base, b.toward)),
            f"{100 * b.swing:+.0f} points",
            f"{100 * b.random_swing:.0f} (at most {100 * b.random_swing_max:.0f})",
            f"{b.max_abs_rd:.2f}",
            f"{b.planted_precision:.0%} of {b.planted_n}",
        )
    out.print(table)
    out.print()
    table = Table(
        title=f"side effects, base / toward / away; neutral tasks: {result.n_neutral} prompts",
        title_justify="left",
        box=None,
    )
    for name in ("behaviour", "experts +/-", "ill-formed", "exactly right", "neutral tasks right"):
        table.add_column(name, justify="left" if name == "behaviour" else "right")
    for b in result.behaviours:
        table.add_row(
            f"{b.positive} / {b.negative}",
            f"{b.n_active}/{b.n_inactive}",
            *map(_three, (b.ill_formed, b.exact, b.neutral)),
        )
    out.print(table)
    for b in result.behaviours:
        _print_examples(b)
    first = result.behaviours[0].name
    print_lines(
        f"\nrandom swing: {result.behaviours[0].n_random} draws of as many random experts, each against its reverse"
        f"\nfiles in {result.folder}/; try: steermoe run -m tiny --bias {result.folder / first}.toward.gguf --temp 0 "
        f'-p "What is three plus four?"'
        f"\n{result.seconds:.0f} s"
    )


def _three(values: dict[str, float]) -> str:
    return " / ".join(f"{values[name]:.0%}" for name in ("base", "toward", "away"))


def _print_examples(b: BehaviourResult) -> None:
    for example in b.examples:
        print_lines(f"\n> {example.prompt}")
        for name, reply in (("unsteered", example.base), (b.positive, example.toward), (b.negative, example.away)):
            print_lines(f"  {visible(name):>10}  {visible(reply)}")
