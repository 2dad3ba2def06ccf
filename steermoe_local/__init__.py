"""Steer Mixture-of-Experts models in GGUF form: find the experts of a behaviour, promote or suppress them.

The way of the data, each arrow a file: prompt pairs -> routing counts -> risk-difference scores -> expert map ->
bias file -> steered model. Everything up to the bias file is pure Python and NumPy; `record_counts` and
`SteeredLlama` load the native library when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .bias_file import BiasFile, read_bias, write_bias
from .counts import RoutingCounts
from .errors import (
    ChoiceError,
    FormatError,
    ModelError,
    ModelMismatchError,
    NativeError,
    PairsError,
    ResourceError,
    SteerMoEError,
    UsageError,
    VersionError,
)
from .expert_map import ExpertMap
from .identity import ModelIdentity
from .model_info import ModelInfo, model_info
from .pairs import Message, Pair, load_pairs, save_pairs
from .scores import risk_difference

if TYPE_CHECKING:
    from .model import SteeredLlama
    from .recorder import record_counts

__all__ = [
    "BiasFile",
    "ChoiceError",
    "ExpertMap",
    "FormatError",
    "Message",
    "ModelError",
    "ModelIdentity",
    "ModelInfo",
    "ModelMismatchError",
    "NativeError",
    "Pair",
    "PairsError",
    "ResourceError",
    "RoutingCounts",
    "SteerMoEError",
    "SteeredLlama",
    "UsageError",
    "VersionError",
    "load_pairs",
    "model_info",
    "read_bias",
    "record_counts",
    "risk_difference",
    "save_pairs",
    "write_bias",
]

try:
    __version__ = version("steermoe-local")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

# What needs the native library, imported when it is asked for.
_NATIVE = {"SteeredLlama": ".model", "record_counts": ".recorder"}


def __getattr__(name: str) -> Any:
    if name in _NATIVE:
        return getattr(import_module(_NATIVE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
