"""Which vocabulary each chat template is tried with, and the markers that are tokens of it."""

from __future__ import annotations

import re

from tests.integration.rehearsal.gguf_files import Vocabulary, vocabulary

# The vocabulary of the model where the archive has it or a relative: by the beginning of the template's name.
FAMILIES = {
    "Apertus": "aquila",
    "Bielik": "llama-spm",
    "ByteDance": "gpt-2",
    "Cohere": "command-r",
    "GLM": "gpt-2",
    "GigaChat": "mpt",
    "HuggingFaceTB": "llama-bpe",
    "Kimi": "deepseek-coder",
    "LFM2": "refact",
    "MiMo": "qwen2",
    "MiniMax": "falcon",
    "Ministral": "mpt",
    "Mistral": "mpt",
    "NVIDIA": "gpt-2",
    "NousResearch": "llama-bpe",
    "Qwen3.5": "qwen35",
    "Qwen": "qwen2",
    "Reka": "gpt-neox",
    "Spark": "deepseek-llm",
    "StepFun": "qwen35",
    "deepseek-ai-DeepSeek-R1-Distill-Llama": "llama-bpe",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen": "qwen2",
    "deepseek-ai": "deepseek-llm",
    "fireworks": "llama-bpe",
    "google-gemma-4": "gemma-4",
    "google-gemma-2": "llama-spm",
    "ibm-granite": "starcoder",
    "inclusionai": "gpt-neox",
    "llama-cpp-deepseek": "deepseek-llm",
    "llama-cpp-rwkv": "gpt-neox",
    "meetkai": "llama-bpe",
    "meta-llama": "llama-bpe",
    "microsoft-Phi": "phi-3",
    "mistralai": "mpt",
    "moonshotai": "deepseek-coder",
    "muse": "refact",
    "openai": "falcon",
    "openbmb": "llama-spm",
    "poolside": "deepseek-coder",
    "tencent": "refact",
    "unsloth-mistral": "mpt",
    "unsloth-Apriel": "mpt",
    "upstage": "baichuan",
}
ELSE = "gpt-2"  # of a template that a later archive brings

SENTENCEPIECE = "llama-spm"  # every template is tried with it besides

# WordPiece changes the text: case, accents, blanks. No causal model has it.
REFUSED = ("bert-bge",)
UNIGRAM = "nomic-bert-moe"  # no chat model's: with a simple template only

# Markers as the real models have them. A word of the text may look like one ("<|CHATBOT|>"): that makes no difference.
_CONTROL = re.compile(
    r"<\|[^|<>\s'\"{}%]{1,40}\|>|<\uff5c[^\uff5c<>'\"{}%]{1,40}\uff5c>|<\|[a-z_]{2,20}>|<[a-z_]{2,20}\|>|\[/?[A-Z][A-Z_]{2,}\]"
    r"|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|sop)>|\[gMASK\]|</?seed:[a-z_]+>|<SPECIAL_\d+>"
    r"|\]~!?b[\]\[]|\[e~\[|\]<\][a-z]+\[>\["
)
_DEFINED = re.compile(r"</?(?:think|tool_call|tool_response|tool_calls|arg_key|arg_value|mm:think)>")


def family(name: str) -> str:
    """Vocabulary of a template."""
    beginnings = [beginning for beginning in FAMILIES if name.startswith(beginning)]
    return FAMILIES[max(beginnings, key=len)] if beginnings else ELSE


def fitted(vocab: str, template: str) -> Vocabulary:
    """A vocabulary with the markers of a template as tokens."""
    return vocabulary(vocab).with_markers(
        dict.fromkeys(_CONTROL.findall(template)), dict.fromkeys(_DEFINED.findall(template))
    )
