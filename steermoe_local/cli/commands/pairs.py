"""steermoe pairs: make pairs from data, and control pairs from pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from ..._util.records import csv_rows, rows
from ..._util.visible import visible
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
from ...pairs.choice_pairs import answer_pool, choice_pairs
from ...pairs.control_pairs import SURFACES, prompts_of, shuffled_pairs, superficial_pairs
from ...pairs.number_pairs import number_pairs
from ...pairs.pairs import Pair, load_pairs, save_pairs
from ..options.common import (
    FILE,
    hub_offline_option,
    json_option,
    lock_output,
    output_option,
    seed_option,
    selection_options,
)
from ..options.groups import together
from ..output import print_json, print_left_out, say
from .pairs_check import check

_SQUAD_COLUMNS = ("id", "context", "question", "answers", "is_impossible", "data", "paragraphs")
_SAFETY_COLUMNS = ("prompt", "response", "is_safe")
# what to do about rows that are left out for a reason
_TAKES = {
    "the document does not answer the question": "--keep-impossible takes such questions",
    "no answer that stands in the document": "--choices takes answers that the document holds word for word",
    "no other answer of the same kind is certainly wrong": "wrong answers are those of the other questions; give more",
    "is_safe is true": "pairs are made of rows with is_safe false",
    "is_safe is neither true nor false": "write true or false",
    "another number of cells than the header": "check the quotes and --delimiter",
}


@click.group("pairs")
def pairs() -> None:
    """Make contrastive pairs from data, check them on a model, make control pairs."""


pairs.add_command(check)


def _writes_pairs(make: Callable[..., tuple[Iterator[Pair], str]]) -> Callable[..., None]:
    """A command of what `make(tally, ...)` returns: it writes the pairs to -o, and tells their source and the tally.

    What was read and left out goes to stderr, or all of it to stdout as JSON.
    """

    @functools.wraps(make)
    def command(output: Path, as_json: bool, **arguments: Any) -> None:
        lock_output(output)
        tally = Tally()
        made, source = make(tally, **arguments)
        save_pairs(made, output, allow_empty=False, why_none=lambda: _why_none(tally, source))
        skipped = dict(sorted(tally.skipped.items()))
        if as_json:
            print_json(
                {"output": str(output), "pairs": tally.pairs, "source": source, "rows": tally.rows, "skipped": skipped}
            )
            return
        say(f"{tally.pairs:,} pairs from {tally.rows:,} rows of {source}: {output}")
        print_left_out(skipped)

    return together(output_option("Pairs file to write, JSONL."), json_option)(command)


@pairs.command()
@click.option("--squad", required=True, metavar="FILE|hub:ID", help="SQuAD: its JSON (v1.1, v2), or the hub's columns.")
@click.option("--keep-impossible", is_flag=True, help="Also questions that their document does not answer (v2).")
@click.option("--one-per-document", is_flag=True, help="Take one question of each document.")
@click.option(
    "--choices", is_flag=True, help="The document's answer against a wrong one of the same kind, behind one prompt."
)
@selection_options("pairs")
@hub_offline_option
@_writes_pairs
def faithfulness(
    tally: Tally,
    squad: str,
    keep_impossible: bool,
    one_per_document: bool,
    choices: bool,
    wanted: dict[str, Any],
    offline: bool,
) -> tuple[Iterator[Pair], str]:
    """A question with its document against the question alone; the question's tokens count.

    SQuAD's rows stand article by article, so --sample gives more variety than --limit. --choices makes pairs of one
    prompt and two answers, which `steermoe attribute` needs: the answer's tokens count. The wrong answer is that of
    another question, drawn by --seed; the file is read twice.

    \b
    Examples:
      steermoe pairs faithfulness --squad hub:rajpurkar/squad:validation --sample 500 -o faithful.jsonl
      steermoe pairs faithfulness --squad hub:rajpurkar/squad:validation --sample 500 --choices -o answers.jsonl
    """
    if choices and keep_impossible:
        raise UsageError(
            "--choices needs the document's answer, which --keep-impossible does without; give one of them"
        )
    paths = hub.local_files(squad, offline=offline)

    def data() -> Iterator[dict[str, Any]]:
        return squad_rows(row for path in paths for row in rows(path, _SQUAD_COLUMNS))

    if not choices:
        made = faithfulness_pairs(data(), tally, keep_impossible=keep_impossible, one_per_document=one_per_document)
        return select(made, tally, **wanted), squad
    if streams := [path for path in paths if path.is_fifo() or path.is_char_device()]:
        raise UsageError(f"{streams[0]}: not a file, and --choices reads the data twice; save it as a file")
    seed = wanted["seed"]
    pool = answer_pool(data(), seed=seed)
    made = choice_pairs(data(), tally, pool, seed=seed, one_per_document=one_per_document)
    return select(made, tally, **wanted), squad


@pairs.command()
@click.option(
    "--data", required=True, metavar="FILE|hub:ID", help="Rows with prompt, response, is_safe, as in BeaverTails."
)
@click.option(
    "--refusals",
    "refusals_file",
    type=FILE,
    help="Text file of refusals, one a line.  [default: a list of this program's own]",
)
@click.option("--one-per-prompt", is_flag=True, help="Take one response to each prompt.")
@selection_options("pairs")
@hub_offline_option
@_writes_pairs
def safety(
    tally: Tally,
    data: str,
    refusals_file: Path | None,
    one_per_prompt: bool,
    wanted: dict[str, Any],
    offline: bool,
) -> tuple[Iterator[Pair], str]:
    """A prompt that is refused against the same prompt with its unsafe response; the reply's tokens count.

    Uses the rows with is_safe false. The data is yours to bring; the file written holds its unsafe responses.

    \b
    Example:
      steermoe pairs safety --data beavertails.jsonl.gz --one-per-prompt --sample 500 -o safety.jsonl
    """
    refusals = [pair.positive_target for pair in prompts_of(refusals_file)] if refusals_file else REFUSALS
    found = _rows(data, offline, _SAFETY_COLUMNS)
    made = safety_pairs(found, tally, seed=wanted["seed"], refusals=refusals, one_per_prompt=one_per_prompt)
    return select(made, tally, **wanted), data


@pairs.command()
@click.option("-n", "--limit", type=click.IntRange(1), default=200, show_default=True, help="Number of pairs.")
@click.option(
    "--largest", type=click.IntRange(10, 9999), default=100, show_default=True, help="Largest number in them."
)
@seed_option
@_writes_pairs
def numbers(tally: Tally, limit: int, largest: int, seed: int) -> tuple[Iterator[Pair], str]:
    """Small tasks answered in digits against words; the answer's tokens count.

    \b
    Example:
      steermoe pairs numbers -n 100 -o numbers.jsonl
    """
    made = list(select(number_pairs(seed=seed, largest=largest), tally, limit=limit))
    if len(made) < limit:
        raise UsageError(f"only {len(made)} tasks with numbers up to {largest}; raise --largest or lower -n")
    tally.rows = len(made)
    return iter(made), f"numbers up to {largest}, seed {seed}"


@pairs.command("from-csv")
@click.argument("csv_file", metavar="FILE|hub:ID")
@click.option("--prompt-column", help="Column of the prompt.  [default: none, the sides are plain texts]")
@click.option("--positive-column", required=True, help="Column of the reply that shows the behaviour.")
@click.option("--negative-column", required=True, help="Column of the opposite reply.")
@click.option("--id-column", help="Column of the pairs' names.")
@click.option("--delimiter", help="The character between cells.  [default: the one that fits the header]")
@selection_options("pairs")
@hub_offline_option
@_writes_pairs
def from_csv(
    tally: Tally,
    csv_file: str,
    prompt_column: str | None,
    positive_column: str,
    negative_column: str,
    id_column: str | None,
    delimiter: str | None,
    wanted: dict[str, Any],
    offline: bool,
) -> tuple[Iterator[Pair], str]:
    """Two columns of a CSV file as replies to a third; the replies' tokens count.

    \b
    Example:
      steermoe pairs from-csv tone.csv --prompt-column question --positive-column polite --negative-column rude \\
        -o tone.jsonl
    """
    delimiter = "\t" if delimiter == "\\t" else delimiter
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise UsageError(f"--delimiter {delimiter!r}: not one character; for a tab write \\t")
    columns = [name for name in (prompt_column, positive_column, negative_column, id_column) if name is not None]
    found = (
        row
        for path in hub.local_files(csv_file, offline=offline, formats=hub.TABLES)
        for row in csv_rows(path, columns, delimiter)
    )
    made = column_pairs(
        found, tally, positive=positive_column, negative=negative_column, prompt=prompt_column, id_=id_column
    )
    return select(made, tally, **wanted), csv_file


@pairs.command()
@click.argument("prompts_file", metavar="FILE", type=FILE)
@click.option(
    "--kind",
    "kinds",
    type=click.Choice(list(SURFACES)),
    multiple=True,
    help="What differs; give it again for more.  [default: all in turn]",
)
@_writes_pairs
def superficial(tally: Tally, prompts_file: Path, kinds: tuple[str, ...]) -> tuple[Iterator[Pair], str]:
    """Control pairs: the same content on both sides, which differ in length, casing or format alone.

    FILE is a pairs file, or a text file with a prompt on each line. A behaviour's map should not look like theirs.

    \b
    Example:
      steermoe pairs superficial numbers.jsonl -o surface.jsonl
    """
    made = superficial_pairs(prompts_of(prompts_file), tally, kinds or tuple(SURFACES))
    return select(made, tally), str(prompts_file)


@pairs.command()
@click.argument("pairs_file", metavar="PAIRS", type=FILE)
@seed_option
@_writes_pairs
def shuffle(tally: Tally, pairs_file: Path, seed: int) -> tuple[Iterator[Pair], str]:
    """Control pairs: swap the sides of a random half, so that the sides mean nothing.

    The swapped ones get "~swapped" to their id. What a map of them shows is noise.

    \b
    Example:
      steermoe pairs shuffle numbers.jsonl --seed 1 -o shuffled.jsonl
    """
    loaded = load_pairs(pairs_file)
    tally.rows = tally.pairs = len(loaded)
    return unique_ids(shuffled_pairs(loaded, seed=seed)), str(pairs_file)


def _why_none(tally: Tally, source: str) -> str:
    """Why no pair was made of the source, with what takes the rows that were left out, where there is something."""
    cures = [cure for reason, cure in _TAKES.items() if reason in tally.skipped]
    return "; ".join([f"{source}, {visible(tally.why_none())}", *cures])


def _rows(source: str, offline: bool, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for path in hub.local_files(source, offline=offline):
        yield from rows(path, columns)
