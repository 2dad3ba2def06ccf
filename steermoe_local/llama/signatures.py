"""Signatures of the functions of native/include/steermoe.h, its structs, and its statuses as exceptions."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FormatError, ModelError, ModelMismatchError, NativeError, SteerMoEError
from .library import llama_cpp

__all__ = ["BiasStruct", "LayerStruct", "check", "lib", "of_tokens"]

_ERR_IO, _ERR_FORMAT, _ERR_MISMATCH, _ERR_UNSUPPORTED = 1, 2, 3, 4
_ERRORS: dict[int, type[SteerMoEError]] = {
    _ERR_IO: FormatError,
    _ERR_FORMAT: FormatError,
    _ERR_MISMATCH: ModelMismatchError,
    _ERR_UNSUPPORTED: ModelError,
}


class BiasStruct(ctypes.Structure):
    """`struct steermoe_bias_info`."""

    _fields_ = (
        ("architecture", ctypes.c_char_p),
        ("router_sha256", ctypes.c_char_p),
        ("mode", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("n_layer", ctypes.c_int32),
        ("n_expert", ctypes.c_int32),
        ("n_expert_used", ctypes.c_int32),
        ("n_steered", ctypes.c_int32),
        ("n_active", ctypes.c_int64),
        ("n_inactive", ctypes.c_int64),
    )


class LayerStruct(ctypes.Structure):
    """`struct steermoe_layer_info`."""

    _fields_ = (
        ("gating", ctypes.c_int32),
        ("n_expert", ctypes.c_int32),
        ("n_expert_used", ctypes.c_int32),
        ("selection_bias", ctypes.c_bool),
        ("expert_groups", ctypes.c_bool),
        ("steerable", ctypes.c_bool),
        ("steered", ctypes.c_bool),
        ("reason", ctypes.c_char_p),
    )


@cache
def lib() -> ctypes.CDLL:
    """The library that llama_cpp loaded, with the types of its functions."""
    native: ctypes.CDLL = llama_cpp().llama_cpp._lib
    pointer = ctypes.c_void_p
    int32, int64 = ctypes.c_int32, ctypes.c_int64
    signatures: dict[str, tuple[Any, ...]] = {
        # name: (result, *arguments)
        "last_error": (ctypes.c_char_p,),
        "bias_load": (ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(pointer)),
        "bias_init": (ctypes.c_int, ctypes.POINTER(BiasStruct), ctypes.POINTER(pointer)),
        "bias_set_layer": (ctypes.c_int, pointer, int32, ctypes.POINTER(ctypes.c_float), int32),
        "bias_get_info": (None, pointer, ctypes.POINTER(BiasStruct)),
        "bias_free": (None, pointer),
        "model_router_sha256": (ctypes.c_int, pointer, ctypes.c_char_p),
        "attach": (ctypes.c_int, pointer, pointer, int32),
        "detach": (ctypes.c_int, pointer),
        "attach_seq": (ctypes.c_int, pointer, int32, pointer, int32),
        "detach_seq": (ctypes.c_int, pointer, int32),
        "row_attach": (ctypes.c_int, pointer, int32, pointer, int32),
        "row_detach": (ctypes.c_int, pointer, int32),
        "set_token_rows": (ctypes.c_int, pointer, pointer, int32),
        "get_layer_info": (ctypes.c_int, pointer, int32, ctypes.POINTER(LayerStruct)),
        "recorder_init": (ctypes.c_int, pointer, int32, ctypes.POINTER(pointer)),
        "recorder_bind": (ctypes.c_int, pointer, pointer),
        "recorder_set_mask": (ctypes.c_int, pointer, pointer, int32),
        "recorder_set_stop": (None, pointer, ctypes.c_bool),
        "recorder_reset": (None, pointer),
        "recorder_counts": (ctypes.c_int, pointer, ctypes.POINTER(int64), ctypes.POINTER(int64)),
        "recorder_set_sums": (ctypes.c_int, pointer, ctypes.c_bool),
        "recorder_sums": (ctypes.c_int, pointer, int32, *[ctypes.POINTER(ctypes.c_double)] * 3),
        "recorder_set_trace": (ctypes.c_int, pointer, pointer, int32, int32),
        "recorder_top_k": (int32, pointer),
        "recorder_trace": (ctypes.c_int, pointer, ctypes.POINTER(int32), *[ctypes.POINTER(ctypes.c_float)] * 2),
        "recorder_free": (None, pointer),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(native, f"steermoe_{name}")
        function.restype = result
        function.argtypes = arguments
    return native


def check(status: int) -> None:
    """Raise the exception of a steermoe_status."""
    if status == 0:
        return
    message = lib().steermoe_last_error().decode("utf-8", "replace")
    kind = _ERRORS.get(status)
    raise kind(message) if kind else NativeError(message, status)


def of_tokens(values: Sequence[int] | npt.NDArray[Any], code: str) -> tuple[Any, int, int]:
    """Values of the tokens of a batch as C sees them: what holds them, its address, their number.

    `code` is that of the array module, "i": int32_t, "b": bool. Called for each decode: numpy would take ten times as
    long for a list of a few.
    """
    if isinstance(values, np.ndarray):
        held = np.ascontiguousarray(values, code)
        return held, held.ctypes.data, held.size
    listed = array(code, values)
    return listed, listed.buffer_info()[0], len(listed)
