"""Markdown as a tree of a few elements, whose texts know where they stand in the source.

markdown-it-py parses (CommonMark with tables and strikethrough). Left out of it: HTML and images, which stay text, and
definitions of references, which would hide text. Links are those of http, https and mailto; others stay text. Bare
addresses of http and https are links, too, up to where linkify-it-py says that they end.

`tree` is made for texts of strangers: it is run in a child process with limits (`children.Worker`).
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linkify_it import LinkifyIt
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

MOST_CHARACTERS = 64 * 1024
MOST_NODES = 40_000
_NESTING = 60  # markdown-it-py drops the text of blocks below its limit, so `tree` gives up before that
_LINE_ENDS = re.compile("\r\n|\r|\n")
_LINK = re.compile(r"(?:https?://|mailto:)[^\x00-\x20\x7f]+", re.IGNORECASE)
_BARE = "bare address"  # the markup of the tokens of one
_BEFORE_BARE = re.compile(r"(?:\A|[^a-z0-9.+-])(https?)\Z", re.IGNORECASE)
_LONGEST_BARE = 2048
# code ends an address, and so do signs without a shape, which would hide where it leads
_BEHIND_BARE = re.compile("[`\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
_BLANKS = re.compile(r"[ \t]*")
_BREAK = re.compile(r" *\\?\n[ \t]*")
_BEFORE_CELLS = re.compile(r"[ \t>]*\|?")
_ALIGNED = re.compile(r"text-align:(left|center|right)")

# Where a text of tokens stands in the source: (its character, the source's character or None), the first of each part.
Places = Sequence[tuple[int, int | None]]

# The elements of a tree, by the token that opens them; "" for what has no element of its own.
_ELEMENTS = {
    "paragraph_open": "p",
    "heading_open": "",  # h1 to h6, by its tag
    "bullet_list_open": "ul",
    "ordered_list_open": "ol",
    "list_item_open": "li",
    "blockquote_open": "blockquote",
    "table_open": "table",
    "thead_open": "thead",
    "tbody_open": "tbody",
    "tr_open": "tr",
    "th_open": "th",
    "td_open": "td",
    "strong_open": "strong",
    "em_open": "em",
    "s_open": "s",
    "link_open": "a",
}


class TooMuchError(Exception):
    """A text is nested too deeply, or has too many parts."""


def answer(text: str) -> dict[str, Any]:
    """`{"blocks": tree(text)}`, or `{"limit": why}` for a text that has no tree; for a child process."""
    try:
        return {"blocks": tree(text)}
    except TooMuchError as error:
        return {"limit": str(error)}


def tree(text: str) -> list[dict[str, Any]]:
    """The blocks of a text, in order.

    An element is {tag, children} with `start` (of an ordered list), `align` (of a cell), `language` (of a code block)
    or `href` where they are there; blocks have `from`, where their first line begins. A text is {text, at}: its place
    in the source, None if unknown. Places are counted in JavaScript's characters (UTF-16).

    Raises TooMuchError.
    """
    if len(text) > MOST_CHARACTERS:
        raise TooMuchError(f"the text has more than {MOST_CHARACTERS} characters")
    return _Tree(text).blocks()


@functools.cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": _NESTING}).enable(["table", "strikethrough"])
    parser.disable(["reference", "image", "html_block", "html_inline", "text_join"])
    parser.inline.ruler.after("text", "bare_address", _bare_address)
    parser.validateLink = lambda url: _LINK.fullmatch(url) is not None  # type: ignore[method-assign]
    return parser


@functools.cache
def _addresses() -> LinkifyIt:
    from linkify_it import LinkifyIt

    return LinkifyIt()


def _bare_address(state: StateInline, silent: bool) -> bool:
    """The parser's rule for http://... and https://... as they stand in a text.

    The parser's own `linkify` reads all of the text before each "://", and has links without "http".
    """
    if state.linkLevel or not state.src.startswith("://", state.pos):
        return False
    scheme = _BEFORE_BARE.search(state.pending[-len(" https") :])
    if not scheme:
        return False
    begun = state.pos - len(scheme[1])
    text = _BEHIND_BARE.split(state.src[begun : min(begun + _LONGEST_BARE, state.posMax)], maxsplit=1)[0]
    found = _addresses().match_at_start(text)
    if not found:
        return False
    address = found.url.rstrip("*_~")  # which end emphasis
    if not state.md.validateLink(state.md.normalizeLink(address)):
        return False
    if not silent:
        state.pending = state.pending[: -len(scheme[1])]
        token = state.push("link_open", "a", 1)
        token.attrs, token.markup = {"href": state.md.normalizeLink(address)}, _BARE
        state.push("text", "", 0).content = address
        state.push("link_close", "a", -1).markup = _BARE
    state.pos = begun + len(address)
    return True


class _Tree:
    def __init__(self, text: str) -> None:
        ends = list(_LINE_ENDS.finditer(text))
        self._starts = [0, *(end.end() for end in ends)]
        self._lines = [
            text[start:stop]
            for start, stop in zip(self._starts, [*(end.start() for end in ends), len(text)], strict=True)
        ]
        wide = any(sign > "\uffff" for sign in text)
        self._units = [0, *accumulate(1 + (sign > "\uffff") for sign in text)] if wide else range(len(text) + 1)
        self._source = _LINE_ENDS.sub("\n", text).replace("\0", "\ufffd")  # as markdown-it would
        self._lines = self._source.split("\n")
        self._n_nodes = 0

    def blocks(self) -> list[dict[str, Any]]:
        root: dict[str, Any] = {"children": []}
        path = [root]
        cells = 0  # how far the line of the table's row has been read
        for token in _parser().parse(self._source):
            if token.level + 2 >= _NESTING:
                raise TooMuchError("the text is nested too deeply")
            if token.type == "tr_open":
                cells = 0
            if token.type == "inline":
                places, cells = self._inline_places(token, path[-1]["tag"], cells)
                self._add_inline(path[-1], token, places)
            elif token.type in ("fence", "code_block"):
                self._add_code(path[-1], token)
            elif token.type == "hr":
                self._element(path[-1], "hr", token)
            elif token.nesting > 0:
                if token.type == "paragraph_open" and token.hidden:  # of a tight list
                    path.append(path[-1])
                else:
                    path.append(self._element(path[-1], _ELEMENTS[token.type] or token.tag, token))
            elif token.nesting < 0:
                path.pop()
            else:
                raise AssertionError(token.type)
        found: list[dict[str, Any]] = root["children"]
        return found

    def _element(self, into: dict[str, Any], tag: str, token: Token) -> dict[str, Any]:
        made: dict[str, Any] = {"tag": tag, "children": []}
        if "tag" not in into and token.map:
            made["from"] = self._units[self._starts[token.map[0]]]
        if tag == "ol" and "start" in token.attrs:
            made["start"] = int(token.attrs["start"])
        if tag in ("th", "td") and (found := _ALIGNED.fullmatch(str(token.attrs.get("style", "")))):
            made["align"] = found[1]
        if tag == "a":
            made["href"] = str(token.attrs["href"])
        self._add(into, made)
        return made

    def _add(self, into: dict[str, Any], node: dict[str, Any]) -> None:
        self._n_nodes += 1
        if self._n_nodes > MOST_NODES:
            raise TooMuchError(f"the text has more than {MOST_NODES} parts")
        into["children"].append(node)

    #
    # places
    #

    def _line_places(self, content: str, first: int) -> Iterator[tuple[int, int | None]]:
        """The places of lines that stand in the source from a line on, without what encloses them (`> `, blanks)."""
        at = 0
        for number, line in enumerate(content.split("\n"), first):
            column: int | None = None
            if number < len(self._lines):
                source = self._lines[number]
                column = len(source) - len(line) if source.endswith(line) else source.rfind(line.strip())
                if not source.endswith(line):
                    column = None if column < 0 else column - (len(line) - len(line.lstrip()))
            yield at, None if column is None or column < 0 else self._starts[number] + column
            at += len(line) + 1

    def _inline_places(self, token: Token, tag: str, cells: int) -> tuple[Places, int]:
        """The places of the text of a paragraph, heading or cell, and how far the row of cells has been read then."""
        if token.map is None:
            return [(0, None)], cells
        first, last = token.map
        line = self._lines[first]
        if tag in ("th", "td"):
            return self._cell_places(token.content, first, cells)
        if tag[0] == "h" and last == first + 1:  # "## text ##"; one underlined by === has two lines
            begun = re.compile("#+").search(line)
            column = line.find(token.content, begun.end() if begun else 0)
            return [(0, None if column < 0 else self._starts[first] + column)], cells
        return list(self._line_places(token.content, first)), cells

    def _cell_places(self, content: str, number: int, column: int) -> tuple[Places, int]:
        line = self._lines[number]
        if column == 0:
            found = _BEFORE_CELLS.match(line)
            column = found.end() if found else 0
        column = line.find(content.replace("|", "\\|"), column)
        if column < 0:
            return [(0, None)], len(line)
        start = self._starts[number] + column
        pipes = [i for i, sign in enumerate(content) if sign == "|"]  # each stands behind a backslash
        places = [(0, start), *((i, start + i + n) for n, i in enumerate(pipes, 1))]
        end = line.find("|", column + len(content) + len(pipes))
        return places, len(line) if end < 0 else end + 1

    def _add_text(self, into: dict[str, Any], content: str, at: int, places: Places) -> None:
        """Add a text that stands at `at` of the inline text whose places these are, in parts that are together."""
        number = max(0, bisect.bisect_right(places, at, key=lambda place: place[0]) - 1)
        done = 0
        while done < len(content):
            begun, source = places[number]
            following = places[number + 1][0] if number + 1 < len(places) else at + len(content)
            part = content[done : max(done + 1, following - at)]
            place = None if source is None else source + at + done - begun
            self._add(into, {"text": part, "at": None if place is None else self._units[place]})
            done += len(part)
            number += 1

    #
    # what blocks hold
    #

    def _add_code(self, into: dict[str, Any], token: Token) -> None:
        made = self._element(into, "pre", token)
        if token.info.strip():
            made["language"] = token.info.split(maxsplit=1)[0]
        content = token.content.removesuffix("\n")
        assert token.map is not None
        if content:
            places = list(self._line_places(content, token.map[0] + (token.type == "fence")))
            self._add_text(made, content, 0, places)

    def _add_inline(self, into: dict[str, Any], token: Token, places: Places) -> None:
        """Add what a text holds, with a cursor that goes through it as the parser did."""
        source = token.content
        path, cursor = [into], 0
        for child in token.children or []:
            kind = child.type
            if kind == "text":
                at = source.find(child.content, cursor)  # right at the cursor, but for a link's text that was decoded
                self._add_text(path[-1], child.content, max(at, cursor), places if at >= 0 else [(0, None)])
                cursor = cursor if at < 0 else at + len(child.content)
            elif kind == "text_special":  # an escaped sign, or an entity
                backslash = child.info == "escape" and child.content != child.markup
                self._add_text(path[-1], child.content, cursor + backslash, places)
                cursor += len(child.markup)
            elif kind == "code_inline":
                begun = cursor + len(child.markup)
                plain = source[begun : begun + len(child.content)].replace("\n", " ") == child.content
                plain = plain and source.startswith(child.markup, begun + len(child.content))
                made = self._element(path[-1], "code", child)
                self._add_text(made, child.content, begun + (not plain), places)  # else a blank was taken off each end
                cursor = begun + len(child.content) + 2 * (not plain) + len(child.markup)
            elif kind in ("softbreak", "hardbreak"):
                found = _BREAK.match(source, cursor)
                end = source.find("\n", cursor)
                self._add_text(path[-1], "\n", max(end, 0), places)
                cursor = found.end() if found else end + 1
            elif child.nesting > 0:
                nowhere = kind == "link_open" and not _LINK.fullmatch(str(child.attrs["href"]))  # [a]()
                path.append(path[-1] if nowhere else self._element(path[-1], _ELEMENTS[kind], child))
                if child.markup != _BARE:
                    cursor += 1 if kind == "link_open" else len(child.markup)
            else:
                path.pop()
                if kind != "link_close":
                    cursor += len(child.markup)
                elif child.markup != _BARE:
                    cursor = _behind_link(source, cursor, child)


def _behind_link(source: str, at: int, token: Token) -> int:
    """Where a link ends whose text ended at `at`: behind `](URL "title")`, or `>`."""
    if token.info == "auto":
        return source.find(">", at) + 1
    helpers, most = _parser().helpers, len(source)

    def blanks(at: int) -> int:
        return re.compile(r"[ \t\n]*").match(source, at).end()  # type: ignore[union-attr]

    at = blanks(at + len("]("))
    url = helpers.parseLinkDestination(source, at, most)
    at = blanks(url.pos if url.ok else at)
    title = helpers.parseLinkTitle(source, at, most)
    return blanks(title.pos if title.ok else at) + 1
