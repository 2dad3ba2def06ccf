"""The options of the context in which interventions are decoded, which `attribute` and `fit` have in common."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from ..errors import UsageError


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """How an `InterventionDecoder` runs a model.

    Attributes:
        n_batch, n_threads, type_k, type_v, flash_attn: as in `llama_cpp.Llama`.
        force: steer a model whose routers differ from the map's.
    """

    n_batch: int = 512
    n_threads: int | None = None
    type_k: int | None = None
    type_v: int | None = None
    flash_attn: bool | Literal["auto"] = "auto"
    force: bool = False

    @property
    def decoder_arguments(self) -> dict[str, Any]:
        """These options as arguments of `InterventionDecoder`."""
        return {item.name: getattr(self, item.name) for item in fields(DecoderOptions)}

    def _require_whole(self, *names: str) -> None:
        """Raise UsageError for one of these fields that is not a whole number from 1 up."""
        for name in names:
            if type(value := getattr(self, name)) is not int or value < 1:
                raise UsageError(f"{name}: {value!r} is not a whole number from 1 up")
