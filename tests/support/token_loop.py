"""Reads tokens in a context of its own, each under the bias that it is told; nothing of the engine is in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from steermoe_local import BiasFile
from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import capi
from steermoe_local.llama.steered_llama import native_bias
from tests.support.low_level import Context

Biases = Sequence[BiasFile | None]


class Read(NamedTuple):
    """Logits of the outputs, [n, n_vocab], and the experts of all tokens, [n, n_layer, top_k]."""

    logits: npt.NDArray[np.float32]
    experts: npt.NDArray[np.int32]


class TokenLoop:
    """A context over llama_cpp's `LlamaModel`, whose rows have the biases that tokens ask for. A context manager."""

    def __init__(self, model: Any, identity: ModelIdentity) -> None:
        self._recorder = capi.NativeRecorder(model.model, 1, identity.shape)
        self._context = Context(model, recorder=self._recorder, n_ctx=256, n_seq_max=1, kv_unified=False)
        self._recorder.bind(self._context.ctx)

    def __enter__(self) -> TokenLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()
        self._recorder.close()

    def one_by_one(self, tokens: Sequence[int], biases: Biases, n_first: int) -> Read:
        """The first tokens in one decode, of which the last is an output, then each in one of its own."""
        self._context.clear()
        parts = [self._decode(tokens, biases, 0, n_first, 1)]
        parts += [self._decode(tokens, biases, i, i + 1, 1) for i in range(n_first, len(tokens))]
        return Read(np.concatenate([one.logits for one in parts]), np.concatenate([one.experts for one in parts]))

    def at_once(self, tokens: Sequence[int], biases: Biases) -> Read:
        """All tokens in one decode, all of them outputs."""
        self._context.clear()
        return self._decode(tokens, biases, 0, len(tokens), len(tokens))

    def _decode(self, tokens: Sequence[int], biases: Biases, start: int, end: int, n_outputs: int) -> Read:
        own = list(biases[start:end])
        steering = list(dict.fromkeys(bias for bias in own if bias is not None))
        for row, bias in enumerate(steering):
            capi.attach_row(self._context.ctx, row, native_bias(bias), False)
        capi.set_token_rows(self._context.ctx, [-1 if bias is None else steering.index(bias) for bias in own])
        self._recorder.set_trace([True] * len(own))
        logits = self._context.decode_rows([(tokens[i], i, 0, i >= end - n_outputs) for i in range(start, end)])
        return Read(logits, self._recorder.trace().experts)
