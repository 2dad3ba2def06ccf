"""Every exception that the package raises on purpose.

    SteerMoEError
    ├── FormatError             a file is damaged, or is not the kind of file that was asked for
    │   └── PairsError          a pairs file, or a pair that does not fit its rendered prompt
    ├── ModelError              a GGUF model that cannot be read or cannot be steered
    ├── ModelMismatchError      counts, a map or a bias file that belong to another model
    ├── ChoiceError             a choice of experts or layers that the model cannot carry out
    ├── UsageError              an argument outside its range, or arguments that exclude each other
    ├── ResourceError           what is asked for does not fit into the machine's memory
    ├── NativeError             the native library refused or failed; `code` is its return code
    └── VersionError            a llama_cpp or native library of another version

A message is one line: what is wrong, where, and the cure.
"""

from __future__ import annotations

__all__ = [
    "ChoiceError",
    "FormatError",
    "ModelError",
    "ModelMismatchError",
    "NativeError",
    "PairsError",
    "ResourceError",
    "SteerMoEError",
    "UsageError",
    "VersionError",
]


class SteerMoEError(Exception):
    """Base of the package's errors; catch it to catch them all."""


class FormatError(SteerMoEError):
    """A file is damaged, or is not the kind of file that was asked for."""


class PairsError(FormatError):
    """A pairs file that cannot be used, or a target that its rendered prompt does not hold."""


class ModelError(SteerMoEError):
    """A GGUF model that cannot be read or cannot be steered."""


class ModelMismatchError(SteerMoEError):
    """Counts, an expert map or a bias file that belong to another model."""


class ChoiceError(SteerMoEError):
    """A choice of experts or layers that the model cannot carry out."""


class UsageError(SteerMoEError):
    """An argument outside its range, or arguments that exclude each other."""


class ResourceError(SteerMoEError):
    """What is asked for does not fit into the machine's memory."""


class NativeError(SteerMoEError):
    """The native library refused or failed.

    `code` is the return code of the C function, or None when there was none (library not found).
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        """Keep the message and the C function's return code."""
        super().__init__(message)
        self.code = code


class VersionError(SteerMoEError):
    """A llama_cpp package or a native library of a version other than the supported one."""
