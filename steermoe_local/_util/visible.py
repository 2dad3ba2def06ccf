"""Texts of strangers for the eyes: what a terminal would obey, and what nobody would see, becomes a sign.

A name in a file, a message that quotes one, an answer of a model or the path of a request may hold escape sequences
(colours, titles, the clipboard), line ends that forge a second line, characters that turn the direction of writing, and
characters without width that hide a difference. Letters of all scripts and emoji stay. Letters that look alike, and
letters with many accents, are no concern of this module.
"""

from __future__ import annotations

import re

# First and last code points. Control characters; Unicode's format controls (category Cf) and line separators, but for
# the visible signs of Arabic and its neighbours and for the two joiners, which scripts and emoji need between letters;
# halves of surrogate pairs, as which Python has bytes of a name that are not UTF-8.
_CONTROLS = ((0x00, 0x1F), (0x7F, 0x9F))
_UNSEEN = (
    *((code, code) for code in (0xAD, 0x61C, 0x180E, 0x200B, 0x200E, 0x200F, 0xFEFF)),
    (0x2028, 0x202E),
    (0x2060, 0x206F),
    (0xD800, 0xDFFF),
    (0xFFF9, 0xFFFB),
    (0x13430, 0x1343F),
    (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A),
    (0xE0000, 0xE007F),
)
_JOINERS = (0x200C, 0x200D)
_LINE = dict.fromkeys((code for first, last in (*_CONTROLS, *_UNSEEN) for code in range(first, last + 1)), 0xFFFD)
_LINE |= {code: 0x2400 + code for code in range(32)} | {0x7F: 0x2421}  # pictures
_LINES = {code: sign for code, sign in _LINE.items() if code != 0x0A}
_ANSWER = {code: "?" for code in _LINE if code not in (0x09, 0x0A)}
# a joiner that joins nothing, or letters of ASCII, is there to hide something
_IDLE_JOINER = re.compile("(?<![^\x00-\x7f\u200b-\u200f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f\u200b-\u200f])")
_JSON = re.compile(
    "[" + "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in (_CONTROLS[1], *_UNSEEN, _JOINERS)) + "]"
)


def visible(text: str, *, lines: bool = False) -> str:
    """The text in one line; what a terminal would obey or nobody would see is a picture, or \\ufffd.

    With `lines`, line ends stay.
    """
    return _IDLE_JOINER.sub("\ufffd", text.translate(_LINES if lines else _LINE))


def harmless(text: str) -> str:
    """A piece of an answer for a terminal: line ends, tabs and joiners stay, what `visible` marks is "?"."""
    return text.replace("\r\n", "\n").translate(_ANSWER)


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
