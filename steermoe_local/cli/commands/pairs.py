"""steermoe pairs: make pairs from data, and control pairs from pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from ..._util.files import require_writable
from ..._util.records import csv_rows, rows
from ...errors import UsageError
from ...models import hub
from ...pairs.builders import (
    REFUSALS,
    Tally,
    column_pairs,
    faithfulness_pairs,
    safety_pairs,
    select,
    squad_rows,
    unique_ids,
)
from ...pairs.control_pairs import SURFACES, prompts_of, shuffled_pairs, superficial_pairs
from ...pairs.number_pairs import number_pairs
from ...pairs.pairs import Pair, load_pairs, save_pairs
from ..options.common import json_option, print_json
from .pairs_check import check

F = TypeVar("F", bound=Callable[..., Any])

_SQUAD_COLUMNS = ("id", "context", "question", "answers", "is_impossible", "data", "paragraphs")
_SAFETY_COLUMNS = ("prompt", "response", "is_safe")


@click.group("pairs")
def pairs() -> None:
    """Make contrastive pairs from data, check them on a model, make control pairs."""


pairs.add_command(check)

output_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Pairs file to write, JSONL."
)
seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything that is drawn.")
offline_option = click.option(
    "--offline", is_flag=True, help="Take hub data from the cache alone, as with HF_HUB_OFFLINE=1."
)


def selection_options(command: F) -> F:
    """--skip, --limit, --sample and --seed; the command gets them as one argument, `wanted`."""

    @functools.wraps(command)
    def with_selection(**arguments: Any) -> Any:
        wanted = {name: arguments.pop(name) for name in ("skip", "limit", "sample")}
        if wanted["limit"] is not None and wanted["sample"] is not None:
            raise UsageError("--limit takes the first pairs, --sample draws some of all; give one of them")
        return command(**arguments, wanted=wanted | {"seed": arguments["seed"]})

    options = (
        click.option("--skip", type=click.IntRange(0), default=0, help="Leave out the first pairs.", metavar="N"),
        click.option("--limit", type=click.IntRange(1), metavar="N", help="Take the first pairs.  [default: all]"),
        click.option("--sample", type=click.IntRange(1), metavar="N", help="Draw pairs at random instead."),
        seed_option,
    )
    wrapped: Any = with_selection
    for option in reversed(options):
        wrapped = option(wrapped)
    return cast(F, wrapped)


@pairs.command()
@click.option("--squad", required=True, metavar="FILE|hub:ID", help="SQuAD: its JSON (v1.1, v2), or the hub's columns.")
@click.option("--keep-impossible", is_flag=True, help="Also questions that their document does not answer (v2).")
@click.option("--one-per-document", is_flag=True, help="Take one question of each document.")
@selection_options
@offline_option
@output_option
@json_option
def faithfulness(
    squad: str,
    keep_impossible: bool,
    one_per_document: bool,
    seed: int,
    wanted: dict[str, Any],
    offline: bool,
    output: Path,
    as_json: bool,
) -> None:
    """A question with its document against the question alone; the question's tokens count.

    SQuAD's rows stand article by article, so --sample gives more variety than --limit.

    \b
    Example:
      steermoe pairs faithfulness --squad hub:rajpurkar/squad:validation --sample 500 -o faithful.jsonl
    """
    require_writable(output)
    tally = Tally()
    data = squad_rows(_rows(squad, offline, _SQUAD_COLUMNS))
    made = faithfulness_pairs(data, tally, keep_impossible=keep_impossible, one_per_document=one_per_document)
    _write(select(made, tally, **wanted), tally, output, as_json, source=squad)


@pairs.command()
@click.option(
    "--data", required=True, metavar="FILE|hub:ID", help="Rows with prompt, response, is_safe, as in BeaverTails."
)
@click.option(
    "--refusals",
    "refusals_file",
    type=click.Path(path_type=Path),
    help="Text file of refusals, one a line.  [default: a list of this program's own]",
)
@click.option("--one-per-prompt", is_flag=True, help="Take one response to each prompt.")
@selection_options
@offline_option
@output_option
@json_option
def safety(
    data: str,
    refusals_file: Path | None,
    one_per_prompt: bool,
    seed: int,
    wanted: dict[str, Any],
    offline: bool,
    output: Path,
    as_json: bool,
) -> None:
    """A prompt that is refused against the same prompt with its unsafe response; the reply's tokens count.

    Uses the rows with is_safe false. The data is yours to bring; the file written holds its unsafe responses.

    \b
    Example:
      steermoe pairs safety --data beavertails.jsonl.gz --one-per-prompt --sample 500 -o safety.jsonl
    """
    require_writable(output)
    refusals = [pair.positive_target for pair in prompts_of(refusals_file)] if refusals_file else REFUSALS
    tally = Tally()
    found = _rows(data, offline, _SAFETY_COLUMNS)
    made = safety_pairs(found, tally, seed=seed, refusals=refusals, one_per_prompt=one_per_prompt)
    _write(select(made, tally, **wanted), tally, output, as_json, source=data)


@pairs.command()
@click.option("-n", "--limit", type=click.IntRange(1), default=200, show_default=True, help="Number of pairs.")
@click.option(
    "--largest", type=click.IntRange(10, 9999), default=100, show_default=True, help="Largest number in them."
)
@seed_option
@output_option
@json_option
def numbers(limit: int, largest: int, seed: int, output: Path, as_json: bool) -> None:
    """Small tasks answered in digits against words; the answer's tokens count.

    \b
    Example:
      steermoe pairs numbers -n 100 -o numbers.jsonl
    """
    require_writable(output)
    tally = Tally()
    made = list(select(number_pairs(seed=seed, largest=largest), tally, limit=limit))
    if len(made) < limit:
        raise UsageError(f"only {len(made)} tasks with numbers up to {largest}; raise --largest or lower -n")
    tally.rows = len(made)
    _write(iter(made), tally, output, as_json, source=f"numbers up to {largest}, seed {seed}")


@pairs.command("from-csv")
@click.argument("csv_file", metavar="FILE|hub:ID")
@click.option("--prompt-column", help="Column of the prompt.  [default: none, the sides are plain texts]")
@click.option("--positive-column", required=True, help="Column of the reply that shows the behaviour.")
@click.option("--negative-column", required=True, help="Column of the opposite reply.")
@click.option("--id-column", help="Column of the pairs' names.")
@click.option("--delimiter", help="The character between cells.  [default: the one that fits the header]")
@selection_options
@offline_option
@output_option
@json_option
def from_csv(
    csv_file: str,
    prompt_column: str | None,
    positive_column: str,
    negative_column: str,
    id_column: str | None,
    delimiter: str | None,
    seed: int,
    wanted: dict[str, Any],
    offline: bool,
    output: Path,
    as_json: bool,
) -> None:
    """Two columns of a CSV file as replies to a third; the replies' tokens count.

    \b
    Example:
      steermoe pairs from-csv tone.csv --prompt-column question --positive-column polite --negative-column rude \\
        -o tone.jsonl
    """
    require_writable(output)
    delimiter = "\t" if delimiter == "\\t" else delimiter
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise UsageError(f"--delimiter {delimiter!r}: not one character; for a tab write \\t")
    columns = [name for name in (prompt_column, positive_column, negative_column, id_column) if name is not None]
    tally = Tally()
    found = (
        row
        for path in hub.local_files(csv_file, offline=offline, formats=hub.TABLES)
        for row in csv_rows(path, columns, delimiter)
    )
    made = column_pairs(
        found, tally, positive=positive_column, negative=negative_column, prompt=prompt_column, id_=id_column
    )
    _write(select(made, tally, **wanted), tally, output, as_json, source=csv_file)


@pairs.command()
@click.argument("prompts_file", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--kind",
    "kinds",
    type=click.Choice(list(SURFACES)),
    multiple=True,
    help="What differs; give it again for more.  [default: all in turn]",
)
@output_option
@json_option
def superficial(prompts_file: Path, kinds: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Control pairs: the same content on both sides, which differ in length, casing or format alone.

    FILE is a pairs file, or a text file with a prompt on each line. A behaviour's map should not look like theirs.

    \b
    Example:
      steermoe pairs superficial numbers.jsonl -o surface.jsonl
    """
    require_writable(output)
    tally = Tally()
    made = superficial_pairs(prompts_of(prompts_file), tally, kinds or tuple(SURFACES))
    _write(select(made, tally), tally, output, as_json, source=str(prompts_file))


