"""Text on its way to a terminal, broken between words."""

from __future__ import annotations

from collections.abc import Callable

from rich.cells import cell_len, get_character_cell_size

_FENCE = "```"
_JOINER = "\u200d"


class WordWrap:
    """Breaks a stream of text between words, so that no line is wider than `width` cells.

    A word comes out when it is complete: when a blank follows, or with `end`. A word that is wider than a line is
    left to the terminal to break, and so are the lines of a fenced block of code. `width` is asked for every word, as
    a terminal may change it.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._column = 0
        self._blanks = ""  # seen, but not written: they vanish where a line is broken
        self._word = ""
        self._line_start = ""  # what the line begins with, as long as that can make a fence
        self._code = False
        self._joined = False  # what was written last wants another character, like a family of emoji

    def feed(self, text: str) -> str:
        """Take a piece of the stream; returns what can be shown now."""
        return "".join(self._take(character) for character in text)

    def end(self) -> str:
        """The rest of the stream."""
        return self._flush_word() + self._flush_blanks()

    def _take(self, character: str) -> str:
        joined, self._joined = self._joined, False
        if character == "\n":
            out = self._flush_word() + self._flush_blanks() + "\n"
            if self._line_start.startswith(_FENCE):
                self._code = not self._code
            self._column, self._line_start = 0, ""
            return out
        if len(self._line_start) < len(_FENCE):
            self._line_start = (self._line_start + character).lstrip()
        if character in " \t":
            out = self._flush_word()
            self._blanks += character
            return out
        size = get_character_cell_size(character)
        if joined or (not size and self._column and not self._word and not self._blanks):
            self._joined = character == _JOINER
            return character  # it belongs to what was written last, also at the end of a line
        wide = size > 1
        out = self._flush_word() if wide else ""  # between characters of full width a line may be broken
        self._word += character
        if wide or len(self._word) >= self._width():
            out += self._flush_word()
        return out

    def _flush_word(self) -> str:
        if not self._word:
            return ""
        word, self._word = self._word, ""
        cells = cell_len(word)
        if not self._code and self._column and self._column + self._blank_cells() + cells > self._width():
            self._blanks, self._column = "", cells
            return "\n" + word
        out = self._flush_blanks()
        self._column += cells
        return out + word

    def _flush_blanks(self) -> str:
        self._column += self._blank_cells()
        blanks, self._blanks = self._blanks, ""
        return blanks

    def _blank_cells(self) -> int:
        column = self._column
        for blank in self._blanks:
            column = column // 8 * 8 + 8 if blank == "\t" else column + 1
        return column - self._column
