"""Facts about a loaded model: its identity, and how its attention works."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..identity import ModelIdentity
from . import capi

_OWN_SEQUENCES = ("deepseek4",)  # llama.cpp's memory for it takes tokens of one sequence only
_BOTH_WAYS = ("llada-moe", "rnd1")  # llama.cpp: hparams.causal_attn


def loaded_identity(model: Any) -> ModelIdentity:
    """Identity of a loaded model (llama_cpp's `LlamaModel`), as llama.cpp reports it.

    Raises ModelError for a model without experts, FormatError for impossible numbers of them.
    """
    metadata = model.metadata()
    architecture = metadata.get("general.architecture", "")
    n_expert = int(metadata.get(f"{architecture}.expert_count", 0))
    if not n_expert:
        raise ModelError(f"this {architecture} model has no experts; only Mixture-of-Experts models route")
    return ModelIdentity(
        architecture=architecture,
        n_layer=int(capi.llama_cpp().llama_model_n_layer(model.model)),
        n_expert=n_expert,
        n_expert_used=int(metadata.get(f"{architecture}.expert_used_count", 0)),
        router_sha256=capi.router_sha256(model.model),
    )


def is_causal(model: Any) -> bool:
    """Is the attention of a `LlamaModel` causal? That of diffusion models is bidirectional."""
    metadata = model.metadata()
    architecture = metadata.get("general.architecture", "")
    return architecture not in _BOTH_WAYS and metadata.get(f"{architecture}.attention.causal") != "false"


def can_share(model: Any) -> bool:
    """Can sequences of a `LlamaModel` share the memory of a common beginning?

    Recurrent states cannot be shared by prefix.
    """
    lib = capi.llama_cpp()
    return is_causal(model) and not (
        lib.llama_model_is_recurrent(model.model)
        or lib.llama_model_is_hybrid(model.model)
        or model.metadata().get("general.architecture") in _OWN_SEQUENCES
    )


@contextlib.contextmanager
def open_model(path: str | os.PathLike[str], *, verbose: bool = False, **params: Any) -> Iterator[Any]:
    """Load a GGUF file as llama_cpp's `LlamaModel`, without a context; closed at the end.

    `params` are fields of `llama_model_params`, such as `n_gpu_layers` or `vocab_only`. Raises ModelError.
    """
    if not Path(path).is_file():
        raise ModelError(f"{path}: no such file; give the path of a GGUF model")
    lib = capi.llama_cpp()
    from llama_cpp import _internals
    from llama_cpp._logger import set_verbose

    set_verbose(verbose)
    model_params = lib.llama_model_default_params()
    for name, value in params.items():
        setattr(model_params, name, value)
    with capi.loading(path):
        model = _internals.LlamaModel(path_model=os.fspath(path), params=model_params, verbose=verbose)
    with contextlib.closing(model):
        yield model
