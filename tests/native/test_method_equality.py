"""Equality with the method: one routing through an implementation of the paper's formula, and through our files.

The first half of this file is written from arXiv 2509.09660, Eq. 3 and 4, and Algorithm 1, and uses nothing of the
package. It goes token by token, in plain Python.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.maps.counts import RoutingCounts
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.pair_counts import PairCounts, PairCountsWriter
from steermoe_local.maps.scores import rank
from tests.support.builders import identity

Routing = list[tuple[Any, Any]]  # of each pair: router logits [n_layer, tokens, n_expert] of its two sides' targets


def selected(logits: list[float], k: int) -> set[int]:
    """Experts that a token activates: the k largest probabilities of its router."""
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    total = sum(weights)
    probabilities = [weight / total for weight in weights]
    return set(sorted(range(len(logits)), key=lambda expert: -probabilities[expert])[:k])


def papers_formula(routing: Routing, k: int) -> list[list[float]]:
    """RD of each expert: its activation rate over all tokens of the positive sides less that of the negative."""
    n_layer, _, n_expert = routing[0][0].shape
    table = []
    for layer in range(n_layer):
        rates = []
        for side in (0, 1):
            tokens = [logits for pair in routing for logits in pair[side][layer].tolist()]
            choices = [selected(logits, k) for logits in tokens]
            rates.append([sum(e in choice for choice in choices) / len(tokens) for e in range(n_expert)])
        table.append([p1 - p2 for p1, p2 in zip(*rates, strict=True)])
    return table


def papers_order(table: list[list[float]]) -> list[tuple[int, int]]:
    cells = [(layer, expert) for layer, row in enumerate(table) for expert in range(len(row))]
    return sorted(cells, key=lambda cell: (-abs(table[cell[0]][cell[1]]), cell))


def random_routing(seed: int, n_layer: int, n_expert: int, n_pairs: int) -> Routing:
    """Random logits whose sides differ by expert; as many tokens on each side as it happens."""
    rng = np.random.default_rng(seed)
    habit, tilt = rng.normal(size=(n_layer, 1, n_expert)), rng.normal(size=(n_layer, 1, n_expert)) * 0.4
    return [
        tuple(  # type: ignore[misc]
            rng.normal(size=(n_layer, int(rng.integers(1, 40)), n_expert)) + habit + sign * tilt for sign in (1, -1)
        )
        for _ in range(n_pairs)
    ]


def through_our_files(routing: Routing, k: int, folder: Path) -> ExpertMap:
    """Per-pair counts, counts and map, each written and read."""
    n_layer, _, n_expert = routing[0][0].shape
    model = identity(n_layer, n_expert, k)
    with PairCountsWriter(folder / "run.pairs.npz", model, behaviour="random") as writer:
        for number, pair in enumerate(routing):
            a = np.zeros((1, 2, n_layer, n_expert), dtype=np.int64)
            for side, logits in enumerate(pair):
                chosen = np.argpartition(-logits, k - 1, axis=2)[:, :, :k]
                for layer in range(n_layer):
                    a[0, side, layer] = np.bincount(chosen[layer].ravel(), minlength=n_expert)
            writer.append([f"pair-{number}"], a, [[logits.shape[1] for logits in pair]])
    PairCounts.load(folder / "run.pairs.npz").total().save(folder / "run.npz")
    ExpertMap.from_counts(RoutingCounts.load(folder / "run.npz")).save(folder / "map.json")
    return ExpertMap.load(folder / "map.json")


@pytest.mark.parametrize(
    ("n_layer", "n_expert", "k", "n_pairs"), [(5, 24, 3, 20), (16, 64, 8, 6), (3, 8, 2, 1), (2, 16, 1, 9), (4, 5, 5, 3)]
)
def test_rd_and_order_are_the_papers(tmp_path: Path, n_layer: int, n_expert: int, k: int, n_pairs: int) -> None:
    for seed in range(3):
        routing = random_routing(seed, n_layer, n_expert, n_pairs)
        expected = papers_formula(routing, k)
        made = through_our_files(routing, k, tmp_path)
        assert np.abs(made.rd - np.array(expected)).max() <= 1e-12
        assert [tuple(cell) for cell in rank(made.rd).tolist()] == papers_order(expected)
        assert [(layer, expert) for layer, expert, _ in made.top(10)] == papers_order(expected)[:10]
        # a negated half of the pairs would cancel; so would pairs that are the same on both sides
        if k < n_expert:
            assert np.abs(made.rd).max() > 0.1
        else:
            assert not made.rd.any()


def test_two_runs_add_up_to_one(tmp_path: Path) -> None:
    routing = random_routing(7, 3, 12, 10)
    halves = []
    for number, part in enumerate((routing[:4], routing[4:])):
        (tmp_path / str(number)).mkdir()
        through_our_files(part, 2, tmp_path / str(number))
        halves.append(RoutingCounts.load(tmp_path / str(number) / "run.npz"))
    made = ExpertMap.from_counts(halves[0] + halves[1])
    assert np.abs(made.rd - np.array(papers_formula(routing, 2))).max() <= 1e-12
