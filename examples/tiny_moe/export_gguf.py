"""Write a checkpoint of the tiny model as GGUF, read one back, and write the fact sheet."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import olmoe_gguf
from data import write_files
from model import Config, TinyMoE
from planting import planted_table
from tokens import CHAT_TEMPLATE, SPECIAL_TOKENS

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


def write_gguf(path: Path, model: TinyMoE, tokenizer: Tokenizer) -> None:
    """Write the model with matrices in F16."""

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_name(NAME)
        writer.add_description(DESCRIPTION)
        writer.add_license("mit")

    olmoe_gguf.write_gguf(
        path,
        model.config,
        model.state_dict(),
        tokenizer,
        SPECIAL_TOKENS,
        describe,
        np.float16,
        CHAT_TEMPLATE,
    )


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
    model.load_state_dict(
        {source: tensors[name] for name, source in olmoe_gguf.tensor_names(config.layers).items()}
    )

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
