"""ctypes binding of native/include/steermoe.h, with Python types and exceptions. The header documents the functions."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ModelError, NativeError, UsageError
from ..model_files.model_info import check_loadable
from .cpu import useful_threads
from .library import llama_cpp, take_log_error
from .native_recorder import NativeRecorder, Trace
from .signatures import BiasStruct, LayerStruct, check, lib, of_tokens

__all__ = [
    "MAX_ROWS",
    "LayerInfo",
    "NativeBias",
    "NativeRecorder",
    "Trace",
    "attach",
    "attach_row",
    "attach_sequence",
    "decode",
    "detach",
    "detach_row",
    "detach_sequence",
    "layer_info",
    "llama_cpp",
    "loading",
    "logits",
    "new_context",
    "parallel_context_params",
    "router_sha256",
    "set_cache_options",
    "set_token_rows",
    "take_log_error",
    "unsteered_environment",
]

FORCE_ROUTER = 1
MAX_ROWS = 1024  # steermoe.h: STEERMOE_MAX_ROWS
MAX_SEQUENCES = 256  # llama.cpp: LLAMA_MAX_SEQ
INVALID_BATCH = -1  # llama.h: llama_decode
MODES = ("hard", "soft", "capped")  # steermoe.h: steermoe_mode
GATING = ("none", "softmax", "sigmoid", "softmax_weight", "sqrt_softplus")


@dataclass(frozen=True)
class LayerInfo:
    """How a layer routes, according to the graph that the context built (steermoe_get_layer_info)."""

    gating: str
    n_expert: int
    n_expert_used: int
    selection_bias: bool
    expert_groups: bool
    steerable: bool
    steered: bool
    reason: str


class NativeBias:
    """A `struct steermoe_bias`, made from values or loaded from a file; freed with the object."""

    def __init__(self, handle: ctypes.c_void_p) -> None:
        self._handle = handle

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NativeBias:
        """Read a bias file (steermoe_bias_load). Raises FormatError."""
        handle = ctypes.c_void_p()
        check(lib().steermoe_bias_load(os.fsencode(path), ctypes.byref(handle)))
        return cls(handle)

    @classmethod
    def from_values(
        cls,
        *,
        architecture: str,
        router_sha256: str,
        mode: str,
        epsilon: float,
        n_layer: int,
        n_expert: int,
        n_expert_used: int,
        layers: Mapping[int, Sequence[float]],
        cap: float | None = None,
    ) -> NativeBias:
        """Make one from rows of [n_expert] values by layer (steermoe_bias_init). Raises FormatError.

        `cap` is for mode "capped".
        """
        info = BiasStruct(
            architecture=architecture.encode(),
            router_sha256=router_sha256.encode(),
            mode=MODES.index(mode),
            epsilon=epsilon,
            cap=0.0 if cap is None else cap,
            n_layer=n_layer,
            n_expert=n_expert,
            n_expert_used=n_expert_used,
        )
        handle = ctypes.c_void_p()
        check(lib().steermoe_bias_init(ctypes.byref(info), ctypes.byref(handle)))
        bias = cls(handle)
        for layer, values in layers.items():
            row = (ctypes.c_float * len(values))(*values)
            check(lib().steermoe_bias_set_layer(handle, layer, row, len(values)))
        return bias

    def info(self) -> dict[str, Any]:
        """The fields of `struct steermoe_bias_info`."""
        info = BiasStruct()
        lib().steermoe_bias_get_info(self._handle, ctypes.byref(info))
        values = {name: getattr(info, name) for name, _ in BiasStruct._fields_}
        return {k: v.decode("utf-8", "replace") if isinstance(v, bytes) else v for k, v in values.items()}

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            lib().steermoe_bias_free(self._handle)


@contextmanager
def unsteered_environment() -> Iterator[None]:
    """Make contexts inside ignore STEERMOE_BIAS, which is for programs without an argument for steering."""
    named = os.environ.pop("STEERMOE_BIAS", None)
    try:
        yield
    finally:
        if named is not None:
            os.environ["STEERMOE_BIAS"] = named


@contextmanager
def loading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn llama_cpp's failure to load the model at `path` into a ModelError with llama.cpp's own reason.

    What the headers show to be impossible is refused before llama.cpp sees it, which answers some of it by ending the
    process.
    """
    check_loadable(path)
    take_log_error()  # older failures are not this model's
    try:
        yield
    except ValueError as error:
        reason = take_log_error() or error
        raise ModelError(f"{path}: llama.cpp cannot load it ({reason}); check the file with steermoe info") from None


def parallel_context_params(n_ctx: int, n_batch: int, n_seq_max: int, n_threads: int | None) -> Any:
    """`llama_context_params` for up to `n_seq_max` sequences that share `n_ctx` tokens.

    n_threads None: as many as the model is worth (`model_threads`), decided by `new_context`. Raises UsageError for
    more tokens than 32 bits count.
    """
    if n_ctx >= 2**31:
        raise UsageError(f"n_ctx: {n_ctx} is more than llama.cpp can count; lower it")
    params = llama_cpp().llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = params.n_ubatch = n_batch
    params.n_seq_max = n_seq_max
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = n_threads or 0
    params.flash_attn_type = 0
    params.no_perf = True
    return params


def set_cache_options(
    params: Any, type_k: int | None, type_v: int | None, flash_attn: bool | Literal["auto"] | None
) -> None:
    """Set the KV cache's types and flash attention in `llama_context_params`; None leaves a field as it is."""
    if flash_attn is not None:
        params.flash_attn_type = -1 if flash_attn == "auto" else int(flash_attn)  # llama.h: enum llama_flash_attn_type
    if type_k is not None:
        params.type_k = type_k
    if type_v is not None:
        params.type_v = type_v


