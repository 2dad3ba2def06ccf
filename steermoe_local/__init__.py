"""Steer Mixture-of-Experts models in GGUF form: find the experts of a behaviour, promote or suppress them.

The way of the data, each arrow a file: prompt pairs -> routing counts -> risk-difference scores -> expert map ->
bias file -> steered model -> evaluation. Everything up to the bias file is pure Python and NumPy; what runs a model
(`SteeredLlama`, `record_counts`, `Engine`, `open_evaluator`, ...) loads the native library when it is first used.
"""

# ruff: noqa: E402
from ._util.import_path import leave_it_as_program

leave_it_as_program()  # before the first import that a file of the current folder could answer

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .errors import (
    BusyError,
    ChoiceError,
    FormatError,
    ModelError,
    ModelMismatchError,
    NativeError,
    PairsError,
    ResourceError,
    SteerMoEError,
    StorageError,
    UsageError,
    VersionError,
)
from .identity import ModelIdentity
from .maps.counts import RoutingCounts
from .maps.effects import Attribution, Effects
from .maps.expert_map import ExpertMap
from .maps.map_phases import PhaseSplit
from .maps.scores import risk_difference
from .maps.stability import UntilStable
from .model_files.model_info import ModelInfo, model_info
from .pairs.pairs import Message, Pair, load_pairs, save_pairs
from .steering.bias_file import BiasFile, read_bias, write_bias
from .steering.plan import SteeringPlan
from .steering.steering import Steering

if TYPE_CHECKING:
    from .attribution.attribute import AttributionOptions, attribute
    from .attribution.fit import fit
    from .detection.recorder import record_counts, record_phases
    from .evaluation.measuring.evaluator import Evaluator
    from .evaluation.measuring.evaluator import Evaluator as Bench
    from .evaluation.measuring.opening import open_evaluator, open_steering
    from .evaluation.measuring.opening import open_evaluator as open_bench
    from .evaluation.measuring.plans import open_plan
    from .evaluation.studies.audit.audit import audit
    from .evaluation.studies.conditions.fit import ConditionOptions, fit_condition
    from .evaluation.studies.evaluate import evaluate, run_evaluation
    from .evaluation.studies.search.sweep import sweep
    from .evaluation.studies.search.tune import tune
    from .evaluation.studies.transfer.transfer import transfer
    from .generation.engine import Engine
    from .learning.learn import learn
    from .learning.options import Builtin, GivenPairs, LearnOptions, LikeUnlike
    from .learning.result import LearnResult
    from .llama.steered_llama import SteeredLlama

__all__ = [
    "Attribution",
    "AttributionOptions",
    "Bench",
    "BiasFile",
    "Builtin",
    "BusyError",
    "ChoiceError",
    "ConditionOptions",
    "Effects",
    "Engine",
    "Evaluator",
    "ExpertMap",
    "FormatError",
    "GivenPairs",
    "LearnOptions",
    "LearnResult",
    "LikeUnlike",
    "Message",
    "ModelError",
    "ModelIdentity",
    "ModelInfo",
    "ModelMismatchError",
    "NativeError",
    "Pair",
    "PairsError",
    "PhaseSplit",
    "ResourceError",
    "RoutingCounts",
    "SteerMoEError",
    "SteeredLlama",
    "Steering",
    "SteeringPlan",
    "StorageError",
    "UntilStable",
    "UsageError",
    "VersionError",
    "attribute",
    "audit",
    "evaluate",
    "fit",
    "fit_condition",
    "learn",
    "load_pairs",
    "model_info",
    "open_bench",
    "open_evaluator",
    "open_plan",
    "open_steering",
    "read_bias",
    "record_counts",
    "record_phases",
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

# What needs the native library: (module, name there), imported when it is first asked for.
_LAZY = {
    "AttributionOptions": (".attribution.attribute", "AttributionOptions"),
    "Bench": (".evaluation.measuring.evaluator", "Evaluator"),
    "ConditionOptions": (".evaluation.studies.conditions.fit", "ConditionOptions"),
    "GivenPairs": (".learning.options", "GivenPairs"),
    "LearnOptions": (".learning.options", "LearnOptions"),
    "LearnResult": (".learning.result", "LearnResult"),
    "LikeUnlike": (".learning.options", "LikeUnlike"),
    "Builtin": (".learning.options", "Builtin"),
    "learn": (".learning.learn", "learn"),
    "Engine": (".generation.engine", "Engine"),
    "Evaluator": (".evaluation.measuring.evaluator", "Evaluator"),
    "SteeredLlama": (".llama.steered_llama", "SteeredLlama"),
    "attribute": (".attribution.attribute", "attribute"),
    "audit": (".evaluation.studies.audit.audit", "audit"),
    "evaluate": (".evaluation.studies.evaluate", "evaluate"),
    "fit": (".attribution.fit", "fit"),
    "fit_condition": (".evaluation.studies.conditions.fit", "fit_condition"),
    "open_bench": (".evaluation.measuring.opening", "open_evaluator"),
    "open_evaluator": (".evaluation.measuring.opening", "open_evaluator"),
    "open_plan": (".evaluation.measuring.plans", "open_plan"),
    "open_steering": (".evaluation.measuring.opening", "open_steering"),
    "record_counts": (".detection.recorder", "record_counts"),
    "record_phases": (".detection.recorder", "record_phases"),
    "run_evaluation": (".evaluation.studies.evaluate", "run_evaluation"),
    "sweep": (".evaluation.studies.search.sweep", "sweep"),
    "transfer": (".evaluation.studies.transfer.transfer", "transfer"),
    "tune": (".evaluation.studies.search.tune", "tune"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, there = _LAZY[name]
        return getattr(import_module(module, __name__), there)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
