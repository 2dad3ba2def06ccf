"""The exceptions of this package; each message is one line with the fault, its location and the cure.

SteerMoEError
├── FormatError             a file is damaged or of another kind
│   └── PairsError          a pairs file, other data, or a target that is not in its rendered prompt
├── ModelError              a GGUF model cannot be read, found or steered
├── ModelMismatchError      counts, a map or a bias file are of another model
├── ChoiceError             a choice of experts or layers that the model cannot carry out
├── UsageError              an argument is outside its range, or arguments exclude each other
├── ResourceError           memory or disk space is too small
│   └── StorageError        a file cannot be written: the disk is full, or fails
├── BusyError               another process is writing the same output
├── NativeError             the native library refused or failed
└── VersionError            llama_cpp or the native library has another version
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST = 4000  # characters of a message: a field of a file, which it quotes, may have millions


class SteerMoEError(Exception):
    """Base class of all errors that this package raises. A message that is far too long loses its middle."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(_bounded(arg) if isinstance(arg, str) else arg for arg in args))


def _bounded(text: str) -> str:
    return text if len(text) <= _MOST else f"{text[: _MOST // 2]} ... {text[-_MOST // 2 :]}"


class FormatError(SteerMoEError):
    """A file is damaged or of another kind than expected."""


class PairsError(FormatError):
    """A pairs file or other data file cannot be used, or a target is not in its rendered prompt."""


class ModelError(SteerMoEError):
    """A GGUF model cannot be read, found or steered."""


class ModelMismatchError(SteerMoEError):
    """Counts, an expert map or a bias file belong to another model."""


class ChoiceError(SteerMoEError):
    """A choice of experts or layers cannot be carried out by the model."""


class UsageError(SteerMoEError):
    """An argument is outside its range, or arguments exclude each other."""


class ResourceError(SteerMoEError):
    """The memory or disk space of the machine is too small."""


class StorageError(ResourceError):
    """A file cannot be written because the disk (or a quota, or a limit of file sizes) is full, or fails."""


class BusyError(SteerMoEError):
    """Another process is writing the same output."""


class NativeError(SteerMoEError):
    """The native library refused or failed; `code` is the C function's return code, None if it was not found."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class VersionError(SteerMoEError):
    """The llama_cpp package or the native library has another version than the supported one."""


@contextmanager
def prefixed(prefix: str, *, once: bool = False) -> Iterator[None]:
    """Put `prefix` and a colon before the message of an error; with `once` not before one that starts with it."""
    try:
        yield
    except SteerMoEError as error:
        if not (once and str(error).startswith(prefix)):
            error.args = (f"{prefix}: {error}", *error.args[1:])
        raise