def decode(ctx: Any, batch: Any, rows: Sequence[tuple[int, int, int, bool]]) -> None:
    """llama_decode of rows (token, position, sequence, output?) through a `llama_batch` that holds as many.

    Raises NativeError.
    """
    batch.n_tokens = len(rows)
    for index, (token, position, sequence, output) in enumerate(rows):
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = output
    take_log_error()  # older failures are not this one's
    status = llama_cpp().llama_decode(ctx, batch)
    if status == INVALID_BATCH:
        raise NativeError(f"llama_decode refuses the batch: {take_log_error() or 'no reason given'}", status)
    if status != 0:
        raise NativeError(f"llama_decode failed with {status}; lower n_batch or change n_ctx", status)


def logits(ctx: Any, row: int, n_vocab: int) -> Any:
    """The logits of a row of the last decode, a buffer of `n_vocab` floats, valid until the next decode.

    np.ctypeslib.as_array would take several times as long, for each token. Raises NativeError.
    """
    found = llama_cpp().llama_get_logits_ith(ctx, row)
    if not found:
        raise NativeError("llama.cpp gave no logits for a token; report this")
    return (ctypes.c_float * n_vocab).from_address(ctypes.addressof(found.contents))


def model_threads(model: Any) -> int:
    """Threads to compute with on a `llama_model` where nobody says how many (`cpu.useful_threads`)."""
    module = llama_cpp()

    def number(key: str) -> int:
        text = ctypes.create_string_buffer(64)
        n = module.llama_model_meta_val_str(model, key.encode(), text, len(text))
        return int(text.value) if n > 0 and text.value.isdigit() else 0

    name = ctypes.create_string_buffer(64)
    module.llama_model_meta_val_str(model, b"general.architecture", name, len(name))
    architecture = name.value.decode("utf-8", "replace")
    n_expert, n_used = number(f"{architecture}.expert_count"), number(f"{architecture}.expert_used_count")
    n_bytes = int(module.llama_model_size(model))  # nearly all of it are experts
    return useful_threads(n_bytes * n_used // n_expert if 0 < n_used <= n_expert else n_bytes)


def new_context(model: Any, params: Any) -> Any:
    """Make an unsteered `llama_context` on a `llama_model`; the caller frees it. Raises NativeError."""
    take_log_error()  # older failures are not this context's
    if params.n_threads <= 0:
        params.n_threads = params.n_threads_batch = model_threads(model)
    with unsteered_environment():
        ctx = llama_cpp().llama_init_from_model(model, params)
    if not ctx:
        reason = take_log_error() or "no reason given"
        raise NativeError(f"llama.cpp cannot make a context ({reason}); lower n_ctx or n_batch, or see --verbose")
    return ctx


def attach(ctx: Any, bias: NativeBias, force: bool = False) -> None:
    """Steer a `llama_context`: its sequences without steering of their own (steermoe_attach).

    Raises ModelMismatchError, ModelError, NativeError.
    """
    check(lib().steermoe_attach(ctx, bias._handle, FORCE_ROUTER if force else 0))


def detach(ctx: Any) -> None:
    """Stop steering a `llama_context`, all its sequences and its rows (steermoe_detach)."""
    check(lib().steermoe_detach(ctx))


def attach_sequence(ctx: Any, sequence: int, bias: NativeBias | None, force: bool = False) -> None:
    """Steer one sequence of a `llama_context`, None: leave it unsteered (steermoe_attach_seq).

    Quick: a server may call it for every request. The sequence's memory must be empty.
    Raises ModelMismatchError, ModelError, NativeError.
    """
    handle = bias._handle if bias else None
    check(lib().steermoe_attach_seq(ctx, sequence, handle, FORCE_ROUTER if force else 0))


def detach_sequence(ctx: Any, sequence: int) -> None:
    """Give a sequence the steering of its context again (steermoe_detach_seq). Raises NativeError."""
    check(lib().steermoe_detach_seq(ctx, sequence))


def attach_row(ctx: Any, row: int, bias: NativeBias, force: bool = False) -> None:
    """Attach a bias to a row of a `llama_context`, below MAX_ROWS, that tokens can then name (steermoe_row_attach).

    Raises ModelMismatchError, ModelError, NativeError.
    """
    check(lib().steermoe_row_attach(ctx, row, bias._handle, FORCE_ROUTER if force else 0))


def detach_row(ctx: Any, row: int) -> None:
    """Take the bias off a row of a `llama_context` (steermoe_row_detach). Raises NativeError."""
    check(lib().steermoe_row_detach(ctx, row))


def set_token_rows(ctx: Any, rows: Sequence[int] | npt.NDArray[np.int32]) -> None:
    """Say which row steers each token of the next llama_decode, -1: unsteered (steermoe_set_token_rows).

    Valid for one decode; empty: the steering of the tokens' sequences. Raises NativeError for a row without a bias.
    """
    _held, address, n = of_tokens(rows, "i")
    check(lib().steermoe_set_token_rows(ctx, address, n))


def layer_info(ctx: Any, layer: int) -> LayerInfo:
    """How a layer of a `llama_context` routes (steermoe_get_layer_info)."""
    info = LayerStruct()
    check(lib().steermoe_get_layer_info(ctx, layer, ctypes.byref(info)))
    values = {name: getattr(info, name) for name, _ in LayerStruct._fields_}
    values["gating"] = GATING[info.gating]
    values["reason"] = info.reason.decode()
    return LayerInfo(**values)


def router_sha256(model: Any) -> str:
    """Hash of a loaded `llama_model`'s routers (steermoe_model_router_sha256)."""
    text = ctypes.create_string_buffer(65)
    check(lib().steermoe_model_router_sha256(model, text))
    return text.value.decode()
