"""Texts of strangers for the eyes: what a terminal would obey, and what nobody would see, becomes a sign.

A name in a file, a message that quotes one, an answer of a model or the path of a request may hold escape sequences
(colours, titles, the clipboard), line ends that forge a second line, characters that turn the direction of writing, and
characters without width that hide a difference. Letters of all scripts and emoji stay. Letters that look alike, and
letters with many accents, are no concern of this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# First and last code points. Control characters; Unicode's format controls (category Cf) and line separators, but for
# the visible signs of Arabic and its neighbours; what is reserved for more of them; halves of surrogate pairs, as which
# Python has bytes of a name that are not UTF-8.
_CONTROLS = ((0x00, 0x1F), (0x7F, 0x9F))
_UNSEEN = (
    (0x180E, 0x180E),
    (0x2028, 0x202E),
    (0x2061, 0x206F),
    (0xD800, 0xDFFF),
    (0xFEFF, 0xFEFF),
    (0xFFF0, 0xFFFB),
    (0x13430, 0x1343F),
    (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A),
    (0xE0000, 0xE00FF),
    (0xE01F0, 0xE0FFF),
)
# Marks and letters without ink, which texts in many scripts have for good reasons and names have to look like others:
# soft hyphen, grapheme joiner, marks of direction (of the next letter alone), fillers of Hangul, Khmer's unwritten
# vowels, blanks without width, word joiner.
_MARKS = tuple(
    (code, code)
    for code in (0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x200B, 0x200E, 0x200F, 0x2060, 0x3164, 0xFFA0)
)
_JOINERS = (0x200C, 0x200D)
_DRAWN = dict.fromkeys((code for first, last in (*_CONTROLS, *_UNSEEN) for code in range(first, last + 1)), 0xFFFD)
_DRAWN |= {code: 0x2400 + code for code in range(32)} | {0x7F: 0x2421}  # pictures
_LINE = _DRAWN | {first: 0xFFFD for first, _ in _MARKS}
_ANSWER = {code: "?" for code in _DRAWN if code not in (0x09, 0x0A)}
_LINES = {code: sign for code, sign in _LINE.items() if code != 0x0A}
_DRAWN_LINES = {code: sign for code, sign in _DRAWN.items() if code != 0x0A}
# a joiner that joins nothing, or letters of ASCII, is there to hide something, and so is a selector of another form of
# such a letter (keycaps have one), or one selector behind the other
_IDLE = re.compile(
    "(?<![^\x00-\x7f\u200b-\u200f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f\u200b-\u200f])"
    "|(?<![^\x00-\x22\x24-\x29\x2b-\x2f\x3a-\x7f\u200b-\u200f\ufe00-\ufe0f\U000e0100-\U000e01ef])"
    "[\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)
# England's, Scotland's and Wales's: a black flag and letters that are not seen
_FLAG = re.compile(
    "(\U0001f3f4\U000e0067\U000e0062"
    "(?:\U000e0065\U000e006e\U000e0067|\U000e0073\U000e0063\U000e0074|\U000e0077\U000e006c\U000e0073)\U000e007f)"
)
_BEGUN = re.compile("(?:\r|\U0001f3f4[\U000e0062-\U000e0077]{0,5})\\Z")  # a line end or such a flag
_JSON = re.compile(
    "[" + "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in (_CONTROLS[1], *_UNSEEN, *_MARKS, _JOINERS)) + "]"
)


def visible(text: str, *, lines: bool = False, marks: bool = False) -> str:
    """The text in one line; what a terminal would obey or nobody would see is a picture, or \\ufffd.

    With `lines`, line ends stay. With `marks`, signs without width that writing needs stay, as in an answer.
    """
    if marks:
        return _translated(text, _DRAWN_LINES if lines else _DRAWN)
    return _IDLE.sub("\ufffd", _translated(text, _LINES if lines else _LINE))


def harmless(text: str) -> str:
    """An answer for a terminal: line ends, tabs and signs without width that writing needs stay, other ones are "?"."""
    return _translated(text.replace("\r\n", "\n"), _ANSWER)


def _translated(text: str, table: Mapping[int, int | str]) -> str:
    if "\U0001f3f4" not in text:
        return text.translate(table)
    parts = _FLAG.split(text)  # the flags have odd indices
    return "".join(part if index % 2 else part.translate(table) for index, part in enumerate(parts))


class HarmlessStream:
    """`harmless` for an answer that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""  # what the next piece may complete

    def feed(self, text: str) -> str:
        """Take a piece; returns what can be shown now."""
        text = self._held + text
        begun = _BEGUN.search(text)
        end = begun.start() if begun else len(text)
        self._held = text[end:]
        return harmless(text[:end])

    def end(self) -> str:
        """The rest."""
        held, self._held = self._held, ""
        return harmless(held)


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and its end of `most` characters together, with a note of how many are left out.

    A message quotes a value first and ends with the cure.
    """
    if len(text) <= most:
        return text
    end = min(200, most // 2)
    return f"{text[: most - end]}... ({len(text) - most:,} characters left out) ...{text[len(text) - end :]}"


def visible_json(document: str) -> str:
    """JSON that means the same, with escapes for what `visible` marks in its strings."""
    return _JSON.sub(_escape, document)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code <= 0xFFFF:
        return f"\\u{code:04x}"
    return f"\\u{0xD800 + (code - 0x10000 >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
