"""The gating function of each architecture in llama.cpp's graphs, whatever the file says.

Source: llama.cpp, src/models/*.cpp (the calls of build_moe_ffn) and src/llama-hparams.h. The test of all architectures
compares this table with the graphs.
"""

from __future__ import annotations

UNKNOWN = "architecture default"

# enum llama_expert_gating_func_type
_NAMES = ("none", "softmax", "sigmoid", "softmax_weight", "sqrt_softplus")

# The graph has a fixed function; a number in the file is ignored.
_FIXED = {
    **dict.fromkeys(
        [
            "arctic",
            "bailingmoe",
            "dbrx",
            "deepseek",
            "ernie4_5-moe",
            "gemma4",
            "granite",
            "granite_swa",
            "granitehybrid",
            "granitemoe",
            "grok",
            "grovemoe",
            "hunyuan-moe",
            "jamba",
            "llada-moe",
            "llama",
            "maple",
            "mellum",
            "minicpm",
            "minimax-01",
            "mistral3",
            "nomic-bert-moe",
            "olmoe",
            "phimoe",
            "qwen2moe",
            "qwen35moe",
            "qwen3moe",
            "qwen3next",
            "qwen3vlmoe",
            "qwen4exp",
            "rnd1",
        ],
        "softmax",
    ),
    **dict.fromkeys(["llama4", "mimo2", "nemotron_h", "nemotron_h_moe"], "sigmoid"),
    "gpt-oss": "softmax_weight",
    "refact": "none",  # its files may have experts, its graph does not use them
}
# The file names the function; this is the default.
_DEFAULT = {
    **dict.fromkeys(["afmoe", "cohere2moe", "glm-dsa", "glm4moe", "glm5-next", "hy_v3", "laguna", "step35"], "sigmoid"),
    **dict.fromkeys(["deepseek2", "deepseek2-ocr", "mistral4"], "softmax"),
}
# The file has to name the function.
_BY_NUMBER = {
    "bailingmoe2",
    "bailingmoe3",
    "deepseek32",
    "deepseek4",
    "dflash",
    "dots1",
    "dots3note",
    "exaone-moe",
    "hy_v4",
    "kimi-k3",
    "kimi-linear",
    "lfm2moe",
    "minimax-m2",
    "minimax-m3",
    "smallthinker",
}

ROUTED = frozenset({name for name, how in _FIXED.items() if how != "none"} | set(_DEFAULT) | _BY_NUMBER)
"""Architectures whose graphs route tokens to experts in this llama.cpp (docs/architectures.md)."""


def gating(architecture: str, number: int, n_layer: int, n_vocab: int) -> str:
    """Name of the function that turns logits into scores: softmax, sigmoid, softmax_weight or sqrt_softplus.

    "none" where the graph does not use the experts, UNKNOWN where only loading the model tells. `number` is the file's
    `<architecture>.expert_gating_func`, 0 without one.
    """
    if architecture in _FIXED:
        return _FIXED[architecture]
    if number:
        return _NAMES[number] if number < len(_NAMES) else f"type {number}"
    if architecture == "deepseek2" and n_layer in (47, 48) and n_vocab == 154880:
        return "sigmoid"  # GLM-4.7-Flash in files of early converters
    return _DEFAULT.get(architecture, UNKNOWN)
