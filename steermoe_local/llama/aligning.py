"""Finds which bytes of a text each of its tokens covers, by the rules of llama.cpp's tokenizers (llama-vocab.cpp).

The bytes of the tokens do not always join to the text:

- a SentencePiece tokenizer (SPM) puts a blank before the text and behind every special token that text follows, unless
  tokenizer.ggml.add_space_prefix is false;
- some special tokens swallow the white space beside them (the RSTRIP and LSTRIP attributes, for example of Phi-3);
- where blanks are written as U+2581, a U+2581 of the text itself becomes a blank;
- a unigram tokenizer (UGM) makes one blank of white space, and drops it at the end;
- the tokenizer may put tokens of its own around the text.

`Aligner` keeps an account of these. A text that the tokenizer changes in any other way is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PairsError
from . import capi
from .tokenizing import token_bytes

Span = tuple[int, int]
"""The bytes [start, end) of a text that a token covers; start == end for a token that the tokenizer added."""

_SPACES = b" \t\n\v\f\r"  # C's isspace
_ESCAPED = "\u2581".encode()
_OWN_BLANK = b"\xff"  # a U+2581 of the text, which is a blank to the tokenizer, but no white space; in no UTF-8 text
_SHOWN = 16


@dataclass(frozen=True)
class _Piece:
    """A token's bytes and attributes. `special`: text that spells it becomes this token before all else."""

    data: bytes
    special: bool
    unknown: bool
    strips_left: bool
    strips_right: bool


