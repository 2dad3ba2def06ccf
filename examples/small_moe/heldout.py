"""The loss of every kind and language of held-out text, and which experts it uses, in PyTorch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from .model import SmallMoE
from .sources import lines
from .tokens import END


@dataclass
class Kind:
    """Sums over texts of one kind and language: nats, tokens and bytes that were predicted, tokens of each expert."""

    counts: Tensor  # [layers, experts]
    nats: float = 0.0
    tokens: int = 0
    n_bytes: int = 0
    documents: int = 0

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits_a_byte(self) -> float:
        """For comparisons of languages, whose tokens are of different lengths."""
        return self.nats / math.log(2) / self.n_bytes


@torch.no_grad()
def by_kind(model: SmallMoE, tokenizer: Tokenizer, corpus: Path, part: str, length: int) -> dict[str, Kind]:
    """By "kind language", over all documents of that part, cut into windows of `length`.

    The first token of a document is predicted after <|end|>, as in training, that of another window after the last
    token of the window before, and none is counted twice.
    """
    c = model.config
    found: defaultdict[str, Kind] = defaultdict(lambda: Kind(torch.zeros(c.layers, c.experts, dtype=torch.int64)))
    for document in lines(corpus):
        if document["part"] != part:
            continue
        kind = found[f"{document['kind']} {document['language']}"]
        kind.documents += 1
        kind.n_bytes += len(document["text"].encode())
        for ids in _windows([END, *tokenizer.encode(document["text"]).ids], length):
            hidden, _, counts = model(ids[None, :-1])
            loss = F.cross_entropy(model.logits(hidden)[0], ids[1:], reduction="sum")
            kind.nats += float(loss)
            kind.tokens += len(ids) - 1
            kind.counts += counts
    return dict(sorted(found.items()))


def _windows(ids: list[int], length: int) -> Iterator[Tensor]:
    for begin in range(0, len(ids) - 1, length):
        yield torch.tensor(ids[begin : begin + length + 1])
