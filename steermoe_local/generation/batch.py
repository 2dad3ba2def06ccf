"""Greedy answers to many prompts at once, as parallel sequences of one context under one steering."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np

from ..errors import UsageError
from ..llama import capi
from ..llama.rendering import Renderer
from ..llama.steered_llama import SteeredLlama, native_bias
from ..pairs.pairs import Side
from ..steering.bias_file import BiasFile

__all__ = ["BatchGenerator"]


class BatchGenerator:
    """Answers lists of prompts greedily, many sequences in one llama_decode.

    A context manager over a context of its own on the weights of a `SteeredLlama`; that object's own context and
    steering are not touched. Every call starts with empty memory, so nothing is shared between steerings.
    """

    def __init__(
        self,
        model: SteeredLlama,
        *,
        n_parallel: int = 32,
        n_ctx: int = 8192,
        n_batch: int = 512,
        n_threads: int | None = None,
    ) -> None:
        """`n_ctx` tokens are shared by up to `n_parallel` sequences. Raises UsageError, NativeError."""
        if not 1 <= n_parallel <= min(n_batch, 256):
            raise UsageError(f"n_parallel: {n_parallel} is not from 1 to {min(n_batch, 256)} (n_batch, at most 256)")
        lib = capi.llama_cpp()
        self._model = model._model
        self._renderer = Renderer(self._model)
        self._n_parallel = n_parallel
        self._n_ctx = n_ctx
        self._stack = contextlib.ExitStack()
        params = capi.parallel_context_params(n_ctx, n_batch, n_parallel, n_threads)
        self._ctx = capi.new_context(self._model.model, params)
        self._stack.callback(lib.llama_free, self._ctx)
        self._batch = lib.llama_batch_init(n_batch, 0, 1)
        self._stack.callback(lib.llama_batch_free, self._batch)
        self._n_batch = n_batch

    def __enter__(self) -> BatchGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the context."""
        self._stack.close()

    def set_bias(self, bias: BiasFile | None) -> None:
        """Steer the following calls. Raises ModelMismatchError, ModelError."""
        if bias is None:
            capi.detach(self._ctx)
        else:
            capi.attach(self._ctx, native_bias(bias))

    def answer(
        self,
        prompts: Sequence[Side],
        *,
        n_predict: int = 48,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Greedy answers of at most `n_predict` tokens, in the prompts' order.

        Chat messages go through the model's template. `progress` gets the number of prompts just done. Raises
        PairsError (no template), UsageError (a prompt that does not fit n_ctx).
        """
        tokenized = [
            self._renderer.tokenize(
                self._renderer.text(prompt, generation_prompt=True), add_special=isinstance(prompt, str)
            )
            for prompt in prompts
        ]
        answers: list[str] = []
        while len(answers) < len(tokenized):
            group = self._next_group(tokenized, len(answers), n_predict)
            answers += [self._detokenize(tokens) for tokens in self._generate(group, n_predict)]
            if progress:
                progress(len(group))
        return answers

    def _next_group(self, prompts: Sequence[list[int]], first: int, n_predict: int) -> Sequence[list[int]]:
        room, last = self._n_ctx, first
        while last < len(prompts) and last - first < self._n_parallel:
            room -= len(prompts[last]) + n_predict
            if room < 0:
                break
            last += 1
        if last == first:
            need = len(prompts[first]) + n_predict
            raise UsageError(
                f"prompt {first} with its answer needs {need} tokens, but n_ctx is {self._n_ctx}; raise it"
            )
        return prompts[first:last]

    def _generate(self, prompts: Sequence[list[int]], n_predict: int) -> list[list[int]]:
        lib = capi.llama_cpp()
        lib.llama_memory_clear(lib.llama_get_memory(self._ctx), True)
        answers: list[list[int]] = [[] for _ in prompts]
        # (token, position, sequence, wants logits)
        rows = [
            (token, position, sequence, position == len(tokens) - 1)
            for sequence, tokens in enumerate(prompts)
            for position, token in enumerate(tokens)
        ]
        for _ in range(n_predict):
            chosen = self._decode(rows)
            rows = []
            for sequence, token in chosen.items():
                if lib.llama_vocab_is_eog(self._model.vocab, token):
                    continue
                position = len(prompts[sequence]) + len(answers[sequence])
                answers[sequence].append(token)
                rows.append((token, position, sequence, True))
            if not rows:
                break
        return answers

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Decode tokens; returns the likeliest next token of each sequence that wanted logits."""
        lib = capi.llama_cpp()
        n_vocab = self._model.n_vocab()
        chosen: dict[int, int] = {}
        for start in range(0, len(rows), self._n_batch):
            part = rows[start : start + self._n_batch]
            capi.decode(self._ctx, self._batch, part)
            for index, (_, _, sequence, wanted) in enumerate(part):
                if wanted:
                    logits = lib.llama_get_logits_ith(self._ctx, index)
                    chosen[sequence] = int(np.argmax(np.ctypeslib.as_array(logits, shape=(n_vocab,))))
        return chosen

    def _detokenize(self, tokens: Sequence[int]) -> str:
        data: bytes = self._model.detokenize(list(tokens), special=False)
        return data.decode("utf-8", "replace")
