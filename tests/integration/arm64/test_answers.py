"""The embedded model's greedy answers on 64-bit ARM against those of the machine that runs qemu.

Two processors compute the same sums in other orders. With all weights and the cache in F32, logits may lie as far
apart as `tests/support/rounding.py` allows for F32. Weights in F16 have the other factors rounded to F16, and
processors with that arithmetic add products in it. Quantized weights have them rounded to 8 bits, in steps of 1 / 127
of the largest value of a block; the products are whole numbers, whose sums are exact.

So a token may choose other experts only where the router's logits all but tie; up to there the logits are within the
allowance; and an answer may differ only where the two largest logits are nearer to each other than both may move.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.llama.backends import cpu_features
from tests.integration.arm64 import answers
from tests.support import rounding
from tests.support.low_level import open_model
from tests.support.near_ties import near_ties

pytestmark = pytest.mark.arm64

FEATURES = {"NEON", "ARM_FMA", "FP16_VA", "DOTPROD", "MATMUL_INT8", "SVE", "SME"}
MOST_DIFFERENT = 0.1  # of the choices of experts, by layers and tokens
REFERENCE = Path(os.environ.get("STEERMOE_ARM64_REFERENCE", ""))
N_SUM = rounding.TINY["n_sum"]


def allowance_of(weights: str) -> dict[str, float]:
    """What sums of products with these weights are rounded to, for `rounding.logits`."""
    if weights == "F32":
        return {}
    summed = rounding.F16 if "FP16_VA" in cpu_features() else rounding.F32
    return {"stored": rounding.F16 if weights == "F16" else 1 / 127, "summed": summed}


@pytest.fixture(scope="module")
def reference() -> Any:
    """What the other processor computed (tests/support/arm64.py)."""
    return np.load(REFERENCE / "answers.npz")


@pytest.fixture(scope="module", params=answers.WEIGHTS)
def model(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path, Any]]:
    path = answers.model_file(request.param, REFERENCE)
    with closing(open_model(path)) as opened:
        yield request.param, path, opened


def test_the_processor() -> None:
    assert platform.machine() == "aarch64"
    wanted = set(os.environ["STEERMOE_ARM64_FEATURES"].split())
    assert {"NEON", "ARM_FMA"} | wanted == FEATURES & cpu_features()


@pytest.mark.parametrize("rule", answers.STEERED)
def test_greedy_answers(model: tuple[str, Path, Any], reference: Any, rule: str) -> None:
    weights, path, opened = model
    allowance = allowance_of(weights)
    bias = answers.bias_of(rule, path)
    for number in answers.numbers(weights, rule):
        name = answers.case(weights, rule, number)
        prompt, theirs, expected, experts = (
            reference[f"{name}-{part}"] for part in ("prompt", "tokens", "logits", "experts")
        )
        assert answers.prompt_of(opened, answers.QUESTIONS[number]) == prompt.tolist()

        _, logits, seen = answers.answer(opened, bias, prompt.tolist(), theirs.tolist())
        routers = answers.by_layer(seen, "ffn_moe_logits_steered" if bias else "ffn_moe_logits")
        differ = (answers.chosen(seen) != experts).any(axis=-1)  # [layers, tokens]
        # A value on the border of two steps goes to the one or the other, which is rare; many differences come from a
        # kernel that computes something else.
        assert differ.mean() < MOST_DIFFERENT, f"{name}: {differ.mean():.0%} of the choices are other ones"
        n_same = int(differ.any(axis=0).argmax()) if differ.any() else differ.shape[1]
        if differ.any():
            assert weights != "F32", "other experts: this question has a near tie, take another one"
            layer = int(differ[:, n_same].argmax())
            z = routers[layer, n_same : n_same + 1]
            assert near_ties(z, experts.shape[-1], layer, N_SUM, **allowance).all(), "other experts without a tie"

        allowed = rounding.logits(expected, **rounding.TINY, **allowance)
        n_same = max(0, n_same - len(prompt) + 1)  # logits of tokens up to which all experts are the same
        distance = np.abs(logits - expected)[:n_same].max(initial=0)
        print(f"{name}: logits {distance:.2g} apart of {allowed:.2g} that rounding allows")
        assert distance < allowed

        tokens, _, _ = answers.answer(opened, bias, prompt.tolist())
        if tokens != theirs.tolist():
            at = next(i for i, pair in enumerate(zip(tokens, theirs, strict=False)) if pair[0] != pair[1])
            top = np.sort(expected[at])
            assert at >= n_same or top[-1] - top[-2] < 2 * allowed, f"{name}: token {at} is another one"
            print(f"{name}: token {at} is another one, {top[-1] - top[-2]:.2g} below theirs")


def test_the_program_answers(reference: Any) -> None:
    """Sampling, template, tokenizer and command line; where rounding decides a token, the test above says so."""
    assert answers.program_answers() == reference["program"].tolist()
