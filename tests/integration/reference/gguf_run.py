"""Our side: a GGUF file under the patched library, everything float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from steermoe_local.llama import capi
from tests.support import low_level, rounding

N_CTX = 64


def float32_context(model: Any, *, capture: bool = False) -> low_level.Context:
    """The tests' context with a float32 cache and one sequence."""
    size = {"n_ctx": N_CTX, "n_batch": N_CTX, "n_ubatch": N_CTX}
    return low_level.Context(model, capture=capture, n_seq_max=1, type_kv=low_level.F32, **size)


class Runner:
    """A model file, a plain context for logits, and one that captures what the routers do."""

    def __init__(self, path: Path) -> None:
        self.model = low_level.open_model(path)
        self.identity = low_level.identity_of(path)
        self.architecture = self.identity.architecture
        self._longest_sum = max(int(t.shape[0]) for t in GGUFReader(path).tensors if len(t.shape) > 1)
        self.plain = float32_context(self.model)
        self.captured = float32_context(self.model, capture=True)

    def close(self) -> None:
        """Free everything."""
        self.plain.close()
        self.captured.close()
        self.model.close()

    def allowance(self, logits: np.ndarray) -> float:
        """Largest difference of two computations of these logits in F32, [T, vocabulary]."""
        return rounding.logits(logits, self.identity.n_layer, max(self._longest_sum, len(logits)))

    def steer(self, layers: dict[int, Any] | None, mode: str = "hard", epsilon: float = 0.01) -> None:
        """Steer both contexts with rows by layer, or stop steering."""
        bias = low_level.native_bias(self.identity, layers, mode, epsilon) if layers is not None else None
        for context in (self.plain, self.captured):
            if bias is None:
                capi.detach(context.ctx)
            else:
                capi.attach(context.ctx, bias)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """[T, vocabulary], one decode of the whole prompt."""
        return self.plain.fresh(tokens)

    def routing(self, tokens: Sequence[int]) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """By layer: router logits [T, experts] before steering, and the selected experts [T, k], ascending."""
        self.captured.seen.clear()
        self.captured.fresh(tokens)
        seen = {name: arrays[-1].reshape(len(tokens), -1) for name, arrays in self.captured.seen.items()}
        layers = sorted(int(name.rpartition("-")[2]) for name in seen if name.startswith("ffn_moe_topk-"))
        z = {i: seen[f"ffn_moe_logits-{i}"] for i in layers}
        if self.architecture == "gpt-oss":  # adds a bias; unsteered, the sum gets another name
            z = {i: seen.get(f"ffn_moe_logits_biased-{i}", seen[f"ffn_moe_probs-{i}"]) for i in layers}
        return z, {i: np.sort(seen[f"ffn_moe_topk-{i}"], axis=1) for i in layers}

    def logits_one_by_one(self, tokens: Sequence[int]) -> np.ndarray:
        """[T, vocabulary], a decode a token."""
        self.plain.clear()
        return np.concatenate([self.plain.decode([token], start=i) for i, token in enumerate(tokens)])
