"""The small MoE of examples/small_moe: its GGUF file in float32 under llama.cpp, against the PyTorch model.

For a trained checkpoint: `python -m tests.integration.reference.small_moe CHECKPOINT TOKENS CORPUS.jsonl F32.gguf`,
from the repository's root. Every kind and language of held-out text is compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.model_files.model_info import model_info
from tests.integration.reference import native
from tests.support import rounding
from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "examples"))
from small_moe import card as small_card
from small_moe import train as small_train
from small_moe.export_gguf import export, load
from small_moe.model import SmallMoE
from small_moe.sources import lines
from small_moe.tokens import SPECIAL_TOKENS, train_tokenizer
from tiny_moe.model import Config

__all__ = [
    "Agreement",
    "Config",
    "SPECIAL_TOKENS",
    "SmallMoE",
    "compare",
    "export",
    "other_tokens",
    "small_card",
    "small_train",
    "train_tokenizer",
]

LONGEST = 256  # tokens of a text whose logits are compared


@dataclass(frozen=True)
class Agreement:
    """Largest difference of the logits, as a share of what rounding in F32 allows, and how much was compared.

    `near_ties` tokens follow, in their text, one for which rounding alone may decide who is selected; they are left
    out. `other_experts` counts the compared (layer, token) that select others.
    """

    worst: float
    compared: int
    near_ties: int
    other_experts: int


def other_tokens(llama: SteeredLlama, tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The texts that llama.cpp splits into other tokens than the `tokenizers` library."""
    return [
        text
        for text in texts
        if llama.tokenize(text.encode(), add_bos=False, special=True) != tokenizer.encode(text).ids
    ]


@torch.no_grad()
def compare(model: SmallMoE, file: Path, texts: Sequence[Sequence[int]]) -> Agreement:
    """Compare logits and chosen experts of every token."""
    identity, c = model_info(file).require_moe(), model.config
    llama = native.load(file, n_ctx=LONGEST)
    worst, compared, near, other = 0.0, 0, 0, 0
    for text in texts:
        tokens = list(text[:LONGEST])
        hidden, z, _ = model(torch.tensor([tokens]))
        logits = model.logits(hidden)[0].numpy()
        best = z.sort(-1, descending=True).values  # [layers, T, E]
        tied = (best[..., c.top_k - 1] - best[..., c.top_k] < native.NEAR_TIE).any(0).nonzero()
        n = int(tied[0]) if len(tied) else len(tokens)  # a token sees all before it
        near += len(tokens) - n
        if n == 0:
            continue
        allowed = rounding.logits(logits[:n], c.layers, max(c.hidden, c.expert_ff, len(tokens)))
        worst = max(worst, float(np.abs(native.logits(llama, tokens)[:n] - logits[:n]).max()) / allowed)
        chosen = np.sort(z.topk(c.top_k, dim=-1).indices.numpy(), axis=-1)
        ours = native.selected(llama, tokens, None, identity.shape)
        other += int((ours[:, :n] != chosen[:, :n]).any(-1).sum())
        compared += n
    llama.close()
    return Agreement(worst, compared, near, other)


def main() -> None:
    """Compare a trained checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "tokens", "corpus", "gguf"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--texts", type=int, default=3, help="of each kind and language whose logits are compared")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.checkpoint), Tokenizer.from_file(str(args.tokens / "tokenizer.json"))
    by_kind: dict[str, list[str]] = {}
    for document in lines(args.corpus):
        if document["part"] == "heldout":
            by_kind.setdefault(f"{document['kind']} {document['language']}", []).append(document["text"])
    llama = SteeredLlama(args.gguf, n_ctx=LONGEST)
    failed = False
    for kind, texts in sorted(by_kind.items()):
        other = other_tokens(llama, tokenizer, texts)
        found = compare(model, args.gguf, [tokenizer.encode(text).ids for text in texts[: args.texts]])
        print(f"{kind}: {len(texts)} texts, {len(other)} split otherwise; {found}", flush=True)
        failed |= bool(other) or found.worst > 1 or found.other_experts > 0 or not found.compared
    sys.exit("error: the file is not the checkpoint's model; the lines above say where" if failed else 0)


if __name__ == "__main__":
    main()
