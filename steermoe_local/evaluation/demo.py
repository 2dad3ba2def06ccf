"""The whole way on the embedded model: record, score, choose, steer, and measure on prompts it has not seen.

The embedded model is a positive control: its behaviours were tied to known experts when it was trained. So this shows
that detection finds experts and that steering moves behaviour, not that such experts arise by themselves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..detection.recorder import record_counts
from ..errors import UsageError
from ..generation.batch import BatchGenerator
from ..identity import ModelIdentity
from ..llama.steered_llama import SteeredLlama
from ..maps.expert_map import ExpertMap
from ..models.embedded import Behaviour, behaviours, data_folder, resolve_model, score_reply
from ..pairs.pairs import Message, load_pairs
from ..steering.bias_file import BiasFile, write_bias
from ..steering.control_choices import random_signs

__all__ = ["BehaviourResult", "DemoResult", "run_demo"]

Signs = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Rates:
    """Shares of replies to the same held-out prompts: on the positive side, exactly right, ill-formed."""

    positive: float
    exact: float
    ill_formed: float


@dataclass(frozen=True)
class Example:
    """A held-out prompt with its three replies."""

    prompt: str
    base: str
    toward: str
    away: str


@dataclass(frozen=True)
class BehaviourResult:
    """What was measured for a behaviour; all rates are shares of replies that show its positive side."""

    name: str
    positive: str
    negative: str
    n: int
    base: float
    toward: float
    away: float
    random_mean: float  # mean rate over draws of as many random experts
    random_swing: float  # mean |rate of a draw - rate of its reverse|
    random_swing_max: float
    n_random: int
    max_abs_rd: float
    n_activate: int
    n_deactivate: int
    n_active: int  # after the cap of top-k a layer
    n_inactive: int
    planted_precision: float  # planted experts among as many of the top |RD| as were planted, sign included
    planted_n: int
    exact: dict[str, float]
    ill_formed: dict[str, float]
    neutral: dict[str, float]  # accuracy on neutral tasks
    examples: list[Example] = field(default_factory=list)

    @property
    def swing(self) -> float:
        """Rate steered towards the positive side minus rate steered away."""
        return self.toward - self.away


@dataclass(frozen=True)
class DemoResult:
    """All behaviours, and where the files are."""

    model: ModelIdentity
    behaviours: list[BehaviourResult]
    n_neutral: int
    seed: int
    seconds: float
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        data: dict[str, Any] = asdict(self)
        data["folder"] = str(self.folder)
        for item, result in zip(data["behaviours"], self.behaviours, strict=True):
            item["swing"] = result.swing
        return data


def run_demo(
    folder: Path,
    *,
    n_prompts: int | None = 40,
    n_random: int = 5,
    seed: int = 0,
    n_threads: int | None = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> DemoResult:
    """Detect and steer every behaviour of the embedded model; measure with greedy decoding.

    Args:
        folder: where counts (.npz), maps (.json) and bias files (.gguf) go.
        n_prompts: held-out prompts of each behaviour and of the neutral tasks; None takes all.
        n_random: draws of as many random experts, each also reversed.
        seed: of the random experts.
        n_threads: threads of llama.cpp; None takes all cores. The model is too small to gain from a second one, and
            on a busy machine threads wait for each other.
        progress: called with (what, done, total).

    Raises UsageError and the errors of the steps.
    """
    if n_random < 1 or (n_prompts is not None and n_prompts < 1):
        raise UsageError("the demo needs at least one prompt and one random draw")
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    model = SteeredLlama(resolve_model("tiny"), n_ctx=64)
    neutral = _read_jsonl(data_folder() / "neutral.heldout.jsonl")[:n_prompts]
    results = []
    with BatchGenerator(model, n_threads=n_threads) as generator:
        for behaviour in behaviours():
            run = _Run(behaviour, generator, neutral, n_prompts, progress or (lambda *_: None), n_random)
            expert_map = run.detect(model, folder, n_threads)
            results.append(run.measure(expert_map, folder, seed))
    return DemoResult(expert_map.identity, results, len(neutral), seed, time.monotonic() - start, folder)


class _Run:
    """One behaviour's way from pairs to figures."""

    def __init__(
        self,
        behaviour: Behaviour,
        generator: BatchGenerator,
        neutral: Sequence[dict[str, Any]],
        n_prompts: int | None,
        progress: Callable[[str, int, int], None],
        n_random: int,
    ) -> None:
        self.behaviour = behaviour
        self.generator = generator
        self.items = _read_jsonl(behaviour.heldout)[:n_prompts]
        self.neutral = neutral
        self.n_random = n_random
        self.progress = progress
        self.done = 0
        self.total = 3 * (len(self.items) + len(neutral)) + 2 * n_random * len(self.items)

    def detect(self, model: SteeredLlama, folder: Path, n_threads: int | None) -> ExpertMap:
        """Record the pairs, score them, write counts and map."""
        b = self.behaviour
        counts = record_counts(
            model,
            load_pairs(b.pairs),
            behaviour=b.name,
            n_threads=n_threads,
            progress=lambda done, total: self.progress(f"{b.name}: detect", done, total),
        )
        counts.save(folder / f"{b.name}.counts.npz")
        expert_map = ExpertMap.from_counts(counts, positive=b.positive, negative=b.negative, license="MIT")
        expert_map.save(folder / f"{b.name}.map.json")
        return expert_map

    def measure(self, expert_map: ExpertMap, folder: Path, seed: int) -> BehaviourResult:
        """Choose experts both ways, write the bias files, steer, and count."""
        b = self.behaviour
        identity = expert_map.identity
        replies: dict[str, list[str]] = {}
        neutral: dict[str, float] = {}
        signs: dict[str, Signs] = {"base": np.zeros(identity.shape, dtype=np.int8)}
        for name, reverse in (("toward", False), ("away", True)):
            signs[name] = expert_map.choose(b.n_activate, b.n_deactivate, reverse=reverse)
            choice = {"activate": b.n_activate, "deactivate": b.n_deactivate, "reverse": reverse}
            provenance = {"behaviour": b.name, "map_sha256": expert_map.sha256, "choice": json.dumps(choice)}
            bias = BiasFile.from_signs(signs[name], identity, provenance=provenance)
            write_bias(bias, folder / f"{b.name}.{name}.gguf")
        for name in ("base", "toward", "away"):
            replies[name] = self._answers(signs[name], identity, self.items)
            right = zip(self._answers(signs[name], identity, self.neutral), self.neutral, strict=True)
            neutral[name] = float(np.mean([reply.strip() == item["answer"] for reply, item in right]))
        rates = {name: self._rates(texts) for name, texts in replies.items()}
        random_rates = self._random(signs["toward"], expert_map, seed)
        swings = np.abs(random_rates[:, 0] - random_rates[:, 1])
        planted = b.planted_positive | b.planted_negative
        return BehaviourResult(
            name=b.name,
            positive=b.positive,
            negative=b.negative,
            n=len(self.items),
            base=rates["base"].positive,
            toward=rates["toward"].positive,
            away=rates["away"].positive,
            random_mean=float(random_rates.mean()),
            random_swing=float(swings.mean()),
            random_swing_max=float(swings.max()),
            n_random=self.n_random,
            max_abs_rd=float(np.abs(expert_map.rd).max()),
            n_activate=b.n_activate,
            n_deactivate=b.n_deactivate,
            n_active=int((signs["toward"] > 0).sum()),
            n_inactive=int((signs["toward"] < 0).sum()),
            planted_precision=_planted_precision(expert_map, b),
            planted_n=len(planted),
            exact={name: rate.exact for name, rate in rates.items()},
            ill_formed={name: rate.ill_formed for name, rate in rates.items()},
            neutral=neutral,
            examples=self._examples(replies),
        )

    def _answers(self, signs: Signs, identity: ModelIdentity, items: Sequence[dict[str, Any]]) -> list[str]:
        self.generator.set_bias(BiasFile.from_signs(signs, identity))
        prompts = [tuple(Message(**message) for message in item["messages"]) for item in items]

        def count(n: int) -> None:
            self.done += n
            self.progress(f"{self.behaviour.name}: steer", self.done, self.total)

        return self.generator.answer(prompts, progress=count)

    def _rates(self, replies: Sequence[str]) -> Rates:
        scored = [
            score_reply(self.behaviour.name, reply, item["positive"], item["negative"])
            for reply, item in zip(replies, self.items, strict=True)
        ]
        return Rates(
            positive=float(np.mean([side == "positive" for side, _ in scored])),
            exact=float(np.mean([exact for _, exact in scored])),
            ill_formed=float(np.mean([side == "ill-formed" for side, _ in scored])),
        )

    def _random(self, signs: Signs, expert_map: ExpertMap, seed: int) -> npt.NDArray[np.float64]:
        """Positive rates [n_random, 2] of random experts and of the same experts with the signs swapped."""
        rng = np.random.default_rng(seed)
        layers = tuple(int(layer) for layer in np.flatnonzero(np.abs(expert_map.rd).sum(axis=1)))
        rates = np.zeros((self.n_random, 2))
        for draw in range(self.n_random):
            drawn = random_signs(signs, expert_map.identity, layers, rng)
            for column, table in enumerate((drawn, -drawn)):
                rates[draw, column] = self._rates(self._answers(table, expert_map.identity, self.items)).positive
        return rates

    def _examples(self, replies: dict[str, list[str]], n: int = 2) -> list[Example]:
        """The first prompts whose reply steering flips."""
        found = []
        for item, base, toward, away in zip(
            self.items, replies["base"], replies["toward"], replies["away"], strict=True
        ):
            sides = [
                score_reply(self.behaviour.name, reply, item["positive"], item["negative"])[0]
                for reply in (toward, away)
            ]
            if sides == ["positive", "negative"]:
                found.append(Example(item["messages"][-1]["content"], base.strip(), toward.strip(), away.strip()))
        return found[:n]


def _planted_precision(expert_map: ExpertMap, behaviour: Behaviour) -> float:
    """Share of the top |RD| experts that were planted on the side that RD's sign says.

    As many are looked at as were planted, so that this is precision and recall in one.
    """
    n = len(behaviour.planted_positive | behaviour.planted_negative)
    hits = [
        (layer, expert) in (behaviour.planted_positive if rd > 0 else behaviour.planted_negative)
        for layer, expert, rd in expert_map.top(n)
    ]
    return float(np.mean(hits))


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
