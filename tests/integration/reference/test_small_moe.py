"""The export of examples/small_moe against its PyTorch model, with random weights (small_moe.py: with trained ones)."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.model_files.model_info import model_info
from tests.integration.reference import cases
from tests.integration.reference.small_moe import (
    SPECIAL_TOKENS,
    Config,
    SmallMoE,
    compare,
    export,
    other_tokens,
    small_card,
    small_train,
    train_tokenizer,
)
from tests.support.paths import ROOT

pytestmark = pytest.mark.reference

SOURCES = (ROOT / "docs" / "method.md", ROOT / "steermoe_local" / "identity.py")
TEXTS = (*cases.TEXTS, *(path.read_text("utf-8") for path in SOURCES))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(list(TEXTS))


@pytest.fixture(scope="module", params=[1, 2], ids=["top-1", "top-2"])
def exported(request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(4)
    sizes = {"hidden": 64, "layers": 3, "heads": 2, "experts": 8, "expert_ff": 32, "context": 256}
    model = SmallMoE(Config(vocab=tokenizer.get_vocab_size(), top_k=request.param, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            # as large as after training: those of the start leave all experts and tokens nearly alike
            parameter.mul_(8) if parameter.ndim > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("small") / "f32.gguf"
    export(model.eval(), tokenizer, path)
    return model, path


def test_facts(exported: Any) -> None:
    model, path = exported
    info = model_info(path)
    assert (info.n_layer, info.n_expert, info.n_expert_used) == (3, 8, model.config.top_k)
    assert not info.obstacle
    assert not info.chat_template, "a base model"
    assert "no expert was planted" in path.read_bytes()[:4000].decode("utf-8", "replace")


def test_same_logits_and_experts(exported: Any, tokenizer: Any) -> None:
    model, path = exported
    found = compare(model, path, [tokenizer.encode(text).ids for text in TEXTS])
    print(found)
    assert found.worst <= 1
    assert found.other_experts == 0
    assert found.compared > 500


def test_a_changed_expert_is_seen(exported: Any, tokenizer: Any) -> None:
    """Or nothing was compared."""
    model, path = exported
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[-1].moe.down[0].mul_(1.001)
    assert compare(other, path, [tokenizer.encode(text).ids for text in TEXTS]).worst > 1


def test_same_tokens(exported: Any, tokenizer: Any) -> None:
    llama = SteeredLlama(exported[1], n_ctx=64)
    assert other_tokens(llama, tokenizer, TEXTS) == []
    ends = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS[:1]]
    assert [llama.token_eos()] == ends


SMALL = Config(vocab=300, hidden=32, layers=2, heads=2, experts=4, top_k=2, expert_ff=16, context=64)


@pytest.mark.parametrize("bf16", [False, True])
def test_training_makes_its_tensors_where_the_model_is(bf16: bool) -> None:
    """As a GPU needs it: what is made without a device is on `meta` here, and cannot be added to the others."""
    model, windows = SmallMoE(SMALL), torch.randint(SMALL.vocab, (2, 33))
    shares = torch.full((SMALL.layers, SMALL.experts), 0.25)
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        ce, balance, z, counts = small_train.losses(model, windows, shares)
        (ce + balance + z).backward()
    assert torch.isfinite(torch.stack([ce, balance, z])).all()
    assert counts.sum(-1).tolist() == [2 * 32 * SMALL.top_k] * SMALL.layers
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one worker."""
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "meet").as_uri(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_interrupted_training_gives_the_same_model(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_train.os, "nice", lambda by: by)
    stream = np.random.default_rng(0).integers(0, SMALL.vocab, 3000).astype(np.uint16)
    for part in ("train", "heldout"):
        np.save(tmp_path / f"{part}.npy", stream)
    monkeypatch.setattr(small_train, "VOCAB_SIZE", SMALL.vocab)
    sizes = {name: getattr(SMALL, name) for name in ("hidden", "layers", "heads", "experts", "top_k", "expert_ff")}
    options = {"steps": 6, "batch": 4, "micro": 2, "length": 16, "lr": 2e-3, "balance": 0.01, "z_loss": 0.001}
    options |= {"context": 64, "seed": 0, "workers": 1, "save_every": 3, "evaluate_every": 3, "bf16": False}

    def run(name: str, resume: bool) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        given = sizes | options | {"device": "cpu", "tokens": tmp_path, "folder": folder, "resume": resume}
        small_train.train(0, argparse.Namespace(**given))
        return torch.load(folder / "last.pt", weights_only=True)

    whole = run("whole", False)

    def save_and_stop(*arguments: Any) -> None:
        saved(*arguments)
        raise KeyboardInterrupt

    saved = small_train.save
    monkeypatch.setattr(small_train, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run("parts", False)
    monkeypatch.setattr(small_train, "save", saved)
    torch.rand(7)  # where the generator of random numbers stands does not matter
    resumed = run("parts", True)
    assert resumed["step"] == whole["step"] == 6
    assert all(torch.equal(resumed["model"][name], value) for name, value in whole["model"].items())
    untrained = SmallMoE(SMALL).state_dict()
    assert not any(torch.equal(untrained[name], whole["model"][name]) for name in ("embed", "head"))


def test_a_scaling_trial_compares_runs_after_equal_numbers_of_tokens(tmp_path: Path) -> None:
    """A resumed run has steps twice, of which the last counts; a run that stood still for a while is not slower."""
    rows = {
        "a": [(10, 1.0, 8.0, 9.0), (20, 2.0, 7.5, 8.0), (20, 2.5, 7.0, 7.75), (30, 99.0, 6.0, 5.0)],
        "b": [(10, 4.0, 8.0, 9.5), (20, 6.0, 7.0, 8.25)],
    }
    for name, steps in rows.items():
        (tmp_path / name).mkdir()
        written = [
            {"step": step, "tokens": 100 * step, "seconds": seconds, "loss": loss, "heldout": heldout}
            for step, seconds, loss, heldout in steps
        ]
        (tmp_path / name / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
        (tmp_path / name / "options.json").write_text(json.dumps({"config": SMALL.to_dict(), "options": {}}))
    table = small_card.trial_table(tmp_path)
    assert table.startswith("After 2,000 tokens each")
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[-2:]]
    assert [(row[0], row[4], row[5]) for row in found] == [("a", "1.50", "7.750"), ("b", "2.00", "8.250")]
