"""Texts and paths as the system gives them: what is not UTF-8 is refused before any work, `~` is the home folder.

Names and texts become part of files (maps, counts, answers, saved chats), all of which are UTF-8, and of what is
printed. So an argument has to be UTF-8 even where the system could open a file of that name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import click

from ...errors import UsageError

# read by this program or its libraries; all STEERMOE_* are as well
_VARIABLES = {
    "HOME",
    "XDG_CONFIG_HOME",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "LLAMA_CACHE",
    "OLLAMA_MODELS",
}
_SECRETS = ("TOKEN", "KEY")


class UserPath(click.Path):
    """A path of the command line, the environment or the configuration; `~` and `~user` at its start are folders."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """The path. Fails for a NUL, which no system has in a name."""
        return super().convert(self.expanded(value, param, ctx), param, ctx)

    def expanded(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text with its `~` expanded; a value that is a path already stays."""
        if not isinstance(value, str):
            return value
        if "\0" in value:
            self.fail("a name with a NUL in it.", param, ctx)
        return os.path.expanduser(value)


class NameOrPath(click.types.StringParamType):
    """A name (`none`, builtin:NAME, hub:ID), or a path; it stays a text, with `~` and `~user` at its start as folders.

    No shell does that for what stands in a variable or in the configuration file.
    """

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text."""
        text = super().convert(value, param, ctx)
        return os.path.expanduser(text) if isinstance(text, str) else text


def require_text(arguments: Iterable[str], environment: Mapping[str, str]) -> None:
    """Check that arguments and the variables that are read are text. Raises UsageError, which names the first other."""
    for number, text in enumerate(arguments, 1):
        if not is_text(text):
            cure = "write it as UTF-8; a file of such a name needs another name, or a link with one"
            raise UsageError(f"argument {number} ({_shown(text)}) is not {locale_cure() or f'UTF-8; {cure}'}")
    for name, text in environment.items():
        if (name.startswith("STEERMOE_") or name in _VARIABLES) and not is_text(text):
            shown = "" if name.endswith(_SECRETS) else f" ({_shown(text)})"
            raise UsageError(f"the variable {name}{shown} is not {locale_cure() or 'UTF-8; set it to a text in UTF-8'}")


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8: bytes that are not stand in it as halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def locale_cure() -> str:
    """The name of the locale's encoding, and what to do where it is not UTF-8; "" where it is."""
    encoding = sys.getfilesystemencoding()
    return "" if encoding == "utf-8" else f"{encoding}, the encoding of this locale; set PYTHONUTF8=1"


def _shown(text: str) -> str:
    """The text around its first half of a surrogate pair, with bytes that are not UTF-8 as escapes like \\xff."""
    first = next((index for index, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), 0)
    start, end = max(first - 40, 0), first + 20
    part = text[start:end]
    if sys.platform != "win32":
        part = part.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return f"'{'...' * (start > 0)}{part}{'...' * (end < len(text))}'"
