"""Evaluators on the embedded model: how many items, which settings, and the texts of their answers."""

from __future__ import annotations

from steermoe_local.evaluation.measuring.evaluator import EvaluatorSettings
from steermoe_local.evaluation.measuring.measurements import Measurement
from tests.support.low_level import F32

N = 6
SETTINGS = EvaluatorSettings(n_parallel=4, context={"n_threads": 1, "type_k": F32, "type_v": F32})


def texts(measured: Measurement) -> list[str]:
    return [answer.text for answer in measured.answers]
