"""One small random model for every Mixture-of-Experts architecture of llama.cpp.

llama.cpp's own `test-llama-archs -o DIR` writes them, with two experts of which both are used: nothing can be chosen
there. `widen` gives them eight experts of which three are used, and other ways to route where the architecture reads
them from its file.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

# every architecture that test-llama-archs of the pinned tree writes as a Mixture-of-Experts model
ARCHITECTURES = [
    "afmoe",
    "arctic",
    "bailingmoe",
    "bailingmoe2",
    "bailingmoe3",
    "cohere2moe",
    "dbrx",
    "deepseek",
    "deepseek2",
    "deepseek32",
    "deepseek4",
    "dots1",
    "dots3note",
    "ernie4_5",
    "ernie4_5-moe",
    "exaone-moe",
    "glm-dsa",
    "glm4moe",
    "glm5-next",
    "gpt-oss",
    "granite",
    "granitemoe",
    "grok",
    "grovemoe",
    "hunyuan-moe",
    "hy_v3",
    "hy_v4",
    "kimi-k3",
    "kimi-linear",
    "laguna",
    "lfm2moe",
    "llada-moe",
    "llama",
    "llama4",
    "maple",
    "mellum",
    "mimo2",
    "minicpm",
    "minimax-01",
    "minimax-m2",
    "minimax-m3",
    "mistral3",
    "mistral4",
    "olmoe",
    "paddleocr",
    "phimoe",
    "qwen2moe",
    "qwen35moe",
    "qwen3moe",
    "qwen3next",
    "qwen3vlmoe",
    "qwen4exp",
    "refact",
    "rnd1",
    "smallthinker",
]
# their files say that there are experts, but hold no layer with experts, or the graph does not use it
WITHOUT_ROUTERS = ("ernie4_5", "paddleocr", "refact")
# build_moe_ffn serves these too, but test-llama-archs does not write them
NOT_WRITTEN = [
    "deepseek2-ocr",
    "dflash",
    "gemma4",
    "granite_swa",
    "granitehybrid",
    "jamba",
    "nemotron_h",
    "nemotron_h_moe",
    "nomic-bert-moe",
    "step35",
]
# architectures whose files may name groups of experts; the key is read for all, so these stand for the ways of gating
GROUPED = ("bailingmoe2", "deepseek2", "deepseek32", "dots1", "glm4moe", "olmoe")

# routers of large logits, whose sigmoid or softplus rounds many of them to one value
SATURATED = ("afmoe", "deepseek4", "dots1", "grovemoe", "llama4", "smallthinker")

N_EXPERT, K, N_GROUPS, N_GROUPS_USED = 8, 3, 4, 2
GROVE = 2  # experts that share one adjugate expert in grovemoe
EXPERT_TENSOR = re.compile(r"blk\.\d+\.(ffn_(gate|up|down|gate_up)_(ch)?exps\.|ffn_gate_inp\.|exp_probs_b)")


def write_upstream(program: Path, folder: Path, arch: str = "") -> list[Path]:
    """Let test-llama-archs write its models; the Mixture-of-Experts ones. `arch`: one architecture, else all."""
    command = [str(program), "-s", "1", "-o", str(folder)]
    done = subprocess.run(
        [*command, *(["-a", f"^{arch}$"] if arch else [])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for dense in folder.glob("*-dense.gguf"):
        dense.unlink()
    return sorted(folder.glob("*-moe.gguf"))


def variants(arch: str) -> tuple[str, ...]:
    """The ways to widen an architecture that are checked."""
    others = {"groups": GROUPED, "saturated": SATURATED, "hash": ("deepseek4",)}
    return ("", *(name for name, archs in others.items() if arch in archs))


def widen(source: Path, path: Path, variant: str = "") -> Path:
    """Write `source` with N_EXPERT experts, top-K.

    `variant`: "groups", "saturated" (large logits) or "hash" (a table by token routes the first layer).
    """
    reader = GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    rng = np.random.default_rng(5)
    changed: dict[str, Any] = {"expert_count": N_EXPERT, "expert_used_count": K}
    if variant == "groups":
        changed |= {"expert_group_count": N_GROUPS, "expert_group_used_count": N_GROUPS_USED}
    if variant == "hash":
        changed |= {"hash_layer_count": 1}
    if arch == "grovemoe":
        changed |= {"experts_per_group": GROVE}
    writer = GGUFWriter(path, arch)
    for key, entry in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = changed.get(key.removeprefix(f"{arch}."), entry.contents())
        if value != []:
            writer.add_key_value(key, value, entry.types[0], entry.types[-1] if len(entry.types) > 1 else None)
    for tensor in reader.tensors:
        values = np.array(tensor.data)
        if EXPERT_TENSOR.match(tensor.name) and values.shape[0] == 2:
            n = N_EXPERT // GROVE if "_chexps" in tensor.name else N_EXPERT
            # routers wide enough that the choice depends on the token
            router = "ffn_gate_inp.weight" in tensor.name
            scale = 0.1 if not router else 100.0 if variant == "saturated" else 1.0
            values = rng.normal(scale=scale, size=(n, *values.shape[1:])).astype(values.dtype)
        if variant == "hash" and tensor.name.startswith("blk.0.exp_probs_b"):
            continue
        writer.add_tensor(tensor.name, values)
    if variant == "hash":
        n_vocab = next(t for t in reader.tensors if t.name == "token_embd.weight").shape[1]
        table = np.argsort(rng.random((int(n_vocab), N_EXPERT)), axis=1)[:, :K].astype(np.int32)
        writer.add_tensor("blk.0.ffn_gate_tid2eid.weight", table, raw_dtype=GGMLQuantizationType.I32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
