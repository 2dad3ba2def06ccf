"""Small models, counts, maps and files for the tests of the pure half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from steermoe_local.identity import ModelIdentity
from steermoe_local.maps.counts import RoutingCounts
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.steering.bias_file import BiasFile

HEX = "0123456789abcdef" * 4
DATE = "2025-01-31T12:00:00Z"
TOOL = "steermoe-local 0"


def identity(n_layer: int = 3, n_expert: int = 4, k: int = 2, **changes: Any) -> ModelIdentity:
    """Identity of a small made-up model."""
    fields: dict[str, Any] = {
        "architecture": "olmoe",
        "n_layer": n_layer,
        "n_expert": n_expert,
        "n_expert_used": k,
        "router_sha256": HEX,
    }
    return ModelIdentity(**(fields | changes))


def random_counts(
    seed: int, model: ModelIdentity | None = None, n1: int = 7, n2: int = 11, **changes: Any
) -> RoutingCounts:
    """Counts of random top-k choices; layer 0 is dense where there are three layers or more."""
    model = model or identity()
    rng = np.random.default_rng(seed)
    moe = tuple(range(1 if model.n_layer > 2 else 0, model.n_layer))
    a = np.zeros((2, *model.shape), dtype=np.int64)
    for side, n in enumerate((n1, n2)):
        for layer in moe:
            for _ in range(n):
                a[side, layer, rng.permutation(model.n_expert)[: model.n_expert_used]] += 1
    fields: dict[str, Any] = {
        "identity": model,
        "a1": a[0],
        "a2": a[1],
        "n1": n1,
        "n2": n2,
        "moe_layers": moe,
        "pairs_digest": (f"{seed:064x}",),
        "n_pairs": 3,
        "behaviour": "digits-words",
        "created": DATE,
        "tool": TOOL,
    }
    return RoutingCounts(**(fields | changes))


def table_map(rd: Any, k: int = 1, **changes: Any) -> ExpertMap:
    """An expert map with the given scores and nothing else."""
    table = np.asarray(rd, dtype=np.float64)
    fields: dict[str, Any] = {
        "identity": identity(table.shape[0], table.shape[1], k),
        "behaviour": "test",
        "rd": table,
        "created": DATE,
        "tool": TOOL,
    }
    return ExpertMap(**(fields | changes))


def hard_bias() -> BiasFile:
    """The hand-made bias of tests/golden/hard.gguf: layer 1 and 2 of three."""
    signs = [[0, 0, 0, 0], [1, 0, -1, 0], [-1, 0, 0, -1]]
    provenance = {"behaviour": "digits-words", "tool": TOOL, "choice": '{"n_activate": 1}'}
    return BiasFile.from_signs(signs, identity(), provenance=provenance)


def write_gguf(path: Path, arch: str, fields: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """Write a GGUF; a tensor may be an array or (bytes array, its ggml type)."""
    writer = GGUFWriter(path, arch)
    for key, value in fields.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, data in tensors.items():
        if isinstance(data, tuple):
            writer.add_tensor(name, data[0], raw_dtype=data[1])
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_parts(n_layer: int = 3, n_expert: int = 4, n_embd: int = 32) -> tuple[Any, Any]:
    """Fields and tensors of a small olmoe-like GGUF whose layer 0 is dense."""
    rng = np.random.default_rng(5)
    fields: dict[str, Any] = {
        "general.name": "Tiny",
        "general.file_type": 15,
        "olmoe.block_count": n_layer,
        "olmoe.expert_count": n_expert,
        "olmoe.expert_used_count": 2,
        "olmoe.context_length": 512,
        "olmoe.embedding_length": n_embd,
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(50)],
    }
    tensors: dict[str, Any] = {"token_embd.weight": np.zeros((5, n_embd), np.float32)}
    # Descending: the order of the hash must come from the layer, not from the file.
    for layer in reversed(range(n_layer)):
        name = f"blk.{layer}.ffn_gate_inp.weight" if layer else "blk.0.ffn_up.weight"
        tensors[name] = rng.normal(size=(n_expert, n_embd)).astype(np.float32)
    return fields, tensors
