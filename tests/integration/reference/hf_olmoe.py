"""The reference: transformers' `OlmoeForCausalLM` with the weights of a GGUF file and a hooked router.

Nothing of steermoe_local is used here: the weights, the tokenizer, the chat template and the place of a target are
read anew, and the steering rules are written from their definition.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from gguf import GGUFReader, TokenType, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import OlmoeForCausalLM
from transformers.utils import logging

torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other
logging.disable_progress_bar()

# GGUF name in a block -> name in a published checkpoint. No tensor is permuted: olmoe has the rotary layout of HF.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
EXPERT_NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Steering:
    """Values of a bias [layers, experts]: signs under the hard rule, logits under the soft one."""

    mode: str
    values: np.ndarray
    epsilon: float = 0.01


@dataclass(frozen=True)
class Run:
    """What the model computed for one prompt of T tokens."""

    logits: np.ndarray  # [T, vocab]
    selected: np.ndarray  # [layers, T, k], ascending
    margin: np.ndarray  # [layers, T]: how far the last selected router logit is above the first one left out


def hard_rule(z: Tensor, signs: Tensor, epsilon: float) -> Tensor:
    """z' = max z + eps for +1, min z - eps for -1, both extremes of the unedited z [tokens, experts]."""
    high = z.max(dim=-1, keepdim=True).values + epsilon
    low = z.min(dim=-1, keepdim=True).values - epsilon
    return torch.where(signs > 0, high, torch.where(signs < 0, low, z))


def soft_rule(z: Tensor, bias: Tensor) -> Tensor:
    """z' = z + b."""
    return z + bias


class HfOlmoe:
    """A GGUF model of architecture olmoe, run by transformers in float32."""

    def __init__(self, gguf: Path, folder: Path) -> None:
        """Read `gguf`; its weights go to `folder` in the form of a published checkpoint, and are loaded from there."""
        self.sha256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
        reader = GGUFReader(gguf)
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        config = self._config()
        self.n_layer, self.n_expert = config["num_hidden_layers"], config["num_experts"]
        self.k = config["num_experts_per_tok"]
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(_checkpoint(reader), folder / "model.safetensors", metadata={"format": "pt"})
        self.model, info = OlmoeForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info  # no weight missing, left over or of another shape
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")
        self.model.eval()
        self.tokenizer = self._tokenizer()
        self._template = jinja2.Environment().from_string(self.fields["tokenizer.chat_template"])

    def _config(self) -> dict[str, Any]:
        def value(key: str) -> Any:
            return self.fields[f"olmoe.{key}"]

        assert self.fields["general.architecture"] == "olmoe"
        assert "olmoe.attention.clamp_kqv" not in self.fields
        return {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "vocab_size": len(self.fields["tokenizer.ggml.tokens"]),
            "hidden_size": value("embedding_length"),
            "intermediate_size": value("feed_forward_length"),
            "num_hidden_layers": value("block_count"),
            "num_attention_heads": value("attention.head_count"),
            "num_key_value_heads": value("attention.head_count_kv"),
            "max_position_embeddings": value("context_length"),
            "rope_theta": value("rope.freq_base"),
            "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
            "num_experts": value("expert_count"),
            "num_experts_per_tok": value("expert_used_count"),
            "norm_topk_prob": False,
            "hidden_act": "silu",
            "clip_qkv": None,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def _tokenizer(self) -> Tokenizer:
        tokens = self.fields["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in self.fields["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self.fields["tokenizer.ggml.token_type"]
        control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
        return tokenizer

    def render(self, messages: list[dict[str, str]], *, generate: bool = False) -> str:
        """Messages through the model's chat template."""
        return self._template.render(messages=messages, add_generation_prompt=generate)

    def tokenize(self, text: str) -> list[int]:
        """Token ids; names of control tokens become those tokens."""
        return self.tokenizer.encode(text).ids

    def target(self, text: str, target: str) -> tuple[list[int], list[int]]:
        """Tokens of `text` and the places of `target` in them: its last exact run, else its last letters."""
        encoding = self.tokenizer.encode(text)
        wanted = self.tokenize(target)
        for start in range(len(encoding.ids) - len(wanted), -1, -1):
            if encoding.ids[start : start + len(wanted)] == wanted:
                return encoding.ids, list(range(start, start + len(wanted)))
        low = text.rindex(target)
        high = low + len(target)
        return encoding.ids, [i for i, (a, b) in enumerate(encoding.offsets) if a < high and b > low]

    @torch.no_grad()
    def run(self, tokens: list[int], steering: Steering | None = None) -> Run:
        """Run one prompt from an empty cache."""
        routers: list[Tensor] = []
        with self._hooked(steering, routers):
            logits = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        z = torch.stack(routers)
        top = z.topk(self.k + 1, dim=-1)
        return Run(
            logits=logits.float().numpy(),
            selected=top.indices[..., : self.k].sort(dim=-1).values.numpy(),
            margin=(top.values[..., self.k - 1] - top.values[..., self.k]).numpy(),
        )

    @contextmanager
    def _hooked(self, steering: Steering | None, routers: list[Tensor]) -> Iterator[None]:
        """Edit the routers' logits; `routers` gets what the selection saw [tokens, experts], layer by layer."""
        hooks = [
            layer.mlp.gate.register_forward_hook(partial(self._hook, steering, routers, i))
            for i, layer in enumerate(self.model.model.layers)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(
        self, steering: Steering | None, routers: list[Tensor], layer: int, module: Any, inputs: Any, output: Any
    ) -> Any:
        # transformers 4: the gate's output is the logits; 5: (logits, weights of the selected, selected)
        whole = isinstance(output, tuple)
        z = output[0] if whole else output
        if steering is None:
            routers.append(z)
            return None
        values = torch.from_numpy(steering.values[layer])
        z = hard_rule(z, values, steering.epsilon) if steering.mode == "hard" else soft_rule(z, values)
        routers.append(z)
        if not whole:
            return z
        weights, selected = z.softmax(dim=-1).topk(self.k, dim=-1)
        return z, weights, selected


def _checkpoint(reader: GGUFReader) -> dict[str, Tensor]:
    """The tensors of a GGUF file as float32, under the names of a published checkpoint."""
    weights: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        data = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        name = tensor.name.removesuffix(".weight")
        if name in OTHER_NAMES:
            weights[f"{OTHER_NAMES[name]}.weight"] = data
            continue
        _, layer, part = name.split(".")
        if part in EXPERT_NAMES:
            for expert, matrix in enumerate(data):
                # safetensors wants each tensor in memory of its own
                weights[f"model.layers.{layer}.mlp.experts.{expert}.{EXPERT_NAMES[part]}.weight"] = matrix.clone()
        else:
            weights[f"model.layers.{layer}.{BLOCK_NAMES[part]}.weight"] = data
    return weights
