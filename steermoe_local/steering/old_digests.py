"""Digests of biases in files of earlier versions, to recognize a bias in them; `BiasFile.key` replaced them.

Saved chats held a digest that covered the provenance; records.jsonl named a bias by 16 digits of a digest that left
out the model.
"""

from __future__ import annotations

import hashlib
import json

from .bias_file import BiasFile


def chat_digest(bias: BiasFile) -> str:
    """`bias_digest` of a saved chat (64 hex digits): over values, rule, model, layers and provenance."""
    head = [bias.identity.to_dict(), bias.mode, bias.epsilon, list(bias.layers), dict(sorted(bias.provenance.items()))]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode("utf-8"))
    digest.update(bias.dense().astype("<f4").tobytes())
    return digest.hexdigest()


def record_name(bias: BiasFile) -> str:
    """`bias` of a record in records.jsonl (16 hex digits): over values and rule."""
    digest = hashlib.sha256(f"{bias.mode} {bias.epsilon if bias.mode == 'hard' else 0!r}".encode())
    digest.update(bias.dense().astype("<f4").tobytes())
    return digest.hexdigest()[:16]
