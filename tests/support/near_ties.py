"""Choices of experts that rounding may decide otherwise: how many there are, from the router logits themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steermoe_local.llama.rendering import Renderer
from steermoe_local.pairs.pairs import Pair
from tests.support import rounding
from tests.support.low_level import F32, Context, identity_of, open_model


def near_ties(
    z: npt.ArrayLike, k: int, layer: int, n_sum: int, stored: float = rounding.F32, summed: float = rounding.F32
) -> npt.NDArray[np.bool_]:
    """Rows of the router logits z [tokens, experts] of a layer whose choice of k another computation may not share.

    The k-th and the next largest are nearer to each other than both may move. A choice that differs changes what
    follows it by more than rounding: only where no row is near a tie must all choices be the same.
    """
    ordered = np.sort(np.asarray(z, np.float64), axis=-1)
    margin = ordered[..., -k] - ordered[..., -k - 1]
    return np.asarray(margin <= np.sqrt(2) * rounding.logits(z, layer + 1, n_sum, stored, summed))


def near_ties_of_prompts(path: Path, prompts: Iterable[Sequence[int]], n_sum: int = rounding.TINY["n_sum"]) -> int:
    """Near ties of all tokens and layers of these prompts, each computed alone with a cache in F32."""
    identity, found = identity_of(path), 0
    with closing(open_model(path)) as model, Context(model, capture=True, n_seq_max=1, type_kv=F32) as context:
        for tokens in prompts:
            context.seen.clear()
            context.fresh(tokens)
            for layer in range(identity.n_layer):
                if f"ffn_moe_logits-{layer}" in context.seen:
                    (z,) = (part.reshape(-1, identity.n_expert) for part in context.seen[f"ffn_moe_logits-{layer}"])
                    found += int(near_ties(z, identity.n_expert_used, layer, n_sum).sum())
    return found


def near_ties_of_pairs(path: Path, pairs: Iterable[Pair]) -> int:
    """Near ties of all that `record_counts` decodes for these pairs."""
    with closing(open_model(path)) as model:
        renderer = Renderer(model)
        sides: list[Any] = [(*side,) for pair in pairs for side in pair.sides()]
        prompts = [renderer.prompt(side, target).tokens for side, target in sides]
    return near_ties_of_prompts(path, prompts)
