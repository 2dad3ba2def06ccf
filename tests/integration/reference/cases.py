"""What is compared: prompts of the embedded pairs, routing counts, and ways to steer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from steermoe_local.identity import ModelIdentity
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.scores import risk_difference_from
from tests.integration.reference import native
from tests.integration.reference.hf_olmoe import HfOlmoe, Steering

BEHAVIOURS = ("digits-words", "document-memory", "refuse-comply")
SIDES = ("positive", "negative")

TEXTS = (
    "How many animals: cat, mouse, rhino?",
    "1, 2, 3, 45 and 6789; 3.14159 or 2,718,281; 007\n1234567890",
    "Zeilen\n\nund   Leerzeichen \t Tab\r\nEnde  ",
    "naïve café, Größe 5 µm, Ελληνικά, русский текст, 日本語の文, हिन्दी, עברית",
    "emoji 🙂👩‍👩‍👧 and half é versus é",
    "it's we'll I'VE don't 'quoted' (brackets) [x] {y} <z> a_b-c/d\\e",
    "    leading and trailing    ",
    "<|user|>What comes after 12?<|end|><|assistant|>13<|end|>",
    "ALL CAPS mixedCase123abc456 \u00a0 no-break \u2028 line \x7f \x01",
)


@dataclass(frozen=True)
class Counts:
    """Pooled over a behaviour's pairs, by side: activations, tokens, and tokens at a near tie."""

    a: np.ndarray  # int64 [2, layers, experts]
    n: np.ndarray  # int64 [2]
    near_ties: np.ndarray  # int64 [2, layers]


def pairs(behaviour: str) -> list[dict[str, Any]]:
    """The behaviour's pairs as plain JSON objects."""
    text = native.data_file(f"{behaviour}.pairs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def prompts(hf: HfOlmoe, per_behaviour: int) -> list[list[int]]:
    """Tokens of prompts taken evenly from all behaviours, both sides; every second one ends before its reply."""
    chosen = []
    for behaviour in BEHAVIOURS:
        found = pairs(behaviour)
        for i in range(per_behaviour):
            messages = found[i * len(found) // per_behaviour][SIDES[i % 2]]
            text = hf.render(messages) if i % 2 else hf.render(messages[:-1], generate=True)
            chosen.append(hf.tokenize(text))
    return chosen


def count(hf: HfOlmoe, behaviour: str) -> Counts:
    """Routing counts of the unsteered reference over the targets of a behaviour's pairs."""
    a = np.zeros((2, hf.n_layer, hf.n_expert), dtype=np.int64)
    n = np.zeros(2, dtype=np.int64)
    near_ties = np.zeros((2, hf.n_layer), dtype=np.int64)
    for pair in pairs(behaviour):
        for side, name in enumerate(SIDES):
            tokens, places = hf.target(hf.render(pair[name]), pair[f"{name}_target"])
            run = hf.run(tokens)
            n[side] += len(places)
            near_ties[side] += (run.margin[:, places] < native.NEAR_TIE).sum(axis=1)
            for layer in range(hf.n_layer):
                a[side, layer] += np.bincount(run.selected[layer, places].ravel(), minlength=hf.n_expert)
    return Counts(a, n, near_ties)


def steerings(counts: dict[str, Counts], identity: ModelIdentity) -> dict[str, Steering | None]:
    """Ways to steer by name: chosen by scores and at random, in all layers and in the outer ones, hard and soft."""
    maps = {}
    for name, c in counts.items():
        rd = risk_difference_from(c.a[0], int(c.n[0]), c.a[1], int(c.n[1]))
        maps[name] = ExpertMap(identity=identity, behaviour=name, rd=rd, created="2025-01-01T00:00:00Z")
    digits, memory, refuse = (maps[name] for name in BEHAVIOURS)
    last = identity.n_layer - 1
    rng = np.random.default_rng(7)
    soft = rng.normal(size=identity.shape).astype(np.float32)
    return {
        "unsteered": None,
        "hard-8-8": Steering("hard", digits.choose(8, 8)),
        "hard-30-30": Steering("hard", memory.choose(30, 30)),
        "hard-reverse": Steering("hard", refuse.choose(8, 8, reverse=True), epsilon=1.0),
        "hard-first-layer": Steering("hard", refuse.choose(4, 4, layers=[0])),
        "hard-last-layer": Steering("hard", refuse.choose(4, 4, layers=[last])),
        "hard-random": Steering("hard", random_signs(identity, rng)),
        "soft-scores": Steering("soft", (4 * digits.rd).astype(np.float32)),
        "soft-random": Steering("soft", soft),
    }


def random_signs(identity: ModelIdentity, rng: np.random.Generator) -> np.ndarray:
    """Signs in every layer, from a few up to as many as the rule allows (in the first layer)."""
    k, others = identity.n_expert_used, identity.n_expert - identity.n_expert_used
    signs = np.zeros(identity.shape, dtype=np.int8)
    for layer, row in enumerate(signs):
        n_active = k if layer == 0 else int(rng.integers(1, k + 1))
        n_inactive = others if layer == 0 else int(rng.integers(1, others + 1))
        order = rng.permutation(identity.n_expert)
        row[order[:n_active]] = 1
        row[order[n_active : n_active + n_inactive]] = -1
    return signs
