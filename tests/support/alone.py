"""Greedy answers of a model alone, one at a time, and whether rounding may decide them otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steermoe_local import BiasFile, SteeredLlama
from steermoe_local.generation.engine import Engine, FinishEvent, Request, Sampling
from steermoe_local.llama import capi
from steermoe_local.llama.steered_llama import native_bias
from tests.support import rounding
from tests.support.low_level import F32, Context
from tests.support.near_ties import near_ties

N_CTX = 512
Tokens = Sequence[int]


@dataclass(frozen=True)
class LoneAnswer:
    """An answer. `certain`: no expert and no token of it is so near to another that a batch could decide otherwise."""

    text: str
    tokens: tuple[int, ...]
    certain: bool


class Alone:
    """Answers of the embedded model in F32 (`tiny_f32_path`), computed here, each on an empty memory.

    With weights and cache in F32 two batches differ by the rounding of sums alone, so near ties are rare. A context
    manager.
    """

    def __init__(self, path: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._llama = SteeredLlama(path, n_ctx=64, n_batch=64, n_threads=1)
        self._stack.callback(self._llama.close)
        options: dict[str, Any] = {"n_ctx": N_CTX, "n_slots": 1, "n_threads": 1, "type_k": F32, "type_v": F32}
        self._engine = self._stack.enter_context(Engine(self._llama, **options))
        self._context = self._stack.enter_context(
            Context(self._llama._model, capture=True, n_ctx=N_CTX, n_seq_max=1, type_kv=F32)
        )
        self._found: dict[tuple[Any, ...], LoneAnswer] = {}

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def chat(
        self, messages: Sequence[dict[str, Any]], bias: BiasFile | None, max_tokens: int, banned: Tokens = ()
    ) -> LoneAnswer:
        """The answer to a conversation, without the tokens that are banned."""
        renderer = self._engine.renderer
        return self.answer(renderer.rendered(renderer.chat_text(messages)).tokens, bias, max_tokens, banned)

    def complete(self, prompt: str, bias: BiasFile | None, max_tokens: int, banned: Tokens = ()) -> LoneAnswer:
        """The continuation of a text."""
        tokens = self._engine.renderer.tokenize(prompt, add_special=True, parse_special=True)
        return self.answer(tokens, bias, max_tokens, banned)

    def answer(self, prompt: Tokens, bias: BiasFile | None, max_tokens: int, banned: Tokens = ()) -> LoneAnswer:
        """The continuation of tokens."""
        asked = (tuple(prompt), None if bias is None else bias.key, max_tokens, tuple(banned))
        if asked not in self._found:
            self._found[asked] = self._computed(list(prompt), bias, max_tokens, list(banned))
        return self._found[asked]

    def is_certain(self, messages: Sequence[dict[str, Any]], tokens: Tokens, bias: BiasFile | None) -> bool:
        """Whether no expert and no token of an answer, which a grammar may have bound, is near a tie.

        Where the grammar chose another token than the model would have, the others that it allows are few: they are not
        known here, and ties among them not seen.
        """
        renderer = self._engine.renderer
        prompt = renderer.rendered(renderer.chat_text(messages)).tokens
        return self._is_certain(list(prompt), list(tokens), bias, [], greedy=False)

    def _computed(self, prompt: list[int], bias: BiasFile | None, max_tokens: int, banned: list[int]) -> LoneAnswer:
        self._engine.forget()
        sampling = Sampling(temperature=0, logit_bias=dict.fromkeys(banned, float("-inf")))
        text, tokens, reason = "", [], ""
        request = Request(prompt, bias, sampling, max_tokens)
        for _, event in self._engine.generate(request):
            if isinstance(event, FinishEvent):
                reason = event.reason
                if event.end is not None:
                    tokens.append(event.end.token)
                continue
            text += event.text
            if event.token >= 0:
                tokens.append(event.token)
        assert reason in ("stop", "length")
        return LoneAnswer(text, tuple(tokens), self._is_certain(prompt, tokens, bias, banned))

    def _is_certain(
        self, prompt: list[int], tokens: list[int], bias: BiasFile | None, banned: list[int], greedy: bool = True
    ) -> bool:
        """Whether no row's experts and no drawn token are near a tie, by the model's own tensors in one batch."""
        context, identity = self._context, self._engine.identity
        assert identity is not None
        context.clear()
        context.seen.clear()
        capi.attach_sequence(context.ctx, 0, None if bias is None else native_bias(bias))
        logits = context.decode((prompt + tokens)[:-1])
        ties = 0
        for layer in range(identity.n_layer):
            name = f"ffn_moe_logits_steered-{layer}"
            (z,) = context.seen[name if name in context.seen else f"ffn_moe_logits-{layer}"]
            rows = z.reshape(-1, identity.n_expert)
            ties += int(near_ties(rows, identity.n_expert_used, layer, rounding.TINY["n_sum"]).sum())
        rows = logits[len(prompt) - 1 :]
        drawn = rows[np.arange(len(tokens)), tokens]
        for row, own in zip(rows, drawn, strict=True):
            others = np.sort(np.delete(row, banned))[::-1]
            bound = np.sqrt(2) * rounding.logits(row, **rounding.TINY)
            is_first = others[0] - own <= bound
            assert is_first or not greedy, "the answer alone is not greedy"
            ties += int(is_first and (np.abs(others - own) <= bound).sum() > 1)
        return not ties
