"""Which of llama.cpp's architectures are compared with transformers, where the two differ, and what is left out.

Importable without torch: the documentation is made from it. Figures are of the pinned llama.cpp and transformers 5.23.
"""

from __future__ import annotations

from tests.integration.reference.architectures import CASES

# architecture of llama.cpp -> classes of transformers that it is compared with
REFERENCES: dict[str, tuple[str, ...]] = {
    arch: tuple(dict.fromkeys(case.hf for case in CASES if case.arch == arch))
    for arch in sorted({case.arch for case in CASES})
}

# case -> where llama.cpp computes something else than transformers, by design; the reference then follows llama.cpp,
# and a test shows that nothing but this differs
DIFFERS: dict[str, str] = {
    "phimoe": (
        "transformers routes Phi-3.5-MoE by a sparse mixer: it takes one expert after the other, and weighs each by a "
        "softmax over only those logits that are within 2% of the largest one left, so that the two weights do not "
        "sum to 1. llama.cpp has the plain softmax over all experts, its top 2, and "
        "weights divided by their sum. Besides, llama.cpp normalises by RMS where transformers has LayerNorm."
    ),
    "deepseek-v2": (
        "transformers scores a group of experts by its best expert in DeepSeek-V2 (group_limited_greedy), llama.cpp "
        "by the sum of its two best, the rule of DeepSeek-V3, in every model with groups. So other groups are chosen."
    ),
}

# case -> smaller differences that the tests work around by a choice in the configuration
SMALL_DIFFERENCES: dict[str, str] = {
    "gpt-oss": (
        "llama.cpp rounds the bounds of YaRN's range of dimensions; gpt-oss is published with truncate = false. "
        "Compared with truncate = true."
    ),
    "glm4-moe-lite": (
        "The norms inside latent attention have an epsilon of 1e-6 in transformers, that of the model in llama.cpp "
        "(also glm-dsa and kimi-linear). Compared with 1e-6 for all."
    ),
    "gemma4": (
        "llama.cpp looks GELU up in a table of half precision on the CPU (an error of 6e-5 of the largest logit "
        "here); the reference rounds its GELU likewise. Its logits are always capped, at 30 where the file is silent."
    ),
    "mellum": (
        "llama.cpp rotates the layers with a sliding window by the base of the others. Compared with the same base."
    ),
    "ernie4.5-moe": (
        "The converter takes intermediate_size / num_key_value_heads for the size of the shared experts, right for "
        "the published models. Compared with a configuration where it is."
    ),
    "deepseek-v3": (
        "Normalising weights, transformers adds 1e-20 (1e-6 in LFM2) to their sum, llama.cpp raises it to at least "
        "6.1e-5: the same unless every selected expert scores near 0."
    ),
}

_NO_CLASS = "transformers has no class for it"
_OTHER_NAMES = (
    "transformers saves tensors under other names or shapes than the published ones, which the converter reads"
)
_NOT_TRIED = "not tried"

# architecture of llama.cpp -> why it is not compared
LEFT_OUT: dict[str, str] = {
    "arctic": _NO_CLASS,
    "bailingmoe": _NO_CLASS,
    "bailingmoe2": _NO_CLASS,
    "bailingmoe3": "the converter reads keys that transformers leaves out of config.json; routes like deepseek2",
    "deepseek": _NO_CLASS,
    "deepseek2-ocr": _NOT_TRIED + "; routes like deepseek2",
    "deepseek4": _NOT_TRIED + "; the converter is written for its published FP8 and MXFP4 weights",
    "dflash": "a draft model for speculative decoding",
    "dots3note": _NOT_TRIED + "; a multimodal model",
    "glm5-next": _NOT_TRIED + "; a multimodal model",
    "granite": "its experts are those of granitemoe",
    "grok": _NO_CLASS,
    "grovemoe": _NO_CLASS,
    "hy_v4": _OTHER_NAMES,
    "kimi-k3": _NO_CLASS,
    "llada-moe": _NO_CLASS,
    "maple": _NO_CLASS,
    "minicpm": _NO_CLASS,
    "minimax-01": _NOT_TRIED + "; the converter reads the tokenizer, and keys that transformers renamed",
    "minimax-m3": _NOT_TRIED + "; a multimodal model, routes like minimax-m2",
    "mistral3": _NO_CLASS,
    "mistral4": "the converter knows it only as a part of a multimodal model; routes like qwen3moe",
    "nemotron_h": "its experts are those of nemotron_h_moe",
    "nomic-bert-moe": _NO_CLASS,
    "qwen3vlmoe": _OTHER_NAMES + "; routes like qwen3moe",
    "qwen4exp": _NOT_TRIED,
    "rnd1": _NO_CLASS,
    "smallthinker": _NO_CLASS,
    "step35": _NOT_TRIED + "; a multimodal model",
}
