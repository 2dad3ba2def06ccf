"""Random MoE models with a small SentencePiece vocabulary (tokenizer.ggml.model = llama)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType

N_EMBD, N_LAYER, N_EXPERT, N_FF = 32, 2, 4, 16
BLANK = "\u2581"
WORDS = ("Count", "to", "three", "two", "one", "eight", "Answer", "digits", "say", "INST", "user", "assistant")


def write_sentencepiece_model(
    path: Path,
    template: str,
    *,
    special: Sequence[str] = (),
    name: str = "spm",
    add_space_prefix: bool | None = None,
    defined: Sequence[str] = (),
) -> Path:
    """Write a model whose vocabulary has letters, digits, a few words with and without a blank, and all bytes.

    `special` are further control tokens, `defined` user-defined ones. llama.cpp lets the special tokens of a model
    with "phi-3" in its `name` swallow the white space behind them.
    """
    tokens: list[tuple[str, float, TokenType]] = [
        ("<unk>", 0, TokenType.UNKNOWN),
        ("<s>", 0, TokenType.CONTROL),
        ("</s>", 0, TokenType.CONTROL),
    ]
    tokens += [(f"<0x{byte:02X}>", 0, TokenType.BYTE) for byte in range(256)]
    letters = [BLANK, *(chr(code) for code in range(33, 127))]
    tokens += [(letter, -1000.0, TokenType.NORMAL) for letter in letters]
    pieces: dict[str, None] = {}
    for word in WORDS:  # a merge is found when both halves are tokens
        for whole in (word, BLANK + word):
            pieces.update(dict.fromkeys(whole[:end] for end in range(2, len(whole) + 1)))
    tokens += [(piece, -float(rank), TokenType.NORMAL) for rank, piece in enumerate(pieces)]
    tokens += [(mark, 0, TokenType.CONTROL) for mark in special]
    tokens += [(mark, 0, TokenType.USER_DEFINED) for mark in defined]
    writer = GGUFWriter(path, "olmoe")
    writer.add_name(name)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token for token, _, _ in tokens])
    writer.add_token_scores([float(score) for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if add_space_prefix is not None:
        writer.add_add_space_prefix(add_space_prefix)
    if template:
        writer.add_chat_template(template)
    writer.add_context_length(512)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(2)
    writer.add_vocab_size(len(tokens))
    for tensor, values in _weights(len(tokens)).items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _weights(n_vocab: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)

    def random(*shape: int) -> Any:
        return rng.normal(scale=0.2, size=shape).astype(np.float32)

    def norm() -> Any:
        return 1 + random(N_EMBD)

    tensors = {"token_embd.weight": random(n_vocab, N_EMBD), "output.weight": random(n_vocab, N_EMBD)}
    tensors["output_norm.weight"] = norm()
    for layer in range(N_LAYER):
        block = {f"{part}_norm.weight": norm() for part in ("attn", "ffn", "attn_q", "attn_k")}
        block |= {f"attn_{part}.weight": random(N_EMBD, N_EMBD) for part in ("q", "k", "v", "output")}
        block["ffn_gate_inp.weight"] = random(N_EXPERT, N_EMBD)
        block["ffn_gate_exps.weight"] = random(N_EXPERT, N_FF, N_EMBD)
        block["ffn_up_exps.weight"] = random(N_EXPERT, N_FF, N_EMBD)
        block["ffn_down_exps.weight"] = random(N_EXPERT, N_EMBD, N_FF)
        tensors |= {f"blk.{layer}.{key}": values for key, values in block.items()}
    return tensors