class Aligner:
    """Aligns texts with their tokens for one model (llama_cpp's `LlamaModel`); `metadata` is the model's."""

    def __init__(self, model: Any, metadata: Mapping[str, str]) -> None:
        lib = capi.llama_cpp()
        self._model = model
        kind = lib.llama_vocab_type(model.vocab)
        self._is_wordpiece = kind == lib.LLAMA_VOCAB_TYPE_WPM
        self._is_unigram = kind == lib.LLAMA_VOCAB_TYPE_UGM
        self._is_rwkv = kind == lib.LLAMA_VOCAB_TYPE_RWKV
        blanks = metadata.get("tokenizer.ggml.add_space_prefix") != "false"
        self._puts_blanks = blanks and kind == lib.LLAMA_VOCAB_TYPE_SPM
        self._pieces: dict[int, _Piece] = {}  # of the tokens seen so far

    def spans(self, text: bytes, tokens: Sequence[int], *, add_special: bool = False) -> list[Span]:
        """The span of each token of a text, which was tokenized with special tokens parsed.

        `add_special`: the tokenizer put its own tokens around the text, if it has any.

        Raises PairsError for a text that the tokenizer changes.
        """
        if self._is_wordpiece:
            raise PairsError("the model's tokenizer (WordPiece) changes every text, so no target can be located")
        pieces = [self._pieces.get(token) or self._piece(token) for token in tokens]
        try:
            return self._walk(text, pieces, add_special)
        except PairsError:
            if not any(_ESCAPED in data for data in (text, *(piece.data for piece in pieces))):
                raise
        unescaped = [replace(piece, data=piece.data.replace(_ESCAPED, b" ")) for piece in pieces]
        spans = self._walk(text.replace(_ESCAPED, _OWN_BLANK), unescaped, add_special)
        parts = text.split(_ESCAPED)
        starts = [0]  # in the text, of each byte of the unescaped one
        for part in parts:
            starts += range(starts[-1] + 1, starts[-1] + len(part) + 1)
            starts.append(starts[-1] + len(_ESCAPED))
        return [(starts[start], starts[end]) for start, end in spans]

    def _walk(self, text: bytes, pieces: Sequence[_Piece], add_special: bool) -> list[Span]:
        spans: list[Span] = []
        at = 0
        begins = True  # what is between two special tokens
        stripped = False  # the special token before swallows the white space behind it
        for index, piece in enumerate(pieces):
            if piece.special:
                start = self._special_start(text, at, piece, stripped)
                if start >= 0:
                    at = start + len(piece.data)
                    spans.append((start, at))
                    begins, stripped = True, piece.strips_right
                    continue
                if add_special and (index == 0 or (index == len(pieces) - 1 and not text[at:].strip(_SPACES))):
                    spans.append((at, at))
                    continue
            if stripped:
                at, stripped = _behind_spaces(text, at), False
            end = self._end(text, at, piece, begins)
            if end < 0:
                raise _changed(text, at, piece.data)
            spans.append((at, end))
            at, begins = end, False
        rest = text[at:]
        if rest.strip(_SPACES) or (rest and not (stripped or self._is_unigram)):
            raise _changed(text, at, b"")
        return spans

    def _special_start(self, text: bytes, at: int, piece: _Piece, stripped: bool) -> int:
        """Where the text has the special token, at `at` or behind swallowed white space; -1: not there."""
        if _has(text, piece.data, at):
            return at
        if stripped or piece.strips_left or self._is_unigram:
            start = _behind_spaces(text, at)
            if _has(text, piece.data, start):
                return start
        return -1

    def _end(self, text: bytes, at: int, piece: _Piece, begins: bool) -> int:
        """Where an ordinary token that starts at `at` ends; -1: the text has something else there."""
        data = piece.data
        if self._is_unigram:
            for index, word in enumerate(data.split(b" ")):
                start = _behind_spaces(text, at) if index else at
                if piece.unknown or not _has(text, word, start):
                    return -1
                at = start + len(word)
            return at
        if self._is_rwkv and piece.unknown:
            return at + 1
        if begins and self._puts_blanks:
            if not data.startswith(b" "):
                return -1
            data = data[1:]
        return at + len(data) if _has(text, data, at) else -1

    def _piece(self, token: int) -> _Piece:
        lib = capi.llama_cpp()
        attributes = lib.llama_vocab_get_attr(self._model.vocab, token)

        def has(*wanted: int) -> bool:
            return any(attributes & attribute for attribute in wanted)

        unknown = lib.LLAMA_TOKEN_ATTR_UNKNOWN
        piece = _Piece(
            data=token_bytes(self._model.vocab, token, special=True),
            special=has(lib.LLAMA_TOKEN_ATTR_CONTROL, lib.LLAMA_TOKEN_ATTR_USER_DEFINED, unknown),
            unknown=has(unknown),
            strips_left=has(lib.LLAMA_TOKEN_ATTR_LSTRIP),
            strips_right=has(lib.LLAMA_TOKEN_ATTR_RSTRIP),
        )
        self._pieces[token] = piece
        return piece


def tokens_in_span(spans: Sequence[Span], start: int, end: int) -> list[int]:
    """Indices of the tokens that cover a byte of [start, end).

    Sharing one byte is enough, as a tokenizer may merge across the span's edges (a leading blank, half of a
    character): the token with the target's first letter is the target's first token. A token without bytes never
    counts, nor does a token that is only the blank before the span.
    """
    return [index for index, (first, last) in enumerate(spans) if first < last and first < end and last > start]


def _has(text: bytes, data: bytes, at: int) -> bool:
    """Does the text have the bytes there?"""
    if text.startswith(data, at):
        return True
    there = text[at : at + len(data)]
    return _OWN_BLANK in there and there.replace(_OWN_BLANK, b" ") == data


def _behind_spaces(text: bytes, at: int) -> int:
    while at < len(text) and text[at] in _SPACES:
        at += 1
    return at


def _changed(text: bytes, at: int, data: bytes) -> PairsError:
    there = text[at:].replace(_OWN_BLANK, _ESCAPED).decode("utf-8", "replace")[:_SHOWN] or "its end"
    instead = data.decode("utf-8", "replace")
    what = f"reads {instead!r} instead" if instead else "leaves it out"
    return PairsError(
        f"the tokenizer changes this text at {there!r} ({what}), so the target cannot be located; use another wording"
    )
