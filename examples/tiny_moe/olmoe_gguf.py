"""Write the weights and the tokenizer of an OLMoE as GGUF; small_moe does so too.

The tensors are those that llama.cpp's converter writes for `OlmoeForCausalLM`: norms and routers in
F32, no permutation of q and k (olmoe uses NEOX rotary positions). No model's code is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer


def tensor_names(layers: int) -> dict[str, str]:
    """GGUF tensor name -> name in the state dict."""
    names = {
        "token_embd.weight": "embed",
        "output_norm.weight": "norm.weight",
        "output.weight": "head",
    }
    parts = {
        "attn_norm": "attn_norm.weight",
        "ffn_norm": "ffn_norm.weight",
        "attn_q": "attn.q_proj.weight",
        "attn_k": "attn.k_proj.weight",
        "attn_v": "attn.v_proj.weight",
        "attn_output": "attn.o_proj.weight",
        "attn_q_norm": "attn.q_norm.weight",
        "attn_k_norm": "attn.k_norm.weight",
        "ffn_gate_inp": "moe.router",
        "ffn_gate_exps": "moe.gate",
        "ffn_up_exps": "moe.up",
        "ffn_down_exps": "moe.down",
    }
    for i in range(layers):
        names |= {f"blk.{i}.{k}.weight": f"blocks.{i}.{v}" for k, v in parts.items()}
    return names


def write_gguf(
    path: Path,
    config: Any,
    state: Mapping[str, Any],
    tokenizer: Tokenizer,
    special_tokens: Sequence[str],
    describe: Callable[[gguf.GGUFWriter], None],
    matrices: type[np.float16] | type[np.float32],
    chat_template: str = "",
) -> None:
    """Write `path` atomically: a reader never sees a partial file.

    `config` has the sizes (`model.Config`), `state` the tensors, `describe` adds the general.*
    fields. The first special token ends a text, the second fills up; `matrices` is the type of
    all matrices but the routers.
    """
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "olmoe")
    describe(writer)
    whole = matrices is np.float32
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if whole else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.expert_ff)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.heads)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_rope_dimension_count(config.hidden // config.heads)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_expert_count(config.experts)
    writer.add_expert_used_count(config.top_k)
    writer.add_vocab_size(config.vocab)

    inner = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(inner["vocab"], key=inner["vocab"].get)
    end, pad = (tokens.index(token) for token in special_tokens[:2])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([kinds[token in special_tokens] for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in inner["merges"]])
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    writer.add_bos_token_id(end)  # never added; named so that no reader falls back to id 11
    writer.add_pad_token_id(pad)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    if chat_template:
        writer.add_chat_template(chat_template)

    for name, source in tensor_names(config.layers).items():
        array = state[source].detach().float().numpy()
        keep = array.ndim == 1 or "ffn_gate_inp" in name
        writer.add_tensor(name, array if keep else array.astype(matrices))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)
