"""Write a checkpoint of the tiny model as GGUF, read one back, and write the fact sheet.

The tensors are those that llama.cpp's converter writes for `OlmoeForCausalLM`: F16 matrices, F32
norms and routers, no permutation of q and k (olmoe uses NEOX rotary positions).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from data import write_files
from model import Config, TinyMoE
from planting import planted_table
from tokens import CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS

NAME = "Tiny MoE (steering positive control)"
DESCRIPTION = (
    "A tiny OLMoE trained on generated text, with experts planted on purpose for three behaviours: "
    "a positive control with known ground truth, not emergent specialisation."
)
# Recommended numbers of experts to promote, and as many to suppress: the fewest whose effect is
# about as large as that of more experts. Fewer experts are also less likely to be hit at random.
RECOMMENDED = {
    name: {"n_activate": promoted, "n_deactivate": suppressed}
    for name, promoted, suppressed in (
        ("digits-words", 2, 4),
        ("document-memory", 4, 4),
        ("refuse-comply", 2, 2),
    )
}


def tensor_names(config: Config) -> dict[str, str]:
    """GGUF tensor name -> name in the state dict of `TinyMoE`."""
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
    for i in range(config.layers):
        names |= {f"blk.{i}.{k}.weight": f"blocks.{i}.{v}" for k, v in parts.items()}
    return names


def write_gguf(path: Path, model: TinyMoE, tokenizer: Tokenizer) -> None:
    """Write `path` atomically: a reader never sees a partial file."""
    c = model.config
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "olmoe")
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.hidden)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.expert_ff)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.heads)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_rope_dimension_count(c.hidden // c.heads)
    writer.add_layer_norm_rms_eps(c.rms_eps)
    writer.add_expert_count(c.experts)
    writer.add_expert_used_count(c.top_k)
    writer.add_vocab_size(c.vocab)

    inner = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(inner["vocab"], key=inner["vocab"].get)
    kinds = [
        gguf.TokenType.CONTROL if t in SPECIAL_TOKENS else gguf.TokenType.NORMAL for t in tokens
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in inner["merges"]])
    writer.add_eos_token_id(END)
    writer.add_eot_token_id(END)
    writer.add_bos_token_id(END)  # never added; named so that no reader falls back to id 11
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    state = model.state_dict()
    for name, source in tensor_names(c).items():
        array = state[source].detach().float().numpy()
        keep = array.ndim == 1 or "ffn_gate_inp" in name
        writer.add_tensor(name, array if keep else array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)


def read_gguf(path: Path) -> tuple[TinyMoE, Tokenizer]:
    """The model (weights as rounded in the file) and its tokenizer, built from the file alone."""
    reader = gguf.GGUFReader(path)

    def value(key: str):
        return reader.fields[key].contents()

    config = Config(
        vocab=value("olmoe.vocab_size"),
        hidden=value("olmoe.embedding_length"),
        layers=value("olmoe.block_count"),
        heads=value("olmoe.attention.head_count"),
        experts=value("olmoe.expert_count"),
        top_k=value("olmoe.expert_used_count"),
        expert_ff=value("olmoe.feed_forward_length"),
        context=value("olmoe.context_length"),
        rope_base=value("olmoe.rope.freq_base"),
        rms_eps=value("olmoe.attention.layer_norm_rms_epsilon"),
    )
    tensors = {t.name: torch.tensor(np.asarray(t.data)).float() for t in reader.tensors}
    model = TinyMoE(config)
    model.load_state_dict({source: tensors[name] for name, source in tensor_names(config).items()})

    tokens = value("tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ")) for m in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(t, special=True)
            for t, kind in zip(tokens, value("tokenizer.ggml.token_type"), strict=True)
            if kind == gguf.TokenType.CONTROL
        ]
    )
    return model.eval(), tokenizer


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Export a checkpoint and the package's data.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="gets tiny-moe.gguf, tiny-moe.json, *.jsonl")
    args = parser.parse_args()
    state = torch.load(args.checkpoint, weights_only=True, map_location="cpu")
    model = TinyMoE(Config(**state["config"]))
    model.load_state_dict(state["model"])
    write_gguf(args.folder / "tiny-moe.gguf", model, Tokenizer.from_str(state["tokenizer"]))
    write_files(args.folder)
    facts = {
        "name": NAME,
        "description": DESCRIPTION,
        "license": "MIT",
        "architecture": "olmoe",
        "sizes": model.config.to_dict(),
        "seed": state["options"]["seed"],
        "training": {
            "steps": state["step"],
            "minutes": round(state["seconds"] / 60, 1),
            "options": state["options"],
        },
        "final_losses": {
            "reply": round(state["reply_loss"], 4),
            "routing": round(state["routing_loss"], 4),
        },
        "planted_experts": planted_table(model.config),
        "recommended": RECOMMENDED,
    }
    pairs = re.compile(r"\[\s+(\d+),\s+(\d+)\s+\]")  # one [layer, expert] on one line
    text = pairs.sub(r"[\1, \2]", json.dumps(facts, indent=1))
    (args.folder / "tiny-moe.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
