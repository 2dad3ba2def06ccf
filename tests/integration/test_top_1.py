"""A model that uses one expert a token (Switch), from pairs to steering: what is promoted displaces another expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from steermoe_local import BiasFile, ExpertMap, FormatError, model_info
from steermoe_local.cli import main
from steermoe_local.identity import ModelIdentity
from steermoe_local.llama.steered_llama import SteeredLlama
from tests.integration.reference import native
from tests.support.gguf_copy import copy_model

N_PAIRS = 12
TOKENS = [300, 17, 5, 801, 44, 900, 63, 12, 700, 101]


@pytest.fixture(scope="module")
def top_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("top-1") / "top-1.gguf"
    copy_model(native.data_file("tiny-moe.gguf"), path, top_k=1)
    return path


@pytest.fixture(scope="module")
def identity(top_1: Path) -> ModelIdentity:
    return model_info(top_1).require_moe()


@pytest.fixture(scope="module")
def map_file(top_1: Path) -> Path:
    pairs, made = top_1.with_name("pairs.jsonl"), top_1.with_name("map.json")
    lines = native.data_file("digits-words.pairs.jsonl").read_text("utf-8").splitlines()[:N_PAIRS]
    pairs.write_text("\n".join(lines) + "\n", "utf-8")
    run("detect", "-m", top_1, "--pairs", pairs, "-o", made, "-t", 1)
    return made


@pytest.fixture(scope="module")
def llama(top_1: Path) -> Any:
    opened = native.load(top_1, n_ctx=64)
    yield opened
    opened.close()


def run(*args: Any) -> Any:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result


def experts(llama: SteeredLlama, bias: BiasFile | None, identity: ModelIdentity) -> Any:
    found = native.selected(llama, TOKENS, bias, identity.shape)
    assert found.shape == (identity.n_layer, len(TOKENS), 1)
    return found[:, :, 0]


def test_one_count_a_token(map_file: Path, identity: ModelIdentity) -> None:
    made = ExpertMap.load(map_file)
    assert made.identity == identity
    assert made.identity.n_expert_used == 1
    assert made.n_pairs == N_PAIRS
    assert made.a1 is not None
    assert made.a2 is not None
    assert (made.a1.sum(axis=1) == made.n1).all()
    assert (made.a2.sum(axis=1) == made.n2).all()
    assert np.abs(made.rd.sum(axis=1)).max() < 1e-9, "what one expert gains, others lose"


def test_promoting_displaces(llama: SteeredLlama, identity: ModelIdentity) -> None:
    before = experts(llama, None, identity)
    signs = np.zeros(identity.shape, np.int8)
    promoted = np.array([(set(range(identity.n_expert)) - set(row)).pop() for row in before.tolist()])
    signs[np.arange(identity.n_layer), promoted] = 1
    after = experts(llama, BiasFile.from_signs(signs, identity), identity)
    assert (after == promoted[:, None]).all(), "every token uses the promoted expert, and so no other"


def test_suppressing_displaces_by_the_next(llama: SteeredLlama, identity: ModelIdentity) -> None:
    before = experts(llama, None, identity)
    signs = np.zeros(identity.shape, np.int8)
    signs[-1, before[-1, 0]] = -1
    after = experts(llama, BiasFile.from_signs(signs, identity), identity)
    gone = before[-1] == before[-1, 0]
    assert (after[:-1] == before[:-1]).all()
    assert (after[-1][~gone] == before[-1][~gone]).all()
    assert (after[-1][gone] != before[-1, 0]).all()
    only = np.where(np.arange(identity.n_expert) == 7, 0, -1)
    signs[-1] = only
    assert (experts(llama, BiasFile.from_signs(signs, identity), identity)[-1] == 7).all()


def test_more_than_one_of_a_layer(map_file: Path, identity: ModelIdentity) -> None:
    signs = np.zeros(identity.shape, np.int8)
    signs[2, [3, 4]] = 1
    with pytest.raises(FormatError, match=r"bias\.2: activates 2 experts, but a token uses 1"):
        BiasFile.from_signs(signs, identity)
    made = ExpertMap.load(map_file)
    chosen = made.choose(n_activate=40)
    assert (chosen > 0).sum(axis=1).max() == 1, "the first of each layer stays, the others are dropped"
    assert (chosen > 0).sum() > 1


def test_all_of_a_layer(identity: ModelIdentity) -> None:
    signs = np.zeros(identity.shape, np.int8)
    signs[1] = -1
    with pytest.raises(FormatError, match=r"bias\.1: leaves 0 experts, but a token uses 1"):
        BiasFile.from_signs(signs, identity)


def test_a_run_with_the_map(top_1: Path, map_file: Path) -> None:
    base = ("run", top_1, "Count from 3 to six.", "-n", 4, "--temp", 0, "-t", 1, "--json")
    steered = run(*base, "--map", map_file, "--activate", 2, "--deactivate", 2)
    plain = run(*base)
    assert json.loads(steered.stdout) != json.loads(plain.stdout)
