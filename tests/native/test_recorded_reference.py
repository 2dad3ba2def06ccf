"""The native library against what transformers computed with the embedded model, kept in tests/data/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from steermoe_local.model_files.model_info import model_info
from steermoe_local.pairs.pairs import load_pairs, pairs_digest
from tests.integration.reference import native
from tests.support.paths import DATA

pytestmark = pytest.mark.numeric

MODEL = native.data_file("tiny-moe.gguf")
STEERINGS = ("unsteered", "hard-8-8", "hard-random", "soft-random")
BEHAVIOURS = ("digits-words", "document-memory", "refuse-comply")
AGAIN = "make test-reference, then .venv/bin/python tests/integration/reference/record.py"


def load(name: str) -> dict[str, np.ndarray]:
    """A reference file, which must be of today's embedded model."""
    with np.load(DATA / f"reference-{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    if str(arrays["model_sha256"]) != native.sha256(MODEL):
        pytest.fail(f"reference-{name}.npz was recorded with another {MODEL.name}; record it again: {AGAIN}")
    return arrays


@pytest.fixture(scope="module")
def f32_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native.write_f32(MODEL, tmp_path_factory.mktemp("model") / "f32.gguf")


def prompts(reference: dict[str, np.ndarray]) -> Iterator[tuple[list[int], slice]]:
    """Tokens of each prompt, and where they stand in the arrays over all tokens."""
    start = 0
    for length in reference["lengths"].tolist():
        part = slice(start, start + length)
        yield reference["tokens"][part].tolist(), part
        start += length


@pytest.mark.parametrize("name", STEERINGS)
def test_logits_and_experts(f32_model: Path, name: str) -> None:
    reference = load("logits")
    assert reference["steerings"].tolist() == list(STEERINGS)
    s = STEERINGS.index(name)
    identity = model_info(MODEL).identity
    assert identity is not None
    values, epsilon = reference["values"][s], float(reference["epsilons"][s])
    bias = native.make_bias(str(reference["modes"][s]), values, epsilon, identity) if values.any() else None
    llama = native.load(f32_model, n_ctx=256)
    for p, (tokens, part) in enumerate(prompts(reference)):
        ours = native.logits(llama, tokens, bias)[reference["places"][p]]
        assert native.worst_difference(ours, reference["logits"][s, p]) <= 1
        other = native.selected(llama, tokens, bias, identity.shape) != reference["selected"][s][:, part]
        assert not (other.any(axis=-1) & ~reference["near_ties"][s][:, part]).any()


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_counts(f32_model: Path, behaviour: str) -> None:
    reference = load("counts")
    assert reference["behaviours"].tolist() == list(BEHAVIOURS)
    b = BEHAVIOURS.index(behaviour)
    pairs = load_pairs(native.data_file(f"{behaviour}.pairs.jsonl"))
    if str(reference["pairs_sha256"][b]) != pairs_digest(pairs):
        pytest.fail(f"reference-counts.npz was recorded with other {behaviour} pairs; record it again: {AGAIN}")
    ours = native.count(f32_model, pairs)
    assert (ours.n1, ours.n2) == (reference["n1"][b], reference["n2"][b])
    for side, (a, name) in enumerate(((ours.a1, "a1"), (ours.a2, "a2"))):
        assert (np.abs(a - reference[name][b]) <= reference["near_ties"][b, side][:, None]).all()
