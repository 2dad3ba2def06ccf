"""Tokenizes texts with words of any length; gives the bytes of tokens.

Many of llama.cpp's BPE tokenizers split a text into words by std::regex, whose recursion is as deep as the match is
long: about 320 bytes of stack a character (libstdc++, x86-64), so that some 26,000 letters without a blank crash a
process with 8 MiB of stack. Texts with such words are tokenized in a thread with a large enough stack.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ..errors import ResourceError, UsageError
from . import capi

T = TypeVar("T")

_DIRECT = 512  # characters that any thread has stack for
_STACK_OF_CHARACTER = 1024
_MOST_STACK = (64 if sys.platform == "win32" else 512) << 20  # Windows commits it
_MIB = 1 << 20
_INDENT = 64
_BLANKS = re.compile(rf"\s{{{_INDENT},}}")  # no others are looked at: there are many
_NO_BLANKS = dict.fromkeys(range(0x1C, 0x20), "x")  # blanks for Python, but not for C++
_SENTENCES = ("exaone-moe",)  # their pattern matches several words with the blanks between, up to a sign or a digit
_SIGNS = re.compile(r"[\0-\x1f!-@\[-`{-\x7f]+")

_starting = threading.Lock()  # the size of a new thread's stack is set for the whole process


def tokenize(model: Any, text: str, *, pre: str = "", add_special: bool, parse_special: bool = True) -> list[int]:
    """Tokens of a text by llama_cpp's `LlamaModel`; with `parse_special` names of special tokens become those tokens.

    `pre` is the model's tokenizer.ggml.pre. Raises UsageError for a word that is too long for any stack, ResourceError
    when there is no memory for one.
    """

    def call() -> list[int]:
        return list(model.tokenize(text.encode("utf-8"), add_special, parse_special))

    if len(text) <= _DIRECT:
        return call()
    lib = capi.llama_cpp()
    if lib.llama_vocab_type(model.vocab) != lib.LLAMA_VOCAB_TYPE_BPE:
        return call()
    run = longest_run(text, pre)
    return call() if run <= _DIRECT else _with_stack(run, call)


def token_bytes(vocab: Any, token: int, special: bool) -> bytes:
    """Bytes of a token of a llama.cpp vocabulary (llama_token_to_piece); a control token has some only if `special`."""
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = capi.llama_cpp().llama_token_to_piece(vocab, token, buffer, size, 0, special)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """How many tokens, or other values, both begin with."""
    n = min(len(one), len(other))
    if one[:n] == other[:n]:  # the usual case, and far quicker than token by token
        return n
    return next((index for index in range(n) if one[index] != other[index]), n)


def longest_run(text: str, pre: str = "") -> int:
    """Upper bound of the characters that a tokenizer's pattern matches at once: longest word and longest blank."""
    if any(chr(control) in text for control in _NO_BLANKS):
        text = text.translate(_NO_BLANKS)
    words = text.split()
    lengths = [len(word) for word in words]
    longest = max(lengths, default=0)
    spare = len(text) - sum(lengths) - len(words)  # blanks behind the first one of each word
    if spare > _INDENT:
        spare = max(map(len, _BLANKS.findall(text)), default=_INDENT)
    longest += max(spare, 0) + 1
    if pre in _SENTENCES:
        longest += max(map(len, _SIGNS.split(text)))
    return longest + 1  # a blank before a word is part of it


def _with_stack(run: int, call: Callable[[], T]) -> T:
    """Call in a thread with a stack for a match of `run` characters."""
    if run > _MOST_STACK // _STACK_OF_CHARACTER:
        raise UsageError(
            f"the text has a word, or blank space, of more than {_MOST_STACK // _STACK_OF_CHARACTER} characters; "
            "shorten it"
        )
    size = (run * _STACK_OF_CHARACTER // _MIB + 2) * _MIB
    with ThreadPoolExecutor(1, thread_name_prefix="steermoe-tokenize") as pool:
        with _starting:
            before = threading.stack_size(size)
            try:
                future = pool.submit(call)  # the thread starts here
            except RuntimeError:
                raise ResourceError(
                    f"no memory to tokenize a text with a word of {run} characters; shorten the word"
                ) from None
            finally:
                threading.stack_size(before)
        return future.result()
