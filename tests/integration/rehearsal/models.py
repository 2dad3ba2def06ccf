"""Whole models with random weights: architecture, experts, vocabulary and template of well-known ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.rehearsal.archive import templates
from tests.integration.rehearsal.commands import PAIRS, refused, write_pairs
from tests.integration.rehearsal.families import fitted
from tests.integration.rehearsal.gguf_files import Vocabulary, write_model
from tests.support.architectures import write_upstream
from tests.support.paths import BUILD

PROGRAM = BUILD / "bin" / "test-llama-archs"

# Of models of which the archive has no template, as their repositories have them.
MIXTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
OLMOE = (
    "{{ bos_token }}{% for message in messages %}\n{% if message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] }}\n{% elif message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
_OWN = {"Mixtral": MIXTRAL, "OLMoE": OLMOE}


@dataclass(frozen=True)
class Model:
    """One model: `arch` of test-llama-archs, vocabulary, template, experts and how many of them a token uses."""

    arch: str
    vocab: str
    template: str
    n_expert: int
    k: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def template_text(self) -> str:
        """The chat template."""
        return _OWN.get(self.template) or templates()[self.template]

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary, with the template's markers as tokens. In Mixtral's [INST] is text."""
        return fitted(self.vocab, "" if self.template == "Mixtral" else self.template_text)

    def write(self, folder: Path) -> Path:
        """Write the file."""
        (source,) = write_upstream(PROGRAM, folder, self.arch)
        path = folder / "model.gguf"
        numbers = {"n_expert": self.n_expert, "k": self.k}
        write_model(path, source, self.vocabulary, self.template_text, **numbers, fields=self.fields)
        source.unlink()
        return path


_GROUPS = {"expert_group_count": 8, "expert_group_used_count": 4}
MODELS = {
    "Mixtral-8x7B": Model("llama", "llama-spm", "Mixtral", 8, 2),
    "Phi-3.5-MoE": Model("phimoe", "phi-3", "microsoft-Phi-3.5-mini-instruct", 16, 2),
    "Qwen3-30B-A3B": Model("qwen3moe", "qwen2", "Qwen-Qwen3-0.6B", 128, 8),
    "Qwen3.5-A3B": Model("qwen35moe", "qwen35", "Qwen3.5-4B", 256, 8),
    "OLMoE-1B-7B": Model("olmoe", "gpt-neox", "OLMoE", 64, 8),
    "gpt-oss-20b": Model("gpt-oss", "falcon", "openai-gpt-oss-120b", 32, 4),
    "DeepSeek-V3.1": Model("deepseek2", "deepseek-llm", "deepseek-ai-DeepSeek-V3.1", 256, 8, _GROUPS),
    "Kimi-K2": Model("deepseek2", "deepseek-coder", "Kimi-K2-Instruct", 384, 8),
    "GLM-4.6": Model("glm4moe", "gpt-2", "GLM-4.6", 160, 8),
    "Granite-4": Model("granitemoe", "starcoder", "ibm-granite-granite-4.0", 40, 8),
    "Llama-4-Scout": Model("llama4", "llama-bpe", "meta-llama-Llama-3.3-70B-Instruct", 16, 1),
    "MiniMax-M2": Model("minimax-m2", "refact", "MiniMax-M2", 256, 8),
    "LFM2-8B-A1B": Model("lfm2moe", "mpt", "LFM2-8B-A1B", 32, 4),
    "Ling-3": Model("bailingmoe2", "baichuan", "inclusionai-ling-3.0-flash", 256, 8, _GROUPS),
    "Hy3": Model("hy_v3", "aquila", "tencent-Hy3", 192, 8),
}


def check_refused(vocab: str, folder: Path) -> None:
    """A tokenizer that changes the text: each pair is refused with its name, and nothing is written."""
    (source,) = write_upstream(PROGRAM, folder, "olmoe")
    model = write_model(folder / "model.gguf", source, fitted(vocab, ""), OLMOE, n_expert=8, k=2)
    pairs, output = write_pairs(folder / "pairs.jsonl"), folder / "map.json"
    found = json.loads(refused("pairs", "check", pairs, "-m", model, "--json").stdout)
    assert (found["pairs"], found["located"]) == (len(PAIRS), 0)
    assert all("WordPiece" in problem["reason"] for problem in found["problems"])
    assert "WordPiece" in refused("detect", "-m", model, "--pairs", pairs, "-o", output).stderr
    assert not output.exists()
