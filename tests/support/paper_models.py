"""A random model with the routing of one of the paper's models, and rankings of its experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from steermoe_local import ExpertMap, model_info
from steermoe_local.maps.rankings import Rankings
from steermoe_local.models.embedded import data_folder
from tests.support import random_models
from tests.support.gguf_copy import copy_model
from tests.support.random_models import RandomModel, write_random_model

TINY = data_folder() / "tiny-moe.gguf"
N_LAYER, N_EXPERT, K, TOKENS = 16, 64, 8, 200  # OLMoE's


def paper_model(folder: Path) -> Path:
    """Write a model with the layers, experts and top-k of OLMoE, and the embedded model's vocabulary and template."""
    return talking_model(folder, RandomModel("olmoe", n_layer=N_LAYER, n_expert=N_EXPERT, k=K))


def talking_model(folder: Path, model: RandomModel) -> Path:
    """Write a random model with the embedded model's vocabulary and template."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_models, "N_VOCAB", 1280)
        bare = write_random_model(folder / "bare.gguf", model)
    copy_model(bare, folder / f"{model.arch}.gguf", tokenizer_of=TINY)
    bare.unlink()
    return folder / f"{model.arch}.gguf"


def ranking(model: Path, behaviour: str) -> ExpertMap:
    """A map as `map import` makes it of the authors' ranking: without numbers, its sides by default names."""
    rng = np.random.default_rng(3)

    def counts() -> npt.NDArray[np.int64]:  # each token selects k experts of each layer
        table = np.zeros((N_LAYER, N_EXPERT), np.int64)
        for row in table:
            for _ in range(TOKENS):
                row[rng.choice(N_EXPERT, K, replace=False)] += 1
        return table

    rankings = Rankings(counts(), counts(), TOKENS, TOKENS, K)
    return rankings.to_map(model_info(model).require_moe(), behaviour, where="test")
