"""A process that computes margins under random interventions, in batches or one by one.

    python attribution_worker.py MODEL --threads N --prompt N --answer N [--steer answer|all]

`Worker` in workers.py is the other end. With --steer the interventions share batches; without it SteeredLlama computes
them one after the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from worker import memory_use, serve

from steermoe_local import BiasFile, SteeredLlama
from steermoe_local.attribution.decoding import InterventionDecoder
from steermoe_local.attribution.design import Design, choose_candidates, default_rate
from steermoe_local.attribution.items import Answer, Item
from steermoe_local.evaluation.tasks.neutral_text import Document
from steermoe_local.llama import capi
from steermoe_local.llama.loaded_model import loaded_identity
from steermoe_local.llama.steered_llama import native_bias
from steermoe_local.maps.expert_map import ExpertMap

N_CANDIDATES = 32  # and as many controls: the command's default
N_BLOCK = 64  # draws of a block, as in `attribute`
N_PIECE = 32  # tokens of a piece of plain neutral text, as in `attribute`


class Interventions:
    """A model, an item, and random draws of its experts."""

    def __init__(self, path: Path, n_threads: int, n_prompt: int, n_answer: int, steer: Any) -> None:
        n_ctx = n_prompt + n_answer + 8
        self.llama = SteeredLlama(
            path, n_ctx=n_ctx, n_batch=512, n_threads=n_threads, logits_all=True, flash_attn="auto"
        )
        model: Any = self.llama._model
        self.identity = loaded_identity(model)
        rng = np.random.default_rng(1)
        rd = rng.uniform(-1, 1, self.identity.shape)
        expert_map = ExpertMap(self.identity, "random", rd, created="2025-01-31T12:00:00Z", tool="benchmark")
        n_candidates = min(N_CANDIDATES, rd.size // 2)  # the toy has fewer
        candidates = choose_candidates(expert_map, list(range(self.identity.n_layer)), n_candidates, 0)
        rate = default_rate("suppress", candidates, self.identity)
        self.design = Design("suppress", candidates, self.identity, rate, 0)

        def some(n: int) -> tuple[int, ...]:
            return tuple(rng.integers(0, 256, n).tolist())

        scored = tuple(range(n_answer))
        answers = (Answer(some(n_answer), scored, 1.0), Answer(some(n_answer), scored, -1.0))
        self.item = Item("item", some(n_prompt), answers)
        self.document = Document(some(N_PIECE), 0)
        self.decoder = (
            InterventionDecoder(
                model, [self.item], [self.document], n_steerings=N_BLOCK, steer=steer, n_threads=n_threads
            )
            if steer
            else None
        )

    def _biases(self, n: int) -> list[BiasFile | None]:
        draws = self.design.draws(0, N_BLOCK)[:n]
        return [BiasFile.from_signs(self.design.signs(draw), self.identity) for draw in draws]

    def batched(self, n: int) -> dict[str, Any]:
        """Margins of the first `n` draws, in one block."""
        assert self.decoder is not None
        decoder = self.decoder

        def compute() -> npt.NDArray[np.float64]:
            decoder.steer_by(self._biases(n))
            return decoder.margins(self.item)

        return _timed(compute)

    def text(self, n: int) -> dict[str, Any]:
        """Divergences of a piece of neutral text under the first `n` draws."""
        assert self.decoder is not None
        decoder = self.decoder

        def compute() -> npt.NDArray[np.float64]:
            decoder.steer_by(self._biases(n))
            return decoder.divergences(self.document)

        return {**_timed(compute), "n_tokens": self.document.n}

    def alone(self, n: int) -> dict[str, Any]:
        """The same margins with steered prompts by SteeredLlama, one draw after the other; the answers share it."""
        return _timed(lambda: np.array([self._margin(bias) for bias in self._biases(n)]))

    def kept(self, n: int, n_together: int = 512) -> dict[str, Any]:
        """The same with the unsteered prompt kept in memory, which SteeredLlama's interface does not offer.

        The prompt is read `n_together` tokens at a time.
        """

        def compute() -> npt.NDArray[np.float64]:
            self.llama.set_bias(None)
            for start in range(0, len(self.item.prompt) - 1, n_together):
                self._read(self.item.prompt[:-1][start : start + n_together])
            found = []
            for bias in self._biases(n):
                assert bias is not None
                capi.attach(self.llama._ctx.ctx, native_bias(bias))
                found.append(self._answers())
            return np.array(found)

        return _timed(compute)

    def _margin(self, bias: BiasFile | None) -> float:
        self.llama.set_bias(bias)
        self._read(self.item.prompt[:-1])
        return self._answers()

    def _read(self, tokens: Sequence[int]) -> None:
        """Read the prompt without the logits of its tokens, which nobody needs."""
        self.llama._logits_all = False
        self.llama.eval(list(tokens))
        self.llama._logits_all = True

    def _answers(self) -> float:
        """The margin after the prompt that is in memory."""
        last = len(self.item.prompt) - 1
        total = 0.0
        for answer in self.item.answers:
            self.llama.n_tokens = last  # eval forgets what comes after
            self.llama.eval([self.item.prompt[last], *answer.tokens[:-1]])
            logits = np.asarray(self.llama.scores[last : self.llama.n_tokens], dtype=np.float64)
            shifted = logits - logits.max(axis=1, keepdims=True)
            logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            total += answer.sign * float(logprobs[np.arange(len(answer.tokens)), answer.tokens].mean())
        return total


def _timed(compute: Callable[[], npt.NDArray[np.float64]]) -> dict[str, Any]:
    cpu, wall = time.process_time(), time.perf_counter()
    values = compute()
    return {"cpu": time.process_time() - cpu, "seconds": time.perf_counter() - wall, "values": values.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute margins under random interventions on request.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--answer", type=int, required=True)
    parser.add_argument("--steer", choices=["answer", "all"])
    arguments = parser.parse_args()
    one = Interventions(arguments.model, arguments.threads, arguments.prompt, arguments.answer, arguments.steer)
    handlers = {"batched": one.batched, "text": one.text} if arguments.steer else {"alone": one.alone, "kept": one.kept}
    serve({**handlers, "memory": memory_use})


if __name__ == "__main__":
    main()
