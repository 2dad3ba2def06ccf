"""The native library against transformers' OLMoE with the same weights, computed live."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steermoe_local.identity import ModelIdentity
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.model_files.model_info import model_info
from steermoe_local.pairs.pairs import load_pairs
from tests.integration.reference import cases, native, record
from tests.integration.reference.hf_olmoe import HfOlmoe, Steering

pytestmark = pytest.mark.reference

MODEL = native.data_file("tiny-moe.gguf")
PROMPTS_PER_BEHAVIOUR = 4
STEERINGS = (
    "unsteered",
    "hard-8-8",
    "hard-30-30",
    "hard-reverse",
    "hard-first-layer",
    "hard-last-layer",
    "hard-random",
    "soft-scores",
    "soft-random",
)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> HfOlmoe:
    return HfOlmoe(MODEL, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def f32_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native.write_f32(MODEL, tmp_path_factory.mktemp("model") / "f32.gguf")


@pytest.fixture(scope="module")
def llama(f32_model: Path) -> SteeredLlama:
    return native.load(f32_model, n_ctx=256)


@pytest.fixture(scope="module")
def identity() -> ModelIdentity:
    found = model_info(MODEL).identity
    assert found is not None
    return found


@pytest.fixture(scope="module")
def recorded(hf: HfOlmoe) -> tuple[dict[str, np.ndarray], dict[str, cases.Counts]]:
    return record.reference_counts(hf)


@pytest.fixture(scope="module")
def steerings(
    recorded: tuple[dict[str, np.ndarray], dict[str, cases.Counts]], identity: ModelIdentity
) -> dict[str, Steering | None]:
    found = cases.steerings(recorded[1], identity)
    assert tuple(found) == STEERINGS
    return found


def test_f32_copy_has_the_models_routers(f32_model: Path, identity: ModelIdentity) -> None:
    assert model_info(f32_model).identity == identity


@pytest.mark.parametrize("text", cases.TEXTS)
def test_same_tokens(hf: HfOlmoe, llama: SteeredLlama, text: str) -> None:
    assert llama.tokenize(text.encode(), add_bos=False, special=True) == hf.tokenize(text)


@pytest.mark.parametrize("name", STEERINGS)
def test_same_logits_and_experts(
    hf: HfOlmoe,
    llama: SteeredLlama,
    identity: ModelIdentity,
    steerings: dict[str, Steering | None],
    name: str,
    record_property: pytest.RecordProperty,
) -> None:
    steering = steerings[name]
    bias = steering and native.make_bias(steering.mode, steering.values, steering.epsilon, identity)
    worst, changed, near_ties = 0.0, 0.0, 0
    for tokens in cases.prompts(hf, PROMPTS_PER_BEHAVIOUR):
        reference = hf.run(tokens, steering)
        worst = max(worst, native.worst_difference(native.logits(llama, tokens, bias), reference.logits))
        ours = native.selected(llama, tokens, bias, identity.shape)
        other = (ours != reference.selected).any(axis=-1)
        near_ties += int(other.sum())
        assert (reference.margin[other] < native.NEAR_TIE).all()
        if steering:
            changed = max(changed, native.worst_difference(reference.logits, hf.run(tokens).logits))
    record_property("worst_difference", worst)
    record_property("experts_that_differ_at_near_ties", near_ties)
    print(
        f"{name}: {worst:.2f} of what rounding allows, steering moves {changed:.0f} times that, {near_ties} near ties"
    )
    assert worst <= 1
    assert steering is None or changed > 100  # or nothing was compared


@pytest.mark.parametrize("behaviour", cases.BEHAVIOURS)
def test_same_counts(
    recorded: tuple[dict[str, np.ndarray], dict[str, cases.Counts]], f32_model: Path, behaviour: str
) -> None:
    pairs = load_pairs(native.data_file(f"{behaviour}.pairs.jsonl"))
    assert len(pairs) >= 100
    ours = native.count(f32_model, pairs)
    reference = recorded[1][behaviour]
    assert [ours.n1, ours.n2] == reference.n.tolist()
    difference = np.abs(np.stack([ours.a1, ours.a2]) - reference.a)
    ties = int(reference.near_ties.sum())
    print(f"{behaviour}: {reference.n.sum()} tokens, {difference.sum()} counts differ, {ties} near ties")
    assert (difference <= reference.near_ties[:, :, None]).all()


def test_recorded_files_are_of_today(
    hf: HfOlmoe,
    recorded: tuple[dict[str, np.ndarray], dict[str, cases.Counts]],
    steerings: dict[str, Steering | None],
) -> None:
    for name, live in (("counts", recorded[0]), ("logits", record.reference_logits(hf, steerings))):
        with np.load(record.DATA / f"reference-{name}.npz", allow_pickle=False) as file:
            kept = dict(file)
        assert kept.keys() == live.keys()
        near = kept["near_ties"] | live["near_ties"]
        for key, value in live.items():
            what = f"reference-{name}.npz: {key}: run .venv/bin/python tests/integration/reference/record.py"
            if key == "logits":
                assert native.worst_difference(kept[key], value) <= 1, what
            elif key == "selected":
                assert not ((kept[key] != value).any(axis=-1) & ~near).any(), what
            elif key in ("a1", "a2"):
                side = ("a1", "a2").index(key)
                assert (np.abs(kept[key] - value) <= near[:, side, :, None]).all(), what
            elif key != "near_ties":
                assert np.array_equal(kept[key], value), what
