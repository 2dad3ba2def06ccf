"""Greedy answers of the embedded model with the logits that they were drawn from, to compare processors.

    python -m tests.integration.arm64.answers FOLDER

writes them as this processor computes them, with the model files: a quantizer's own sums may round otherwise
elsewhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import LlamaFileType

from steermoe_local.llama import capi
from steermoe_local.llama.quantizer import quantize_file
from steermoe_local.llama.rendering import Renderer
from steermoe_local.pairs.pairs import Message
from tests.integration.reference.native import data_file, write_f32
from tests.support import generation
from tests.support.low_level import F32, Context, identity_of, native_bias, open_model, random_signs

QUESTIONS = (*generation.QUESTIONS, "What is three plus four?", "Count from one to nine.")
STEERED = ("", "hard", "soft")
MAX_TOKENS = 24

# The embedded model with all weights as F32, so that nothing rounds in a coarser format; as it ships; and quantized,
# which other processors multiply by other instructions, most of them in another layout (ggml's repacking).
WEIGHTS = ("F32", "F16", "Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL")
ALL_CASES = ("F32", "F16")  # of the others only two questions, without steering


def numbers(weights: str, rule: str) -> range:
    """The questions that are answered with these weights and this steering."""
    return range(len(QUESTIONS) if weights in ALL_CASES else 0 if rule else 2)


def case(weights: str, rule: str, number: int) -> str:
    """The name of an answer."""
    return f"{weights}-{rule or 'unsteered'}-{number}"


def model_file(weights: str, folder: Path) -> Path:
    """The embedded model as it is, or a copy in the folder."""
    return data_file("tiny-moe.gguf") if weights == "F16" else folder / f"tiny-{weights}.gguf"


def write_models(folder: Path) -> None:
    """Write the copies."""
    copy = write_f32(data_file("tiny-moe.gguf"), model_file("F32", folder))
    for weights in WEIGHTS:
        if weights not in ALL_CASES:
            quantize_file(copy, model_file(weights, folder), LlamaFileType[f"MOSTLY_{weights}"].value)


def bias_of(rule: str, path: Path) -> capi.NativeBias | None:
    """The steering of a case, the same on every processor."""
    if not rule:
        return None
    identity = identity_of(path)
    rng = np.random.default_rng(5)
    rows: dict[int, Any] = {}
    for layer in range(identity.n_layer):
        signs = random_signs(rng, identity.n_expert, identity.n_expert_used, 1, 2)
        rows[layer] = signs if rule == "hard" else signs * np.float32(1.5)
    return native_bias(identity, rows, rule)


def prompt_of(model: Any, question: str) -> list[int]:
    """The tokens of a conversation that is answered."""
    return Renderer(model).render([Message("user", question)]).tokens


def answer(
    model: Any, bias: capi.NativeBias | None, prompt: list[int], given: list[int] | None = None
) -> tuple[list[int], npt.NDArray[np.float32], dict[str, list[Any]]]:
    """(tokens, the logits that each was drawn from, the routers' tensors of the whole run).

    The tokens are those with the largest logits, or the given ones; the answer ends where they do, at the end of the
    model's answer, or after `MAX_TOKENS`.
    """
    lib = capi.llama_cpp()
    with Context(model, capture=True, n_seq_max=1, type_kv=F32) as context:
        if bias is not None:
            capi.attach(context.ctx, bias)
        tokens: list[int] = []
        rows = [context.decode(prompt)[-1]]
        while True:
            token = int(rows[-1].argmax()) if given is None else given[len(tokens)]
            tokens.append(token)
            ended = lib.llama_vocab_is_eog(model.vocab, token) or len(tokens) == MAX_TOKENS
            if len(tokens) == len(given) if given is not None else ended:
                return tokens, np.array(rows), context.seen
            rows.append(context.decode([token], len(prompt) + len(tokens) - 1)[-1])


def by_layer(seen: dict[str, list[Any]], name: str) -> npt.NDArray[Any]:
    """A routers' tensor of a run, [layers, tokens, values]."""
    layers = sorted(int(key.rpartition("-")[2]) for key in seen if key.rpartition("-")[0] == name)
    parts = [[part.reshape(-1, part.shape[-1]) for part in seen[f"{name}-{layer}"]] for layer in layers]
    return np.array([np.concatenate(of_layer) for of_layer in parts])


def chosen(seen: dict[str, list[Any]]) -> npt.NDArray[Any]:
    """The experts of every layer and token, [layers, tokens, k], in the order of their numbers."""
    return np.sort(by_layer(seen, "ffn_moe_topk"), axis=-1)


def program_answers() -> list[str]:
    """What `steermoe run` answers to the longest two."""
    command = [sys.executable, "-P", "-m", "steermoe_local", "run", "-m", "tiny", "--temp", "0", "--json"]
    texts = []
    for question in QUESTIONS[1:4:2]:
        done = subprocess.run([*command, "-p", question], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        texts.append(json.loads(done.stdout)["text"])
    return texts


def main(folder: Path) -> None:
    """Write the models, tokens and logits of all cases, and what the program answers."""
    folder.mkdir(parents=True, exist_ok=True)
    write_models(folder)
    found: dict[str, Any] = {"program": program_answers()}
    for weights in WEIGHTS:
        path = model_file(weights, folder)
        with closing(open_model(path)) as model:
            for rule in STEERED:
                bias = bias_of(rule, path)
                for i in numbers(weights, rule):
                    name, prompt = case(weights, rule, i), prompt_of(model, QUESTIONS[i])
                    tokens, logits, seen = answer(model, bias, prompt)
                    found |= {f"{name}-prompt": prompt, f"{name}-tokens": tokens, f"{name}-logits": logits}
                    found[f"{name}-experts"] = chosen(seen)
    np.savez(folder / "answers.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
