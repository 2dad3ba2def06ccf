"""ctypes binding of the recorder in native/include/steermoe.h. The header documents the functions."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .signatures import check, lib, of_tokens

__all__ = ["NativeRecorder", "Trace"]

TRACE_WEIGHTS, TRACE_LOGITS = 1, 2


@dataclass(frozen=True, eq=False)
class Trace:
    """What the traced tokens of one decode were routed to, in the order of the batch (steermoe_recorder_trace).

    n_layer counts all layers of the model, top_k is the most experts that one of them selects for a token.
    """

    experts: npt.NDArray[np.int32]
    """[tokens, n_layer, top_k], best first; -1: the layer did not route the token, has no router, or selects fewer."""

    weights: npt.NDArray[np.float32] | None
    """The weights with which they are mixed, the same shape, 0 where there is no expert; None: not asked for."""

    logits: npt.NDArray[np.float32] | None
    """The router's logits before they are steered, [tokens, n_layer, n_expert], NaN where the layer did not route the
    token; None: not asked for."""


class NativeRecorder:
    """A `struct steermoe_recorder`. Close it after its context was freed."""

    def __init__(self, model: Any, n_bins: int, shape: tuple[int, int], *, sums: bool = False) -> None:
        """`shape` is (n_layer, n_expert) of the model; `sums`: keep `sums` beside the counts.

        Raises ModelError for a model without experts.
        """
        self._handle = ctypes.c_void_p()
        self._n_bins = n_bins
        self._shape = shape
        self._traced = 0, 0  # tokens that the next trace is of, and its flags
        check(lib().steermoe_recorder_init(model, n_bins, ctypes.byref(self._handle)))
        if sums:
            check(lib().steermoe_recorder_set_sums(self._handle, True))

    def install(self, context_params: Any) -> None:
        """Put the eval callback into `llama_context_params`; before llama_init_from_model."""
        callback = type(context_params.cb_eval)
        address = ctypes.cast(lib().steermoe_recorder_eval, ctypes.c_void_p).value
        context_params.cb_eval = callback(address)
        context_params.cb_eval_user_data = self._handle

    def bind(self, ctx: Any) -> None:
        """Set the context whose decodes are counted; nothing is counted before."""
        check(lib().steermoe_recorder_bind(self._handle, ctx))

    def set_mask(self, bins: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """Bin of each token of the next llama_decode, -1: not counted."""
        _held, address, n = of_tokens(bins, "i")
        check(lib().steermoe_recorder_set_mask(self._handle, address, n))

    def set_stop(self, stop: bool) -> None:
        """Stop each decode after the last router; the context's logits are then undefined."""
        lib().steermoe_recorder_set_stop(self._handle, stop)

    def reset(self) -> None:
        """Set all counts and sums to 0, and forget the mask and the trace."""
        self._traced = 0, 0
        lib().steermoe_recorder_reset(self._handle)

    def counts(self) -> tuple[Any, Any]:
        """Counts as ctypes int64 arrays: [n_bins * n_layer * n_expert] selections, [n_bins * n_layer] tokens.

        Raises NativeError with the reason if the recording went wrong.
        """
        n_layer, n_expert = self._shape
        counts = (ctypes.c_int64 * (self._n_bins * n_layer * n_expert))()
        tokens = (ctypes.c_int64 * (self._n_bins * n_layer))()
        check(lib().steermoe_recorder_counts(self._handle, counts, tokens))
        return counts, tokens

    def sums(self, n_bins: int | None = None) -> tuple[Any, Any, Any]:
        """Sums over the counted tokens as ctypes double arrays (steermoe_recorder_sums), of the first `n_bins` bins.

        Router logits [n_bins * n_layer * n_expert], their squared deviations from their token's mean
        [n_bins * n_layer], mixing weights [n_bins * n_layer * n_expert].

        Raises NativeError with the reason if the recording went wrong, or no sums are kept.
        """
        n_layer, n_expert = self._shape
        n_bins = self._n_bins if n_bins is None else n_bins
        logits, spread, weights = (
            (ctypes.c_double * (n_bins * n_layer * width))() for width in (n_expert, 1, n_expert)
        )
        check(lib().steermoe_recorder_sums(self._handle, n_bins, logits, spread, weights))
        return logits, spread, weights

    def set_trace(
        self, wanted: Sequence[bool] | npt.NDArray[np.bool_], *, weights: bool = False, logits: bool = False
    ) -> None:
        """Say which tokens of the next llama_decode are traced, whether `set_mask` counts them or not.

        `weights`, `logits`: keep these of them beside their experts. Forgets the last trace; empty: trace nothing.
        """
        # a C bool is 0 or 1
        chosen = wanted.astype(np.bool_) if isinstance(wanted, np.ndarray) else bytes(map(bool, wanted))
        _held, address, n = of_tokens(chosen, "b")
        flags = weights * TRACE_WEIGHTS | logits * TRACE_LOGITS
        check(lib().steermoe_recorder_set_trace(self._handle, address, n, flags))
        self._traced = int(chosen.sum()) if isinstance(chosen, np.ndarray) else chosen.count(1), flags

    def trace(self) -> Trace:
        """The trace of the tokens that the last `set_trace` wanted, after their decode.

        Raises NativeError if no trace was asked for, the decode did not compute these tokens, or recording went wrong.
        """
        (n_layer, n_expert), (n, flags) = self._shape, self._traced
        experts = np.empty((n, n_layer, lib().steermoe_recorder_top_k(self._handle)), np.int32)
        weights = np.empty(experts.shape, np.float32) if flags & TRACE_WEIGHTS else None
        logits = np.empty((n, n_layer, n_expert), np.float32) if flags & TRACE_LOGITS else None
        real = ctypes.POINTER(ctypes.c_float)
        pointers = [None if table is None else table.ctypes.data_as(real) for table in (weights, logits)]
        integers = experts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        check(lib().steermoe_recorder_trace(self._handle, integers, *pointers))
        return Trace(experts, weights, logits)

    def close(self) -> None:
        """Free the recorder; its context must be gone."""
        if self._handle:
            lib().steermoe_recorder_free(self._handle)
            self._handle = ctypes.c_void_p()
