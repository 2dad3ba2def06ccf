"""What a model in memory is."""

from __future__ import annotations

from typing import Any

from . import _native
from .errors import ModelError
from .identity import ModelIdentity

__all__ = ["loaded_identity"]


def loaded_identity(model: Any) -> ModelIdentity:
    """Identity of a loaded model (llama_cpp's `LlamaModel`), from llama.cpp's own view of it.

    Raises ModelError for a model without experts, FormatError for impossible numbers of them.
    """
    metadata = model.metadata()
    architecture = metadata.get("general.architecture", "")
    n_expert = int(metadata.get(f"{architecture}.expert_count", 0))
    if not n_expert:
        raise ModelError(f"this {architecture} model has no experts; only Mixture-of-Experts models route")
    return ModelIdentity(
        architecture=architecture,
        n_layer=int(_native.llama_cpp().llama_model_n_layer(model.model)),
        n_expert=n_expert,
        n_expert_used=int(metadata.get(f"{architecture}.expert_used_count", 0)),
        router_sha256=_native.router_sha256(model.model),
    )
