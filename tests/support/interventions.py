"""Interventions one by one, by SteeredLlama and NumPy, to compare those of a batch with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steermoe_local import BiasFile, SteeredLlama
from steermoe_local.attribution.items import Answer, Item
from steermoe_local.evaluation.tasks.neutral_text import Document
from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import capi
from steermoe_local.llama.loaded_model import loaded_identity
from steermoe_local.llama.steered_llama import native_bias
from tests.support import rounding
from tests.support.low_level import F32, random_signs

Array = np.ndarray[Any, Any]
LLAMA: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "logits_all": True, "type_k": F32, "type_v": F32}
DECODER: dict[str, Any] = {"n_threads": 1, "type_k": F32, "type_v": F32, "flash_attn": False}


class Alone:
    """One model, and what each intervention gives when nothing else is computed."""

    def __init__(self, path: Path) -> None:
        self.llama = SteeredLlama(path, **LLAMA)
        self.model: Any = self.llama._model
        self.n_vocab = int(self.model.n_vocab())
        self.n_layer = len(self.llama.layer_info())
        self.off = 0.0  # how far two computations of a log-probability may lie apart, of the last call

    def close(self) -> None:
        self.llama.close()

    def logprobs(self, tokens: Sequence[int], shared: int, bias: BiasFile | None) -> Array:
        """Log-probabilities after each token, [tokens, vocabulary]; the first `shared` are computed unsteered."""
        self.llama.set_bias(None)
        if shared:
            self.llama.eval(list(tokens[:shared]))
        if bias is not None and bias.values:
            capi.attach(self.llama._ctx.ctx, native_bias(bias))  # set_bias would forget the prompt
        self.llama.eval(list(tokens[shared:]))
        logits = np.array(self.llama.scores[: len(tokens)], dtype=np.float64)
        capi.detach(self.llama._ctx.ctx)
        # the longest sum has as many products as the widest row, at most 4096 in these models
        self.off = rounding.logprobs(logits, self.n_layer, 256)
        shifted = logits - logits.max(axis=1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))

    def margin(self, item: Item, bias: BiasFile | None, steer: str) -> float:
        """The margin by its definition."""
        total = 0.0
        last = len(item.prompt) - 1
        for answer in item.answers:
            found = self.logprobs((*item.prompt, *answer.tokens), last if steer == "answer" else 0, bias)
            total += answer.sign * float(np.mean([found[last + i, answer.tokens[i]] for i in answer.scored]))
        return total

    def divergence(self, document: Document, bias: BiasFile | None, steer: str) -> float:
        """Sum of KL(unsteered || steered) over the counted tokens."""
        tokens = document.tokens[:-1]
        rows = slice(document.first, document.first + document.n)
        p = self.logprobs(tokens, 0, None)[rows]
        q = self.logprobs(tokens, document.first if steer == "answer" else 0, bias)[rows]
        return float((np.exp(p) * (p - q)).sum())

    def biases(self, n: int, seed: int = 0) -> list[BiasFile | None]:
        """Unsteered, an empty choice, a soft rule, and random choices of the layers that can be steered."""
        identity = loaded_identity(self.model)
        rng = np.random.default_rng(seed)
        found: list[BiasFile | None] = [None, BiasFile.from_signs(np.zeros(identity.shape, np.int8), identity)]
        steerable = [layer for layer, info in enumerate(self.llama.layer_info()) if info.steerable]
        while len(found) < n:
            table = np.zeros(identity.shape, dtype=np.float32)
            for layer in rng.permutation(steerable)[: int(rng.integers(1, len(steerable) + 1))]:
                n_plus = int(rng.integers(0, identity.max_active + 1))
                n_minus = int(rng.integers(0, identity.max_inactive + 1))
                table[layer] = random_signs(rng, identity.n_expert, identity.n_expert_used, n_plus, n_minus)
            soft = len(found) == 2
            found.append((BiasFile.from_soft if soft else BiasFile.from_signs)(table, identity))
        return found

    def items(self, n_prompt: int = 9, seed: int = 1) -> list[Item]:
        """Several answers of several tokens, with common beginnings; two answers; a prompt of one token."""
        rng = np.random.default_rng(seed)

        def some(n: int) -> tuple[int, ...]:
            return tuple(rng.integers(0, self.n_vocab, n).tolist())

        a, b, c, d, e, f = some(6)
        answers = (
            Answer((a, b, c, d), (0, 1, 2, 3), 0.5),
            Answer((a, b, e), (1, 2), 0.5),
            Answer((a, b), (0, 1), -0.5),
            Answer((f,), (0,), -0.5),
        )
        two = (Answer(some(3), (0, 1, 2), 1.0), Answer(some(5), (2, 3, 4), -1.0))
        return [
            Item("four", some(n_prompt), answers),
            Item("two", some(n_prompt + 4), two),
            Item("short", some(1), two),
        ]

    def document(self, n: int, first: int, seed: int = 2) -> Document:
        """A random text."""
        return Document(tuple(np.random.default_rng(seed).integers(0, self.n_vocab, n).tolist()), first)


class KnownSurface:
    """Stands for an InterventionDecoder whose margins and divergences are known functions of the choices.

    `effects` and `costs`, [n_layer, n_expert], are what suppressing an expert adds to the margin, and to the divergence
    of a token; promoting it adds half as much, with the other sign. `noise` is the size of a random number that depends
    on the choice alone. `scales` multiply an item's effects.
    """

    def __init__(
        self,
        identity: ModelIdentity,
        effects: Array,
        costs: Array | None = None,
        *,
        noise: float = 0.0,
        scales: Mapping[str, float] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.identity, self.effects, self.noise, self.scales = identity, effects, noise, scales or {}
        self.costs = np.zeros(identity.shape) if costs is None else costs
        self.steerable_layers = list(range(identity.n_layer) if layers is None else layers)
        self.attached: Sequence[BiasFile | None] | None = None
        self.blocks: list[int] = []
        self.texts: list[Document] = []

    def __call__(self, model: Any, items: Any, documents: Any, *, n_steerings: int, **_: Any) -> KnownSurface:
        """Takes the place of the class."""
        self.n_steerings, self.texts = n_steerings, list(documents)
        return self

    def __enter__(self) -> KnownSurface:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def steer_by(self, biases: Sequence[BiasFile | None]) -> None:
        """Keep the choices."""
        self.attached = biases
        self.blocks.append(len(biases))
        self._signs = np.zeros((len(biases), *self.identity.shape))
        for table, bias in zip(self._signs, biases, strict=True):
            for layer, row in (bias.values if bias is not None else {}).items():
                table[layer] = row

    def _sum(self, weights: Array) -> Array:
        size = np.where(self._signs < 0, 1.0, np.where(self._signs > 0, -0.5, 0.0))
        return np.asarray((size * weights).sum(axis=(1, 2)))

    def margins(self, item: Item) -> Array:
        """The known margin, 1.5 without an intervention."""
        numbers = [np.random.default_rng([*signs.ravel().astype(int) + 1]).normal() for signs in self._signs]
        return 1.5 + self.scales.get(item.id, 1.0) * self._sum(self.effects) + self.noise * np.array(numbers)

    def divergences(self, document: Document) -> Array:
        """The known divergence."""
        return document.n * self._sum(self.costs)
