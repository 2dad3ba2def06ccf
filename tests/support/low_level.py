"""A llama.cpp context of the tests' own: batches row by row, and the routers' tensors copied out of the graph."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import capi
from steermoe_local.model_files.model_info import model_info

Row = tuple[int, int, int, bool]  # token, position, sequence, output?

F32, I32 = 0, 26  # enum ggml_type


class GGMLTensor(ctypes.Structure):
    """struct ggml_tensor (ggml.h of the pinned tree), as far as it is read here."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )

    def array(self) -> npt.NDArray[Any]:
        """A copy of the values, slowest dimension first. ffn_moe_topk is a view of wider rows: strides count."""
        shape, strides = self.ne[::-1], self.nb[::-1]
        span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 4
        memory = (ctypes.c_char * span).from_address(self.data)
        dtype = {F32: np.float32, I32: np.int32}[self.type]
        return np.ndarray(tuple(shape), dtype, memory, strides=tuple(strides)).copy()


def lib() -> Any:
    """The `llama_cpp` module over the patched libraries."""
    return capi.llama_cpp()


def internals() -> Any:
    """`llama_cpp._internals`; llama.cpp's log is off."""
    lib()  # first: it decides which libraries are loaded
    from llama_cpp import _internals

    set_verbose(False)
    return _internals


def set_verbose(verbose: bool) -> None:
    """Let llama.cpp's log go to stderr, or nowhere."""
    from llama_cpp import _logger

    _logger.set_verbose(verbose)


def open_model(path: Path) -> Any:
    """llama_cpp's `LlamaModel`; free it with close()."""
    params = lib().llama_model_default_params()
    params.n_gpu_layers = 0
    return internals().LlamaModel(path_model=str(path), params=params, verbose=False)


class Context:
    """One context.

    With `capture`, `seen` holds every router tensor of every ubatch: {name: [array, ...]}, and `ops` how it was made.
    """

    def __init__(
        self,
        model: Any,
        *,
        capture: bool = False,
        recorder: capi.NativeRecorder | None = None,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_seq_max: int = 8,
        type_kv: int | None = None,
        kv_unified: bool = True,
    ) -> None:
        self.model = model
        self.n_batch = n_batch
        self.seen: dict[str, list[npt.NDArray[Any]]] = {}
        self.ops: dict[str, list[int]] = {}
        params = lib().llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_ubatch
        params.n_seq_max, params.kv_unified = n_seq_max, kv_unified
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = 0
        params.no_perf = True
        if type_kv is not None:
            params.type_k = params.type_v = type_kv
        if recorder is not None:
            recorder.install(params)
        if capture:
            self._callback = type(params.cb_eval)(self._see)  # kept: C holds the address as long as the context lives
            params.cb_eval = self._callback
        self._context = internals().LlamaContext(model=model, params=params, verbose=False)
        self.ctx = self._context.ctx

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the context."""
        self._context.close()

    def _see(self, tensor: int, ask: bool, _: object) -> bool:
        t = GGMLTensor.from_address(tensor)
        wanted: bool = t.name.startswith(b"ffn_moe_") and t.type in (F32, I32) and t.ne[3] == 1
        if wanted and not ask:
            self.seen.setdefault(t.name.decode(), []).append(t.array())
            self.ops.setdefault(t.name.decode(), []).append(t.op)
        return True if not ask else wanted

    def decode_rows(self, rows: Sequence[Row]) -> npt.NDArray[np.float32]:
        """One llama_decode; the logits of the output rows, [outputs, vocabulary]."""
        llama = lib()
        batch = llama.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for i, (token, position, sequence, output) in enumerate(rows):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = output
            assert llama.llama_decode(self.ctx, batch) == 0
        finally:
            llama.llama_batch_free(batch)
        n_vocab = self.model.n_vocab()
        places = [i for i, row in enumerate(rows) if row[3]]
        rows_of = [llama.llama_get_logits_ith(self.ctx, i) for i in places]
        if not all(rows_of):
            return np.empty((0, n_vocab), np.float32)  # a recorder stopped the graph: there are none
        return np.array([np.ctypeslib.as_array(row, (n_vocab,)).copy() for row in rows_of], np.float32)

    def decode(self, tokens: Iterable[int], start: int = 0) -> npt.NDArray[np.float32]:
        """Tokens of sequence 0 from position `start`; every one is an output."""
        return self.decode_rows([(token, start + i, 0, True) for i, token in enumerate(tokens)])

    def remove(self, sequence: int) -> None:
        """Empty the KV cache of one sequence."""
        assert lib().llama_memory_seq_rm(lib().llama_get_memory(self.ctx), sequence, -1, -1)

    def clear(self) -> None:
        """Empty the KV cache."""
        lib().llama_memory_clear(lib().llama_get_memory(self.ctx), True)

    def fresh(self, tokens: Iterable[int]) -> npt.NDArray[np.float32]:
        """`decode` on an empty KV cache."""
        self.clear()
        return self.decode(tokens)


def identity_of(path: Path) -> ModelIdentity:
    """Identity of a model file."""
    return model_info(path).require_moe()


def native_bias(
    identity: ModelIdentity,
    layers: dict[int, Any],
    mode: str = "hard",
    epsilon: float = 0.01,
    cap: float | None = None,
) -> capi.NativeBias:
    """A native bias of rows by layer."""
    return capi.NativeBias.from_values(
        architecture=identity.architecture,
        router_sha256=identity.router_sha256,
        mode=mode,
        epsilon=epsilon,
        cap=cap,
        n_layer=identity.n_layer,
        n_expert=identity.n_expert,
        n_expert_used=identity.n_expert_used,
        layers={layer: np.asarray(row, np.float32).tolist() for layer, row in layers.items()},
    )


def random_signs(rng: np.random.Generator, n_expert: int, k: int, n_plus: int, n_minus: int) -> npt.NDArray[np.float32]:
    """A row of signs that the hard rule allows."""
    assert n_plus <= k
    assert n_plus + n_minus <= n_expert
    row = np.zeros(n_expert, np.float32)
    places = rng.permutation(n_expert)
    row[places[:n_plus]] = 1
    row[places[n_plus : n_plus + n_minus]] = -1
    return row
