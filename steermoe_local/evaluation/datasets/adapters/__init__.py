"""The data sets that tasks are built from, a module each.

To add one: write a module with a `DatasetAdapter` and name its class in ADAPTERS. docs/task-builders.md says what is
known of each data set's own protocol.
"""

from __future__ import annotations

from ..adapter import DatasetAdapter
from .cf_triviaqa import CfTriviaQA
from .faitheval import Counterfactual, Inconsistent, Unanswerable
from .mctest import MCTest
from .mquake import MQuAKE
from .prompt_lists import TDC2023, AdvBench, MaliciousInstruct, Prompts, StrongReject

__all__ = ["ADAPTERS"]

_CLASSES = (
    Counterfactual,
    Unanswerable,
    Inconsistent,
    CfTriviaQA,
    MQuAKE,
    MCTest,
    AdvBench,
    StrongReject,
    TDC2023,
    MaliciousInstruct,
    Prompts,
)
ADAPTERS: dict[str, DatasetAdapter] = {adapter.name: adapter() for adapter in _CLASSES}
"""The adapters by the name of their data set."""
