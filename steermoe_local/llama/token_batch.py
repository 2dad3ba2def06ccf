"""Batches of tokens for llama.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from . import capi

Int64 = npt.NDArray[np.int64]


class TokenBatch:
    """A `llama_batch` of up to `n_rows` tokens, over NumPy arrays."""

    def __init__(self, n_rows: int) -> None:
        self._integers = np.zeros((3, n_rows), dtype=np.int32)  # tokens, positions, sequences of each
        self._outputs = np.zeros(n_rows, dtype=np.int8)
        self._pointers = np.zeros(n_rows, dtype=np.uintp)
        self._struct = capi.llama_cpp().llama_batch()
        kinds = dict(self._struct._fields_)
        arrays: dict[str, npt.NDArray[Any]] = dict(zip(("token", "pos", "n_seq_id"), self._integers, strict=True))
        arrays |= {"seq_id": self._pointers, "logits": self._outputs}
        for name, array in arrays.items():
            setattr(self._struct, name, ctypes.cast(array.ctypes.data, kinds[name]))

    def fill(self, tokens: Any, positions: Any, sequences: npt.NDArray[np.int32], ends: Int64, outputs: Any) -> Any:
        """Fill the struct and return it; it is valid until the next call.

        Token i belongs to `sequences` (int32) from `ends[i - 1]` to `ends[i]`; `outputs` says which tokens are outputs.
        """
        n = len(tokens)
        self._sequences = np.ascontiguousarray(sequences)  # kept alive: the batch points into it
        starts = np.concatenate(([0], ends[:-1]))
        self._integers[0, :n] = tokens
        self._integers[1, :n] = positions
        self._integers[2, :n] = ends - starts
        self._pointers[:n] = self._sequences.ctypes.data + starts * self._sequences.itemsize
        self._outputs[:n] = outputs
        self._struct.n_tokens = n
        return self._struct
