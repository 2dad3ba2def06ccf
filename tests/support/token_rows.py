"""Batches whose tokens are steered by rows of their context, and the same prompts in a context of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import capi
from tests.support.low_level import F32, Context, Row
from tests.support.random_models import RandomModel
from tests.support.sequence_steering import Steering, check_layer


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
    """A context whose tokens are steered by `under`, each by a place in it."""

    def __init__(self, model: Any, identity: ModelIdentity, under: Sequence[Steering], **options: Any) -> None:
        super().__init__(model, **options)
        self.numbers = attach_rows(self, identity, under)

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
    model: RandomModel,
    seen: dict[str, list[Any]],
    under: Sequence[Steering],
    places: Sequence[int],
    sizes: Sequence[int],
) -> None:
    """The promise for every token of every layer, ubatch by ubatch of `sizes` tokens.

    A layer's logits are edited in those ubatches alone that have a token whose steering edits them.
    """
    edits = "ffn_moe_logits_biased" if model.arch == "gpt-oss" else "ffn_moe_logits_steered"
    for layer in range(model.n_layer):
        waiting = {name: list(arrays) for name, arrays in seen.items() if name.endswith(f"-{layer}")}
        start = 0
        for size in sizes:
            mine = np.array(places[start : start + size])
            edited = any(layer in under[place].rows for place in set(mine.tolist()))
            part = {name: [arrays.pop(0)] for name, arrays in waiting.items() if edited or name != f"{edits}-{layer}"}
            # steerings that no token of the ubatch has are not looked for in it
            check_layer(model, part, layer, [s if p in mine else Steering() for p, s in enumerate(under)], mine)
            start += size
        assert start == len(places)
        assert not any(waiting.values()), "more tensors than ubatches"
