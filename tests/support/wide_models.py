"""Random models whose rows are long enough for every quantization: K-quants and IQ4_XS have blocks of 256 values."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from tests.support import random_models
from tests.support.random_models import RandomModel, write_random_model

ROW = 256

# Not 8 experts: llama-quantize has rules of its own for those.
OLMOE = RandomModel("olmoe", n_layer=2, n_expert=6, k=2)
QWEN3MOE = RandomModel("qwen3moe", n_layer=2, n_expert=6, k=2, norm=True)
GPT_OSS = RandomModel("gpt-oss", n_layer=2, n_expert=6, k=2)
SIGMOID_BIAS = RandomModel("dots1", n_layer=3, n_expert=6, k=2, n_dense=1, gating=2, selection_bias=True)


def write_wide_model(path: Path, model: RandomModel) -> Path:
    """`write_random_model` with rows of 256 values."""
    sizes = {"N_EMBD": ROW, "N_FF": ROW, "HEAD": ROW // random_models.N_HEAD}
    with mock.patch.multiple(random_models, **sizes):
        return write_random_model(path, model)
