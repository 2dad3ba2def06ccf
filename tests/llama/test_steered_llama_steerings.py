"""`SteeredLlama` steered by what is not built yet: steerings, and plans whose names were looked up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from steermoe_local import (
    ChoiceError,
    ExpertMap,
    ModelMismatchError,
    SteeredLlama,
    Steering,
    UsageError,
    model_info,
    open_plan,
)
from steermoe_local.models.shipped_maps import map_path
from tests.support.builders import HEX

RULES = ["thinking: none", "answer: digits-words reverse"]
DIGITS = map_path("digits-words")


@pytest.fixture(scope="module")
def llama(tiny_path: Path) -> Iterator[SteeredLlama]:
    model = SteeredLlama(tiny_path, bias=open_plan(RULES), n_ctx=64, n_threads=1)
    yield model
    model.close()


def test_it_is_built_for_the_model(llama: SteeredLlama, tiny_path: Path) -> None:
    identity = model_info(tiny_path).identity
    plan, steering = open_plan(RULES), Steering.open(map_file=DIGITS, activate=2)
    for wanted in (plan, steering):
        llama.set_bias(wanted)
        built = wanted.build(identity)
        assert built is not None
        assert llama.bias is not None
        assert llama.bias.key == built.key
    llama.bias = open_plan(["answer: none"])
    assert llama.bias is None
    llama.bias = steering
    llama.bias = Steering.open(map_file=DIGITS)
    assert llama.bias is None


def test_what_does_not_fit_is_refused(llama: SteeredLlama, tmp_path: Path) -> None:
    llama.bias = steering = Steering.open(map_file=DIGITS, activate=2)
    digits = ExpertMap.load(DIGITS)
    other = tmp_path / "other.json"
    replace(digits, identity=replace(digits.identity, router_sha256=HEX)).save(other)
    n_vocab = llama.n_vocab()
    with pytest.raises(ModelMismatchError):
        llama.bias = Steering.open(map_file=other, activate=2)
    with pytest.raises(ModelMismatchError):
        llama.bias = open_plan([f"answer: {other} +1"])
    with pytest.raises(ChoiceError):
        llama.bias = Steering.open(map_file=DIGITS, activate=1, layers="77")
    with pytest.raises(UsageError, match="use Engine"):
        llama.bias = open_plan(["answer when digits-words < 1 over prompt: digits-words"])
    for mark in ("after", "until"):
        with pytest.raises(UsageError, match=rf"rule 2: {mark} #{n_vocab}: the vocabulary has 0 to {n_vocab - 1}"):
            llama.bias = open_plan(["prompt: none", f"answer {mark} #{n_vocab}: digits-words"])
    with pytest.raises(TypeError):
        llama.bias = 5  # type: ignore[assignment]
    assert llama.bias is not None
    assert llama.bias.key == steering.build().key  # type: ignore[union-attr]
    llama.bias = open_plan([f"answer after #{n_vocab - 1}: digits-words"])
