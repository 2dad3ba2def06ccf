"""Records which experts each single token of a text selects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import NativeError, UsageError
from ..llama.loaded_model import loaded_identity
from ..llama.steered_llama import SteeredLlama
from .decoding import ContextOptions, GroupDecoder
from .grouping import Group


def selected_experts(
    model: SteeredLlama,
    texts: Iterable[tuple[Sequence[int], int, int]],
    *,
    n_batch: int = 512,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    type_k: int | None = None,
    type_v: int | None = None,
    flash_attn: bool | Literal["auto"] | None = None,
) -> Iterator[npt.NDArray[np.bool_]]:
    """Decode texts, (tokens, first, last) each, unsteered, and return the experts that tokens [first, last) select.

    Yields bool [last - first, n_layer, n_expert] for each text; in layers without a router all is False. The weights
    are the model's, the context is one of its own. Raises UsageError, ModelError (no experts), NativeError.
    """
    identity = loaded_identity(model._model)
    options = ContextOptions(n_batch, n_ubatch, n_threads, type_k, type_v, flash_attn or False)
    with GroupDecoder(model._model, identity.shape, options) as decoder:
        for tokens, first, last in texts:
            if not 0 <= first < last <= len(tokens):
                raise UsageError(f"no tokens {first} to {last} in {len(tokens)}")
            parts = []
            for start in range(first, last, decoder.n_bins):
                end = min(start + decoder.n_bins, last)
                counts, seen = decoder.count(_one_bin_a_token(tokens[:end], start))
                wanted = np.where(seen[0] > 0, identity.n_expert_used, 0)
                if seen.max(initial=0) > 1 or (counts.sum(axis=2) != wanted).any():
                    raise NativeError("a token was seen twice, or did not select top-k experts; report this")
                parts.append(counts > 0)
            yield np.concatenate(parts)


def _one_bin_a_token(tokens: Sequence[int], start: int) -> Group:
    """A text as one prompt whose tokens from `start` on are counted in a bin each."""
    n, counted = len(tokens), len(tokens) - start
    bins = np.full(n, -1, dtype=np.int32)
    bins[start:] = np.arange(counted)
    members: Any = np.ones((counted, 1), dtype=np.bool_)
    return Group(
        n_prompts=1,
        n_kept=0,
        tokens=np.asarray(tokens, dtype=np.int32),
        positions=np.arange(n, dtype=np.int32),
        sequences=np.zeros(n, dtype=np.int32),
        ends=np.arange(1, n + 1, dtype=np.int64),
        bins=bins,
        members=members,
    )
