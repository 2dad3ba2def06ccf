"""The parts of a report, and the report in Markdown; `html_report` makes a page of the same parts.

A report begins with its verdict in plain words; figures follow, then statistics, then how to repeat it.
"""

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
    """A table of texts; `note` is printed below it. In a report it has its title as heading, if there is one."""

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


@dataclass(frozen=True)
class Heading:
    """A heading below the report's title."""

    text: str


@dataclass(frozen=True)
class Words:
    """A paragraph; `lead` stands before it in bold, with a colon."""

    text: str
    lead: str = ""


@dataclass(frozen=True)
class Listed:
    """A list, of texts or of code."""

    items: tuple[str, ...]
    code: bool = False


@dataclass(frozen=True)
class Code:
    """A command that can be copied."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A picture by the name of its file in the report's folder."""

    name: str


Block = Table | Heading | Words | Listed | Code | Picture


@dataclass(frozen=True)
class Document:
    """A report: its title, the verdict in plain words, and what follows. All texts may be anybody's."""

    title: str
    verdict: str
    blocks: tuple[Block, ...]

    def markdown(self) -> str:
        """The report in Markdown; no text of it becomes markup."""
        parts = [f"# {escape(self.title)}", "", *([f"**{escape(self.verdict)}**", ""] if self.verdict else [])]
        for block in self.blocks:
            parts += [*_lines(block), ""]
        return "\n".join(parts)


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
    # an arrow opens no tag and no quotation, and people read the file as it is, too
    return _SPECIAL.sub(r"\\\1", html.escape(one_line(text), quote=False)).replace("-&gt;", "->")


def markdown_table(table: Table) -> str:
    """A table in Markdown, its texts escaped, without its title."""
    lines = ["| " + " | ".join(map(escape, row)) + " |" for row in (table.header, *table.rows)]
    lines.insert(1, "| " + " | ".join("---" for _ in table.header) + " |")
    return "\n".join([*lines, *(["", f"({escape(table.note)})"] if table.note else [])])


def _lines(block: Block) -> list[str]:
    """A part of a report in Markdown."""
    match block:
        case Table():
            return [*([f"## {escape(block.title)}", ""] if block.title else []), markdown_table(block)]
        case Heading():
            return [f"## {escape(block.text)}"]
        case Words():
            return [(f"**{escape(block.lead)}:** " if block.lead else "") + escape(block.text)]
        case Listed():
            return [f"- {_inline_code(item) if block.code else escape(item)}" for item in block.items]
        case Code():
            fence = _ticks(block.text, 3)
            return [f"{fence}sh", visible(block.text), fence]
        case Picture():
            return [f"![{escape(block.name)}]({block.name})"]


def _ticks(text: str, least: int) -> str:
    """So many backticks that none of the text's ends what they enclose."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _inline_code(text: str) -> str:
    ticks = _ticks(text, 1)
    edge = " " if "`" in text else ""
    return f"{ticks}{edge}{one_line(text)}{edge}{ticks}"


def sections(tables: Iterable[Table], pictures: Sequence[str] = ()) -> list[Block]:
    """Pictures by the names of their files, then the tables."""
    return [*map(Picture, pictures), *tables]


def how_to_repeat(
    command: str, metadata: Mapping[str, Any], digests: Mapping[str, str | None], first: str = ""
) -> list[Block]:
    """The end of a report: the command that makes it again, tool, date, seed and digests (hex); `first` before them."""
    named = ", ".join(f"{name} {digest[:12]}" for name, digest in digests.items() if digest)
    origin = f"{metadata['tool']}, {metadata['created']}, seed {metadata['seed']}"
    words = Words(f"{first}{origin}; SHA-256: {named}.")
    return [Heading("How to repeat it"), *([Code(command)] if command else []), words]
