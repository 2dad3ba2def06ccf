"""What llama.cpp cannot load, told from the headers before it is tried.

llama.cpp answers a wrong number in a header with an assertion, which ends the process, where this names the number. The
rules are those of llama_model_base::load_hparams (src/llama-model.cpp) and of src/llama-hparams.h; what it refuses with
a reason of its own is left to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES

from ..errors import FormatError, ModelError
from .header import GGUFHeader, n_vocab

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")

# their graphs assert that all of a head is rotated, and that keys and values are of the same length
FULL_ROTATION = frozenset(
    [
        *("arctic", "cohere2moe", "dbrx", "deepseek", "dots1", "ernie4_5-moe", "exaone-moe", "granite", "granite_swa"),
        *("grok", "grovemoe", "hunyuan-moe", "hy_v3", "llada-moe", "llama", "llama4", "mellum", "mistral3", "olmoe"),
        *("qwen2moe", "qwen3moe", "qwen3vlmoe", "rnd1", "smallthinker"),
    ]
)

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\..*", re.DOTALL)
_ROUTER = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.ffn_gate_inp\.weight")
_WEIGHT = re.compile(r"(token_embd|output|output_norm|blk\.[0-9]{1,5}\.(attn|ffn)_[a-z0-9_]+)\.(weight|bias)")
_TABLES = ("tid2eid",)  # of whole numbers: the experts of each token
_NO_WEIGHTS = {"I8", "I16", "I32", "I64", "F64"}  # types that no kernel of llama.cpp multiplies by
_NORM = re.compile(r"(output|blk\.[0-9]{1,5}\.[a-z0-9_]+)_norm\.weight")
_EPSILONS = ("layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon")
_EXPERTS_PER_LAYER = {"nemotron_h", "nemotron_h_moe"}  # may use other numbers of experts in each
_WITHOUT_NUMBERS = {"clip"}
_ONE_EXPERT_IS_NONE = {"hunyuan-dense", "hunyuan_vl"}


def block_numbers(parts: Sequence[GGUFHeader]) -> set[int]:
    """The layers that have tensors, those of multi-token prediction included."""
    return {int(match[1]) for part in parts for name in part.tensors if (match := _BLOCK.fullmatch(name))}


def why_not_loadable(parts: Sequence[GGUFHeader]) -> str:
    """Why no llama.cpp can load a model with these headers of all its parts, "" if nothing speaks against it.

    The answer is a phrase with the field and its value, for messages that begin with the file.
    """
    head = parts[0]
    arch = head.value("general.architecture")
    if not isinstance(arch, str) or arch in _WITHOUT_NUMBERS:
        return ""
    return (
        _layers(head, arch, parts)
        or _experts(head, arch, parts)
        or _rope(head, arch)
        or _epsilons(head, arch)
        or _unknown_token(parts)
        or _types(parts)
    )


def require_loadable(path: Path, parts: Sequence[GGUFHeader]) -> None:
    """Raise ModelError for what `why_not_loadable` names."""
    try:
        problem = why_not_loadable(parts)
    except FormatError as error:
        raise ModelError(str(error)) from error
    if problem:
        raise ModelError(f"{path}: {problem}, so llama.cpp cannot load it; convert the model again")


def _layers(head: GGUFHeader, arch: str, parts: Sequence[GGUFHeader]) -> str:
    key = f"{arch}.block_count"
    if key not in head.fields:
        return ""
    n_all, n_next = head.number(key), head.number(f"{arch}.nextn_predict_layers")
    if not 1 <= n_all <= MAX_LAYERS:
        return f"{key} is {n_all}, not 1 to {MAX_LAYERS}"
    if n_next >= n_all:
        return f"{arch}.nextn_predict_layers is {n_next} of {n_all} layers"
    layers = block_numbers(parts)
    if not layers:  # a vocabulary alone
        return ""
    heads = head.value(f"{arch}.attention.head_count")
    # layers of Deci models may have neither attention nor anything else
    n_empty = len(list(takewhile(lambda n: n == 0, reversed(heads)))) if isinstance(heads, tuple) else 0
    if not n_all - n_next - n_empty <= max(layers) + 1 <= n_all:
        return f"{key} says {n_all} layers, but its tensors are of layers up to {max(layers)}"
    return ""


def _experts(head: GGUFHeader, arch: str, parts: Sequence[GGUFHeader]) -> str:
    n_expert = head.number(f"{arch}.expert_count")
    used = head.value(f"{arch}.expert_used_count", 0)
    numbers = used if isinstance(used, tuple) else (used,)
    most = max((number for number in numbers if type(number) is int), default=0)
    n_groups = head.number(f"{arch}.expert_group_count")
    n_used_groups = head.number(f"{arch}.expert_group_used_count")
    if arch in _ONE_EXPERT_IS_NONE and n_expert <= 1:
        n_expert = most = 0
    if n_expert > MAX_EXPERTS:
        return f"{arch}.expert_count is {n_expert}, above {MAX_EXPERTS}"
    if most > n_expert or (n_expert and most < 1):
        return f"{arch}.expert_used_count is {most} of {n_expert} experts"
    if isinstance(used, tuple):
        routed = (int(match[1]) for part in parts for name in part.tensors if (match := _ROUTER.fullmatch(name)))
        n_layer = head.number(f"{arch}.block_count") - head.number(f"{arch}.nextn_predict_layers")
        own = {used[layer] for layer in routed if layer < min(len(used), n_layer)}
        if 0 in own or (len(own) > 1 and arch not in _EXPERTS_PER_LAYER):
            return f"{arch}.expert_used_count is {sorted(own)} in its layers with experts"
    if n_groups and n_groups >= n_expert:
        return f"{arch}.expert_group_count is {n_groups} for {n_expert} experts"
    if n_groups > 1 and (n_expert % n_groups or not 0 < n_used_groups < n_groups):
        return f"{n_expert} experts are in {n_groups} groups, of which {n_used_groups} are used ({arch}.expert_group_*)"
    return ""


def _rope(head: GGUFHeader, arch: str) -> str:
    key = f"{arch}.rope.scaling.type"
    found = head.value(key, "linear")
    if isinstance(found, str) and found not in ROPE_SCALINGS:
        return f"{key} is {found[:40]!r}, not one of {', '.join(ROPE_SCALINGS)}"
    heads = head.value(f"{arch}.attention.head_count", 0)
    n_head = heads[0] if isinstance(heads, tuple) and heads else heads
    if arch not in FULL_ROTATION or type(n_head) is not int or n_head < 1:
        return ""
    width = head.number(f"{arch}.embedding_length") // n_head
    keys, values = (head.number(f"{arch}.attention.{name}_length", width) for name in ("key", "value"))
    rotated = head.number(f"{arch}.rope.dimension_count", keys)
    if rotated != keys:
        return f"{arch}.rope.dimension_count is {rotated}, but a head has {keys} dimensions"
    return f"its heads have keys of {keys} and values of {values} dimensions" if keys != values else ""


def _epsilons(head: GGUFHeader, arch: str) -> str:
    for name in _EPSILONS:
        value = head.value(f"{arch}.attention.{name}", 0.0)
        if isinstance(value, float) and not 0 <= value < math.inf:
            return f"{arch}.attention.{name} is {value}"
    return ""


def _unknown_token(parts: Sequence[GGUFHeader]) -> str:
    key = "tokenizer.ggml.unknown_token_id"
    found, n_tokens = parts[0].value(key, 0), n_vocab(parts)
    return f"{key} is {found} of {n_tokens} tokens" if type(found) is int and found >= n_tokens > 0 else ""


def _types(parts: Sequence[GGUFHeader]) -> str:
    for part in parts:
        for name, tensor in part.tensors.items():
            wrong = tensor.type.name in _NO_WEIGHTS and _WEIGHT.fullmatch(name) and not any(t in name for t in _TABLES)
            if wrong or (GGML_QUANT_SIZES[tensor.type][0] > 1 and _NORM.fullmatch(name)):
                return f"{name} is of type {tensor.type.name}"
    return ""
