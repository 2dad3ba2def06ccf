"""The parts of a report in Markdown: tables, escaped text, and how to repeat it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..._util.visible import visible
from ..measuring.side_effects import Fluency
from ..metrics.formatting import number, percent

FLUENCY = ("perplexity ratio", "KL", "looping", "ill-formed", "benign refused")
"""Header of `fluency_cells`."""

_MOST_ROWS = 200  # of a table in a report
_SPECIAL = re.compile(r"([\\`*_{}\[\]|#~$!])")


@dataclass(frozen=True)
class Table:
    """A table of texts; `note` is printed below it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def cut(self, rest: str) -> Table:
        """At most as many rows as a page can show; `rest` names the file that has all."""
        if len(self.rows) <= _MOST_ROWS:
            return self
        words = f"the first {_MOST_ROWS} of {len(self.rows)} rows; {rest} has all"
        return replace(self, rows=self.rows[:_MOST_ROWS], note="; ".join(filter(None, [words, self.note])))


def fluency_cells(found: Fluency) -> tuple[str, ...]:
    """The side effects of a steering, under `FLUENCY`."""
    refused = None if found.refused is None else found.refused.value
    shares = (found.looping, found.ill_formed, refused)
    return (number(found.perplexity_ratio, 3), number(found.kl, 4), *map(percent, shares))


def one_line(text: str) -> str:
    """The text without control characters and with one space between words."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def escape(text: str) -> str:
    """The text as Markdown that shows it unchanged: no markup, no HTML, no new line."""
    return _SPECIAL.sub(r"\\\1", html.escape(one_line(text), quote=False))


def markdown_table(table: Table) -> str:
    """A table in Markdown, its texts escaped."""
    lines = ["| " + " | ".join(map(escape, row)) + " |" for row in (table.header, *table.rows)]
    lines.insert(1, "| " + " | ".join("---" for _ in table.header) + " |")
    return "\n".join([*lines, *(["", f"({escape(table.note)})"] if table.note else [])])


def sections(tables: Iterable[Table], pictures: Sequence[str] = ()) -> list[str]:
    """Lines of a report: pictures by the names of their files, then each table under its title."""
    parts = [f"![{name}]({name})\n" for name in pictures]
    for table in tables:
        parts += [f"## {escape(table.title)}", "", markdown_table(table), ""]
    return parts


def how_to_repeat(
    command: str, metadata: Mapping[str, Any], digests: Mapping[str, str | None], first: str = ""
) -> list[str]:
    """The end of a report: the command that makes it again, tool, date, seed and digests (hex); `first` before them."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    lines = ["## How to repeat it", "", *([f"{fence}sh", visible(command), fence, ""] if command else [])]
    named = ", ".join(f"{name} {digest[:12]}" for name, digest in digests.items() if digest)
    origin = f"{metadata['tool']}, {metadata['created']}, seed {metadata['seed']}"
    return [*lines, f"{first}{origin}; SHA-256: {named}.", ""]
