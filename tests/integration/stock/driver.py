"""Run a model with whatever llama.cpp LLAMA_CPP_LIB_PATH names, and keep every logit. A program of its own:

    python driver.py MODEL OUTPUT.npz [--attach-and-detach BIAS | --beside BIAS]

Tokens are made up, so that models without a vocabulary run too.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np

N_TOKENS = 96
N_SEQUENCES = 4
Row = tuple[int, int, int]  # token, position, sequence


def tokens(n_vocab: int, n: int, seed: int) -> list[int]:
    """Tokens that are the same wherever they are made."""
    return [(seed * 7919 + i * i * 31 + i * 101) % n_vocab for i in range(n)]


class Context:
    """A llama_context and how it is fed."""

    def __init__(self, model: Any, **params: Any) -> None:
        wanted = llama_cpp.llama_context_default_params()
        settings = {"n_ctx": 1024, "n_batch": 512, "n_ubatch": 512, "n_seq_max": N_SEQUENCES + 1, "kv_unified": True}
        for name, value in {**settings, "n_threads": 1, "n_threads_batch": 1, **params}.items():
            setattr(wanted, name, value)
        self.ctx = llama_cpp.llama_init_from_model(model, wanted)
        if not self.ctx:
            raise SystemExit("no context")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def decode(self, rows: Sequence[Row]) -> np.ndarray:
        """Logits of every row of one batch."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for i, (token, position, sequence) in enumerate(rows):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, True
                batch.seq_id[i][0] = sequence
            if llama_cpp.llama_decode(self.ctx, batch):
                raise SystemExit("llama_decode failed")
            logits = llama_cpp.llama_get_logits(self.ctx)
            return np.ctypeslib.as_array(logits, (len(rows), self.n_vocab)).copy()
        finally:
            llama_cpp.llama_batch_free(batch)


@contextmanager
def context(model: Any, **params: Any) -> Any:
    """A context that is freed at the end."""
    opened = Context(model, **params)
    try:
        yield opened
    finally:
        llama_cpp.llama_free(opened.ctx)


def one_batch(c: Context) -> np.ndarray:
    """A prompt at once."""
    return c.decode([(t, i, 0) for i, t in enumerate(tokens(c.n_vocab, N_TOKENS, 1))])


def one_by_one(c: Context) -> np.ndarray:
    """A prompt, then single tokens, as in generation."""
    ids = tokens(c.n_vocab, N_TOKENS, 2)
    start = N_TOKENS - 16
    parts = [c.decode([(t, i, 0) for i, t in enumerate(ids[:start])])]
    parts += [c.decode([(ids[i], i, 0)]) for i in range(start, N_TOKENS)]
    return np.concatenate(parts)


def interleaved(c: Context) -> np.ndarray:
    """Several sequences in one batch, taking turns, then one token of each at a time."""
    ids = [tokens(c.n_vocab, 24, 3 + s) for s in range(N_SEQUENCES)]
    parts = [c.decode([(ids[s][i], i, s) for i in range(16) for s in range(N_SEQUENCES)])]
    parts += [c.decode([(ids[s][i], i, s) for s in range(N_SEQUENCES)]) for i in range(16, 24)]
    return np.concatenate(parts)


@contextmanager
def loaded_bias(path: str) -> Any:
    """(the library, a bias of the file)."""
    lib = llama_cpp.llama_cpp._lib
    lib.steermoe_bias_load.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)]
    lib.steermoe_attach.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32]
    lib.steermoe_attach_seq.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32]
    lib.steermoe_detach.argtypes = [ctypes.c_void_p]
    lib.steermoe_bias_free.argtypes = [ctypes.c_void_p]
    lib.steermoe_bias_free.restype = None
    bias = ctypes.c_void_p()
    if lib.steermoe_bias_load(path.encode(), ctypes.byref(bias)):
        raise SystemExit("the bias cannot be loaded")
    yield lib, bias
    lib.steermoe_bias_free(bias)


def clear(c: Context) -> None:
    """Empty the KV cache."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(c.ctx), True)


def attach_and_detach(c: Context, path: str) -> None:
    """Steer the context, then one sequence differently, decode so that both graphs were there, and stop steering."""
    with loaded_bias(path) as (lib, bias):
        if lib.steermoe_attach(c.ctx, bias, 0):
            raise SystemExit("the bias cannot be attached")
        one_batch(c)
        clear(c)
        if lib.steermoe_attach_seq(c.ctx, 1, None, 0):
            raise SystemExit("a sequence cannot be left unsteered")
        interleaved(c)
        if lib.steermoe_detach(c.ctx):
            raise SystemExit("steermoe_detach failed")
    clear(c)


def beside(c: Context, path: str) -> None:
    """Steer the last sequence, decode all so that the graph of both was there, and leave the last one alone then."""
    with loaded_bias(path) as (lib, bias):
        if lib.steermoe_attach_seq(c.ctx, N_SEQUENCES, bias, 0):
            raise SystemExit("the bias cannot be attached")
    c.decode([(t, 0, s) for s, t in enumerate(tokens(c.n_vocab, N_SEQUENCES + 1, 9))])
    clear(c)


def main() -> None:
    """Command line."""
    path, output, *rest = sys.argv[1:]
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise SystemExit(f"{path}: cannot be loaded")
    found = {"patched": np.asarray(hasattr(llama_cpp.llama_cpp._lib, "steermoe_abi_version"))}
    ways = {
        "one batch": (one_batch, {}),
        "small ubatches": (one_batch, {"n_ubatch": 16}),
        "one by one": (one_by_one, {}),
        "interleaved sequences": (interleaved, {}),
        "no flash attention": (one_batch, {"flash_attn_type": 0}),
        "two threads": (one_batch, {"n_threads": 2, "n_threads_batch": 2}),
    }
    for name, (run, settings) in ways.items():
        with context(model, **settings) as c:
            if rest:
                {"--attach-and-detach": attach_and_detach, "--beside": beside}[rest[0]](c, rest[1])
            found[name] = run(c)
    llama_cpp.llama_model_free(model)
    np.savez(output, allow_pickle=False, **found)


if __name__ == "__main__":
    main()
