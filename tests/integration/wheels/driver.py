"""What the package that this Python has computes with the embedded model. A program of its own:

    python -P driver.py OUTPUT.npz

Prints the facts as JSON: the library of the CPU's code and its features. Keeps the greedy answers to some questions,
unsteered and steered, with the margin of every choice; the logits of one prompt unsteered, under a bias that is empty
and under one that promotes and suppresses an expert in every layer; and the experts that the tokens select under it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT))  # behind the installed packages, of which steermoe_local must be one

import steermoe_local  # noqa: E402
from steermoe_local import BiasFile, SteeredLlama, model_info  # noqa: E402
from steermoe_local.llama.backends import cpu_features  # noqa: E402
from tests.integration.reference import native  # noqa: E402
from tests.support.generation import QUESTIONS  # noqa: E402

N_ANSWER = 24


def signs(shape: tuple[int, int]) -> np.ndarray:
    """An expert to promote and one to suppress in every layer, from row to row others."""
    values = np.zeros(shape)
    for layer in range(shape[0]):
        values[layer, (3 * layer + 1) % shape[1]], values[layer, (5 * layer + 2) % shape[1]] = 1, -1
    return values


def answer(llama: SteeredLlama, question: str, bias: BiasFile | None) -> tuple[list[int], list[float]]:
    """The greedy answer, and by how much each of its tokens was the likeliest."""
    llama.reset()
    llama.set_bias(bias)
    llama.eval(llama.tokenize(question.encode()))
    tokens, margins = [], []
    for _ in range(N_ANSWER):
        row = np.asarray(llama.scores[llama.n_tokens - 1])
        second, first = np.sort(row)[-2:]
        tokens.append(int(row.argmax()))
        margins.append(float(first - second))
        llama.eval(tokens[-1:])
    return tokens, margins


def main() -> None:
    model = native.data_file("tiny-moe.gguf")
    identity = model_info(model).require_moe()
    steered = BiasFile.from_signs(signs(identity.shape), identity)
    empty = BiasFile.from_signs(np.zeros(identity.shape), identity)
    found: dict[str, object] = {}
    with closing(SteeredLlama(model, n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True)) as llama:
        for name, bias in (("unsteered", None), ("steered", steered)):
            given = [answer(llama, question, bias) for question in QUESTIONS]
            found[f"answers, {name}"], found[f"margins, {name}"] = map(np.asarray, zip(*given, strict=True))
    with tempfile.TemporaryDirectory() as scratch:
        f32 = native.write_f32(model, Path(scratch) / "f32.gguf")
        with closing(native.load(f32, 256)) as llama:
            tokens = llama.tokenize(" ".join(QUESTIONS).encode())
            for name, bias in (("unsteered", None), ("empty", empty), ("steered", steered)):
                llama.reset()
                found[f"logits, {name}"] = native.logits(llama, tokens, bias)
            found["selected, steered"] = native.selected(llama, tokens, steered, identity.shape)
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = sorted({line.split(maxsplit=5)[-1] for line in maps if "libggml-cpu" in line or "libgomp" in line})
    np.savez(sys.argv[1], allow_pickle=False, **found)
    print(json.dumps({"loaded": loaded, "features": sorted(cpu_features()), "package": steermoe_local.__file__}))


if __name__ == "__main__":
    main()
