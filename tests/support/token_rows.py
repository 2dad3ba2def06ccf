"""Batches whose tokens are steered by rows of their context, and the same prompts in a context of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import capi
from tests.support.low_level import F32, Context, GGMLTensor, Row
from tests.support.random_models import RandomModel
from tests.support.sequence_steering import Steering, check_layer

FEW_TOKENS, KEPT_GRAPHS = 32, 16  # native/src/steermoe-sequences.cpp


def number_of(place: int) -> int:
    """A row's number: far apart, and the greatest is among them."""
    return (place * 389 + capi.MAX_ROWS - 1) % capi.MAX_ROWS


def attach_rows(context: Context, identity: ModelIdentity, under: Sequence[Steering]) -> list[int]:
    """Attach each steering to a row; the numbers, -1 for one without values."""
    numbers = [number_of(place) if steering.rows else -1 for place, steering in enumerate(under)]
    for number, steering in zip(numbers, under, strict=True):
        if number >= 0:
            capi.attach_row(context.ctx, number, steering.native(identity))
    return numbers


class RowContext(Context):
    """A context whose tokens are steered by `under`, each by a place in it.

    `ubatches` says of which ubatch each array of `seen` is, by the count of choices of its layer before it.
    """

    def __init__(self, model: Any, identity: ModelIdentity, under: Sequence[Steering], **options: Any) -> None:
        self.ubatches: dict[str, list[int]] = {}
        super().__init__(model, **options)
        self.numbers = attach_rows(self, identity, under)

    def _see(self, tensor: int, ask: bool, data: object) -> bool:
        name = GGMLTensor.from_address(tensor).name.decode()
        kind, _, layer = name.rpartition("-")
        before = len(self.seen.get(f"ffn_moe_topk-{layer}", []))
        wanted = super()._see(tensor, ask, data)
        if wanted and not ask:
            behind = not kind.startswith(("ffn_moe_logits", "ffn_moe_probs", "ffn_moe_argsort", "ffn_moe_topk"))
            self.ubatches.setdefault(name, []).append(before - behind)
        return wanted

    def decode_under(self, rows: Sequence[Row], places: Sequence[int]) -> npt.NDArray[np.float32]:
        """`decode_rows`, the i-th token under steering places[i]."""
        capi.set_token_rows(self.ctx, [self.numbers[place] for place in places])
        return self.decode_rows(rows)


def alone(
    loaded: tuple[ModelIdentity, Any], under: Sequence[Steering], rows: Sequence[Row], places: Sequence[int]
) -> npt.NDArray[np.float32]:
    """Logits of the outputs of one sequence in a context of its own, whose cache is F32."""
    identity, model = loaded
    with RowContext(model, identity, under, type_kv=F32) as context:
        return context.decode_under([(token, position, 0, output) for token, position, _, output in rows], places)


def check_ubatches(
    model: RandomModel, context: RowContext, under: Sequence[Steering], places: Sequence[int], sizes: Sequence[int]
) -> None:
    """The promise for every token of every layer, ubatch by ubatch of `sizes` tokens.

    A layer's logits are edited in those ubatches that have a token whose steering edits them. Those of few tokens may
    keep the nodes of one before them; others have no more than they need.
    """
    edits = "ffn_moe_logits_biased" if model.arch == "gpt-oss" else "ffn_moe_logits_steered"
    for layer in range(model.n_layer):
        parts: list[dict[str, list[Any]]] = [{} for _ in sizes]
        for name, arrays in context.seen.items():
            for array, ubatch in zip(arrays, context.ubatches[name], strict=True):
                if name.endswith(f"-{layer}"):
                    assert name not in parts[ubatch]
                    parts[ubatch][name] = [array]
        start = 0
        for number, (size, part) in enumerate(zip(sizes, parts, strict=True)):
            mine = np.array(places[start : start + size])
            of_ubatch = [steering if place in mine else Steering() for place, steering in enumerate(under)]
            needed = any(layer in steering.rows for steering in of_ubatch)
            if not needed and f"{edits}-{layer}" in part:
                assert size <= FEW_TOKENS, "edited for no token"
                assert sizes[number - 1] == size, "the nodes of no ubatch before it"
                of_ubatch.append(Steering({layer: np.zeros(model.n_expert, np.float32)}))  # that changes nothing
            check_layer(model, part, layer, of_ubatch, mine)
            start += size
        assert start == len(places)
