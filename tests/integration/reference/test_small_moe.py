"""The export of examples/small_moe against its PyTorch model, with random weights (small_moe.py: with trained ones)."""

from __future__ import annotations

import copy
from typing import Any

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