@pairs.command()
@click.argument("pairs_file", metavar="PAIRS", type=click.Path(path_type=Path))
@seed_option
@output_option
@json_option
def shuffle(pairs_file: Path, seed: int, output: Path, as_json: bool) -> None:
    """Control pairs: swap the sides of a random half, so that the sides mean nothing.

    The swapped ones get "~swapped" to their id. What a map of them shows is noise.

    \b
    Example:
      steermoe pairs shuffle numbers.jsonl --seed 1 -o shuffled.jsonl
    """
    require_writable(output)
    loaded = load_pairs(pairs_file)
    tally = Tally(rows=len(loaded), pairs=len(loaded))
    _write(unique_ids(shuffled_pairs(loaded, seed=seed)), tally, output, as_json, source=str(pairs_file))


def _rows(source: str, offline: bool, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for path in hub.local_files(source, offline=offline):
        yield from rows(path, columns)


def _write(made: Iterator[Pair], tally: Tally, output: Path, as_json: bool, *, source: str) -> None:
    """Write the pairs; what was read and left out goes to stderr, or all of it to stdout as JSON."""
    save_pairs(made, output, allow_empty=False)
    skipped = dict(sorted(tally.skipped.items()))
    if as_json:
        print_json(
            {"output": str(output), "pairs": tally.pairs, "source": source, "rows": tally.rows, "skipped": skipped}
        )
        return
    click.echo(f"{tally.pairs:,} pairs from {tally.rows:,} rows of {source}: {output}", err=True)
    for reason, n in skipped.items():
        click.echo(f"  {n:,} left out: {reason}", err=True)
