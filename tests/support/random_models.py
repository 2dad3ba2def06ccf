"""Random GGUF models small enough to write in a test: F32 weights, no vocabulary, a few thousand parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

N_VOCAB = 64
N_EMBD = 32
N_HEAD = 2
N_FF = 16
HEAD = N_EMBD // N_HEAD


@dataclass(frozen=True)
class RandomModel:
    """What a random model is to be; `gating` is llama.cpp's number, for the architectures that read it."""

    arch: str
    n_layer: int = 3
    n_expert: int = 8
    k: int = 2
    n_dense: int = 0
    gating: int = 0
    selection_bias: bool = False
    norm: bool = False  # normalise the selected weights
    seed: int = 1
    n_ff: int = 0  # width of experts and dense layers; 0: N_FF


OLMOE = RandomModel("olmoe", n_layer=4, n_expert=16, k=4)
QWEN3MOE = RandomModel("qwen3moe", n_layer=3, n_expert=8, k=2, norm=True)
GPT_OSS = RandomModel("gpt-oss", n_layer=4, n_expert=12, k=3)
DENSE_FIRST = RandomModel("dots1", n_dense=1, gating=1)
SIGMOID = RandomModel("dots1", n_dense=1, gating=2)
SELECTION_BIAS = RandomModel("dots1", n_dense=1, gating=1, selection_bias=True)
# one expert a token: what is promoted displaces the one that was selected
TOP_1 = RandomModel("olmoe", k=1)
# the ways to route that can be steered: softmax, softmax then normalised, softmax of the selected with a router bias
STEERABLE = {"olmoe": OLMOE, "qwen3moe": QWEN3MOE, "gpt-oss": GPT_OSS, "top-1": TOP_1}


def write_random_model(
    path: Path, model: RandomModel, router_type: GGMLQuantizationType = GGMLQuantizationType.F32
) -> Path:
    """Write the model; the same description gives the same weights."""
    rng = np.random.default_rng(model.seed)

    def random(*shape: int, scale: float = 0.2) -> Any:
        return rng.normal(scale=scale, size=shape).astype(np.float32)

    def norm(size: int) -> Any:
        return 1 + random(size, scale=0.1)

    tensors: dict[str, Any] = {
        "token_embd.weight": random(N_VOCAB, N_EMBD, scale=1.0),
        "output_norm.weight": norm(N_EMBD),
        "output.weight": random(N_VOCAB, N_EMBD),
    }
    gpt_oss = model.arch == "gpt-oss"
    n_ff = model.n_ff or N_FF
    # olmoe normalises the whole of q and k, the others each head
    qk_norm = {"olmoe": N_EMBD, "gpt-oss": 0}.get(model.arch, HEAD)
    for layer in range(model.n_layer):
        block: dict[str, Any] = {"attn_norm.weight": norm(N_EMBD)}
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            block[f"{name}.weight"] = random(N_EMBD, N_EMBD)
        if qk_norm:
            block["attn_q_norm.weight"], block["attn_k_norm.weight"] = norm(qk_norm), norm(qk_norm)
        block["post_attention_norm.weight" if gpt_oss else "ffn_norm.weight"] = norm(N_EMBD)
        if layer < model.n_dense:
            block |= _ffn(random, "", n_ff)
        else:
            # wide enough that the choice depends on the token
            block["ffn_gate_inp.weight"] = random(model.n_expert, N_EMBD, scale=0.4)
            block["ffn_gate_exps.weight"] = random(model.n_expert, n_ff, N_EMBD)
            block["ffn_up_exps.weight"] = random(model.n_expert, n_ff, N_EMBD)
            block["ffn_down_exps.weight"] = random(model.n_expert, N_EMBD, n_ff)
            if model.arch == "dots1":
                block |= _ffn(random, "_shexp", n_ff)
            if model.selection_bias:
                block["exp_probs_b.bias"] = random(model.n_expert)
        if gpt_oss:
            block["attn_sinks.weight"] = random(N_HEAD)
            block["attn_output.bias"] = random(N_EMBD)
            block["ffn_gate_inp.bias"] = random(model.n_expert, scale=0.5)
            block["ffn_gate_exps.bias"] = random(model.n_expert, n_ff)
            block["ffn_up_exps.bias"] = random(model.n_expert, n_ff)
            block["ffn_down_exps.bias"] = random(model.n_expert, N_EMBD)
        tensors |= {f"blk.{layer}.{name}": values for name, values in block.items()}
    _write(path, model, tensors, router_type)
    return path


def _ffn(random: Any, suffix: str, size: int) -> dict[str, Any]:
    return {
        f"ffn_gate{suffix}.weight": random(size, N_EMBD),
        f"ffn_up{suffix}.weight": random(size, N_EMBD),
        f"ffn_down{suffix}.weight": random(N_EMBD, size),
    }


def _write(path: Path, model: RandomModel, tensors: dict[str, Any], router_type: GGMLQuantizationType) -> None:
    writer = GGUFWriter(path, model.arch)
    writer.add_context_length(512)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(model.n_layer)
    writer.add_feed_forward_length(model.n_ff or N_FF)
    writer.add_expert_feed_forward_length(model.n_ff or N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(model.n_expert)
    writer.add_expert_used_count(model.k)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("none")
    if model.arch == "gpt-oss":
        writer.add_sliding_window(128)
    if model.arch == "dots1":
        writer.add_leading_dense_block_count(model.n_dense)
        writer.add_expert_shared_count(1)
        writer.add_expert_weights_norm(model.norm)
    if model.gating:
        writer.add_uint32(f"{model.arch}.expert_gating_func", model.gating)
    for name, values in tensors.items():
        router = name.endswith("ffn_gate_inp.weight")
        writer.add_tensor(
            name, values.astype(np.float16) if router and router_type == GGMLQuantizationType.F16 else values
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
