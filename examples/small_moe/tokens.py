"""The tokenizer, and the corpus as tokens: `python -m small_moe.tokens CORPUS.jsonl FOLDER`.

FOLDER gets tokenizer.json and, for each part, PART.npy: the documents' tokens one after the other, each ended by
<|end|>, uint16.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .sources import lines

SPECIAL_TOKENS = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
END, PAD = 0, 1
VOCAB_SIZE = 8192
MOST_OF_KIND = 2_500_000  # characters of one kind and language that the tokenizer is trained on


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer; covers every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=SPECIAL_TOKENS,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def sample(documents: list[dict[str, str]]) -> list[str]:
    """Training texts for the tokenizer: of every kind and language at most MOST_OF_KIND characters."""
    sizes: defaultdict[tuple[str, str], int] = defaultdict(int)
    chosen = []
    for document in documents:
        key = document["kind"], document["language"]
        if document["part"] == "train" and sizes[key] < MOST_OF_KIND:
            sizes[key] += len(document["text"])
            chosen.append(document["text"])
    return chosen


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the documents' order")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    documents = list(lines(args.corpus))
    random.Random(args.seed).shuffle(documents)
    tokenizer = train_tokenizer(sample(documents))
    tokenizer.save(str(args.folder / "tokenizer.json"))
    for part in ("train", "heldout", "test"):
        texts = [document["text"] for document in documents if document["part"] == part]
        encoded = tokenizer.encode_batch(texts)
        stream = np.concatenate([np.array([*e.ids, END], np.uint16) for e in encoded])
        np.save(args.folder / f"{part}.npy", stream)
        print(
            f"{part}: {len(texts)} documents, {len(stream):,} tokens, "
            f"{sum(map(len, texts)) / len(stream):.2f} characters a token",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
