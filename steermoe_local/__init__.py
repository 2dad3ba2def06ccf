"""Steer Mixture-of-Experts models in GGUF form: find the experts of a behaviour, promote or suppress them.

The way of the data, each arrow a file: prompt pairs -> routing counts -> risk-difference scores -> expert map ->
bias file -> steered model -> evaluation. Everything up to the bias file is pure Python and NumPy; what runs a model
(`SteeredLlama`, `record_counts`, `Engine`, `open_bench`, ...) loads the native library when it is first used.
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
from .steering import Steering

if TYPE_CHECKING:
    from .engine import Engine
    from .evaluation.bench import Bench
    from .evaluation.evaluate import evaluate
    from .evaluation.from_files import open_bench, open_steering, run_evaluation
    from .evaluation.sweep import sweep
    from .evaluation.transfer import transfer
    from .evaluation.tune import tune
    from .model import SteeredLlama
    from .recorder import record_counts

__all__ = [
    "Bench",
    "BiasFile",
    "ChoiceError",
    "Engine",
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
    "Steering",
    "UsageError",
    "VersionError",
    "evaluate",
    "load_pairs",
    "model_info",
    "open_bench",
    "open_steering",
    "read_bias",
    "record_counts",
    "risk_difference",
    "run_evaluation",
    "save_pairs",
    "sweep",
    "transfer",
    "tune",
    "write_bias",
]

try:
    __version__ = version("steermoe-local")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

# What needs the native library, imported when it is asked for.
_NATIVE = {
    "Bench": ".evaluation.bench",
    "Engine": ".engine",
    "SteeredLlama": ".model",
    "evaluate": ".evaluation.evaluate",
    "open_bench": ".evaluation.from_files",
    "open_steering": ".evaluation.from_files",
    "record_counts": ".recorder",
    "run_evaluation": ".evaluation.from_files",
    "sweep": ".evaluation.sweep",
    "transfer": ".evaluation.transfer",
    "tune": ".evaluation.tune",
}


def __getattr__(name: str) -> Any:
    if name in _NATIVE:
        return getattr(import_module(_NATIVE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
