"""Builds task files from data sets: rows to items by the data set's adapter, selection of items, writing.

The same rows, seed and limits give the same file.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..._util.files import StrPath, replacing
from ...errors import FormatError, UsageError
from ...pairs.prompts import PromptItem
from ..tasks.scorers import make_scorer
from .adapter import ANSWER_AS, HOPS, MATCH, BuildOptions, DatasetAdapter, Row, Skipped
from .adapters import ADAPTERS

__all__ = [
    "ADAPTERS",
    "ANSWER_AS",
    "HOPS",
    "MATCH",
    "BuildOptions",
    "Tally",
    "dataset_rows",
    "select",
    "task_head",
    "task_items",
    "write_task",
]


@dataclass
class Tally:
    """Counts of a build: rows read, items made, and what was left out, by reason."""

    rows: int = 0
    items: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def skip(self, reason: str) -> None:
        """Count something that is left out."""
        self.skipped[reason] += 1


def dataset_rows(
    name: str, paths: Iterable[Path], *, column: str | None = None, answers: Path | None = None
) -> Iterator[Row]:
    """The rows of files of a data set. `column` names the one with the prompt in a list of prompts, `answers` MCTest's
    file of answers.

    Raises UsageError (no such adapter, an argument that does not apply), FormatError.
    """
    adapter = _adapter(name)
    if column is not None and not adapter.requests:
        raise UsageError(f"layout {name}: takes no --column; its columns are {', '.join(adapter.columns[0])}")
    for path in paths:
        yield from adapter.rows(path, column, answers)


def task_items(
    name: str, rows: Iterable[Row], tally: Tally, options: BuildOptions | None = None
) -> Iterator[PromptItem]:
    """Items of a task, made of a data set's rows; rows that give none are counted in `tally`.

    Raises UsageError (no such adapter, options that do not apply).
    """
    adapter, options = _adapter(name), options or BuildOptions()
    adapter.check(options)
    scorer = make_scorer(*adapter.scoring(options))
    for row in rows:
        tally.rows += 1
        try:
            if not row:
                raise Skipped("another number of cells than the header")
            found = list(adapter.items(row, options))
        except Skipped as reason:
            tally.skip(str(reason))
            continue
        for item in found:
            if isinstance(item, Skipped):
                tally.skip(str(item))
            elif len(item.content) + len(json.dumps(item.extra)) > options.max_chars:
                tally.skip(f"more than {options.max_chars:,} characters")
            else:
                try:
                    scorer.check(replace(item, id=""))
                except FormatError as error:  # without the item's name the reasons can be counted
                    tally.skip(str(error).removeprefix("item : ").split(";")[0][:120])
                else:
                    yield item if item.id else replace(item, id=f"row-{tally.rows}")


def select(
    items: Iterable[PromptItem],
    tally: Tally,
    *,
    skip: int = 0,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> Iterator[PromptItem]:
    """A selection of the items, each content once, each id once.

    After the first `skip` items: the first `limit`, or `sample` of them drawn at random over all (kept in the data's
    order), or all. A second item of the same id gets "-2" appended. Raises UsageError for `limit` with `sample`.
    """
    if limit is not None and sample is not None:
        raise UsageError("--limit takes the first items, --sample draws some of all; give one of them")
    unique: Iterator[PromptItem] = islice(_unique(items, tally), skip, None)
    if sample is not None:
        draw = random.Random(seed)
        keyed = ((draw.random(), number, item) for number, item in enumerate(unique))
        # the smallest random keys: one pass, and no more than `sample` items in memory
        drawn = heapq.nsmallest(sample, keyed, key=lambda entry: entry[:2])
        unique = iter([item for _, _, item in sorted(drawn, key=lambda entry: entry[1])])
    ids: Counter[str] = Counter()
    for item in islice(unique, limit):
        base = name = str(item.id)
        while name in ids:
            ids[base] += 1
            name = f"{base}-{ids[base]}"
        ids[name] += 1
        tally.items += 1
        yield item if name == base else replace(item, id=name)


def task_head(
    name: str,
    options: BuildOptions | None = None,
    *,
    task_name: str = "",
    max_tokens: int | None = None,
    system: str = "",
    license: str = "",
) -> dict[str, Any]:
    """The head of the task file of a data set; what is empty is left out. Raises UsageError."""
    adapter, options = _adapter(name), options or BuildOptions()
    adapter.check(options)
    scorer, scorer_options = adapter.scoring(options)
    head: dict[str, Any] = {
        "name": task_name or name + ("-closed-book" if options.closed_book else ""),
        "scorer": scorer,
        "options": scorer_options,
        "max_tokens": max_tokens or adapter.max_tokens,
        "system": system,
        "positive": adapter.positive,
        "negative": adapter.negative,
        "license": license,
    }
    try:
        json.dumps(head, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError("name, system, license: not text that UTF-8 can hold; write other letters") from None
    return {key: value for key, value in head.items() if value}


def write_task(items: Iterable[PromptItem], path: StrPath, head: dict[str, Any], tally: Tally | None = None) -> int:
    """Write a task file (a temporary one, renamed to `path` at the end) and return the number of items.

    Raises FormatError when there are no items, with the most frequent reasons in `tally`; UsageError when the file
    cannot be written.
    """
    n = 0
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps({"task": head}, ensure_ascii=False) + "\n")
        for item in items:
            if not isinstance(item.content, str):
                raise UsageError(f"item {item.id}: messages are not written; give a text")
            line = {"id": item.id, "prompt": item.content, **item.extra}
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            n += 1
        if not n:
            why = "; ".join(
                f"{count:,} left out: {reason}" for reason, count in (tally or Tally()).skipped.most_common(2)
            )
            raise FormatError(f"{path}: not written, there is no item to write" + (f" ({why})" if why else ""))
    return n


def _adapter(name: str) -> DatasetAdapter:
    if name not in ADAPTERS:
        raise UsageError(f"{name!r} is no layout; take one of {', '.join(ADAPTERS)}")
    return ADAPTERS[name]


def _unique(items: Iterable[PromptItem], tally: Tally) -> Iterator[PromptItem]:
    seen: set[bytes] = set()  # digests: the texts themselves need not stay
    for item in items:
        content = json.dumps([item.content, item.extra], ensure_ascii=False, sort_keys=True).encode("utf-8")
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest in seen:
            tally.skip("the same as an earlier item")
            continue
        seen.add(digest)
        yield item
