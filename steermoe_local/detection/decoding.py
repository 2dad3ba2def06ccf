"""Decodes groups of prompts in a llama.cpp context and counts the routing of their targets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import NativeError, UsageError
from ..llama import capi
from ..llama.loaded_model import can_share, is_causal
from ..llama.token_batch import TokenBatch
from .grouping import Group

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

_ROWS_A_PROMPT = 8  # expected tokens of a prompt; shorter prompts leave a batch partly empty
_STATES = 16  # sequences for a recurrent model, which keeps a state for each


@dataclass(frozen=True)
class ContextOptions:
    """Context parameters, named as in `llama_cpp.Llama`."""

    n_batch: int = 512
    n_ubatch: int = 512
    n_threads: int | None = None
    type_k: int | None = None
    type_v: int | None = None
    flash_attn: bool | Literal["auto"] = False


class GroupDecoder:
    """Decodes groups one after another; a context manager. Its context grows with the largest group.

    Between two groups the memory keeps the tokens `kept` only, decoded alone in their own cells at the beginning. So a
    group computes the same bits whatever was decoded before it.
    """

    def __init__(
        self,
        model: Any,
        shape: tuple[int, int],
        options: ContextOptions,
        *,
        sums: bool = False,
        n_parts: int = 1,
        biases: Sequence[capi.NativeBias] = (),
        force: bool = False,
    ) -> None:
        """`model` is llama_cpp's `LlamaModel`, `shape` its (n_layer, n_expert); with `sums` it keeps `sums`, too.

        Targets have `n_parts` parts, which are counted apart. `biases` are those that `trace` steers by; `force`: also
        those of another router.

        Raises ModelError.
        """
        self._model, self._shape, self._options, self._keeps_sums = model, shape, options, sums
        self._biases, self._force = biases, force
        parallel = min(capi.MAX_SEQUENCES - 1, max(2, options.n_batch // _ROWS_A_PROMPT))
        self.n_prompts = parallel if can_share(model) else min(parallel, _STATES)
        # two prompts of two parts each may need eight: one for each part, and for what they share
        self.n_bins = 2 * self.n_prompts * n_parts
        self.kept: Sequence[int] = ()
        self._causal = is_causal(model)
        self._batch = TokenBatch(options.n_batch)
        self._stack = contextlib.ExitStack()
        self._n_cells = 0
        self._ctx: Any = None

    def __enter__(self) -> GroupDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def count(self, group: Group) -> tuple[Int64, Int64]:
        """Decode a group: selections [bins, n_layer, n_expert] and tokens [bins, n_layer]. Raises NativeError."""
        self._begin(group)
        self._recorder.reset()
        self._count(group.tokens, group.positions, group.sequences, group.ends, group.bins)
        counts, tokens = self._recorder.counts()
        n_bins = len(group.members)
        return (
            np.ctypeslib.as_array(counts).reshape(self.n_bins, *self._shape)[:n_bins],
            np.ctypeslib.as_array(tokens).reshape(self.n_bins, self._shape[0])[:n_bins],
        )

    def trace(
        self, group: Group, steered: npt.NDArray[np.int32] | None = None, *, logits: bool = False
    ) -> Iterator[tuple[slice, capi.Trace]]:
        """Decode a group in pieces of n_batch rows, and yield (rows, trace) of each: what every layer selects for them.

        `steered` int32 [rows]: which of the biases steers each row, -1: none. The trace is that of the rows in their
        order, with the mixing weights and, on request, the routers' logits before steering. Raises NativeError.
        """
        self._begin(group)
        arrays = (group.tokens, group.positions, group.sequences, group.ends)
        # all are outputs, because the last layer routes outputs only
        for part, batch in self._batches(*arrays, np.ones(len(group.tokens), np.bool_)):
            self._recorder.set_trace(np.ones(part.stop - part.start, np.bool_), weights=True, logits=logits)
            if steered is not None:
                capi.set_token_rows(self._ctx, np.ascontiguousarray(steered[part], np.int32))
            self._decode(batch)
            yield part, self._recorder.trace()

    def sums(self, n_bins: int) -> tuple[Float64, Float64, Float64]:
        """The tables of `RoutingSums` of the group counted last, each with `n_bins` in place of the sides.

        Raises NativeError.
        """
        n_layer, n_expert = self._shape
        logits, spread, weights = self._recorder.sums(n_bins)
        return (
            np.ctypeslib.as_array(logits).reshape(n_bins, n_layer, n_expert),
            np.ctypeslib.as_array(spread).reshape(n_bins, n_layer),
            np.ctypeslib.as_array(weights).reshape(n_bins, n_layer, n_expert),
        )

    def _begin(self, group: Group) -> None:
        """Make room for a group, and leave in memory what it begins with."""
        self._reserve(len(self.kept) + max(len(group.tokens), self._options.n_batch))
        lib = capi.llama_cpp()
        memory = lib.llama_get_memory(self._ctx)
        if self.kept:
            lib.llama_memory_seq_keep(memory, self.n_prompts)
            for sequence in range(group.n_prompts if group.n_kept else 0):
                lib.llama_memory_seq_cp(memory, self.n_prompts, sequence, 0, group.n_kept)
        else:
            lib.llama_memory_clear(memory, False)

    def _reserve(self, n_cells: int) -> None:
        """Make the context, or a larger one."""
        if n_cells <= self._n_cells:
            return
        self._stack.close()
        self._n_cells = max(n_cells, 2 * self._n_cells)
        options = self._options
        self._recorder = capi.NativeRecorder(self._model.model, self.n_bins, self._shape, sums=self._keeps_sums)
        self._stack.callback(self._recorder.close)
        n_sequences = self.n_prompts + 1
        # llama.cpp aborts on more sequences than batch tokens
        params = capi.parallel_context_params(
            self._n_cells, max(options.n_batch, n_sequences), n_sequences, options.n_threads
        )
        # bidirectional attention needs the whole prompt in one ubatch
        params.n_ubatch = min(options.n_ubatch, options.n_batch) if self._causal else params.n_batch
        capi.set_cache_options(params, options.type_k, options.type_v, options.flash_attn)
        self._recorder.install(params)
        self._ctx = capi.new_context(self._model.model, params)
        self._stack.callback(capi.llama_cpp().llama_free, self._ctx)
        self._recorder.bind(self._ctx)
        self._recorder.set_stop(True)  # nobody reads this context's logits
        for row, bias in enumerate(self._biases):
            capi.attach_row(self._ctx, row, bias, self._force)
        if self.kept:
            n = len(self.kept)
            positions = np.arange(n, dtype=np.int32)
            own = np.full(n, self.n_prompts, dtype=np.int32)
            nothing = np.full(n, -1, dtype=np.int32)
            self._count(np.asarray(self.kept, np.int32), positions, own, np.arange(1, n + 1), nothing)

    def _count(self, tokens: Any, positions: Any, sequences: Any, ends: Int64, bins: Any) -> None:
        # counted tokens are outputs, because the last layer routes outputs only
        for part, batch in self._batches(tokens, positions, sequences, ends, bins >= 0):
            self._recorder.set_mask(bins[part].tolist())
            self._decode(batch)

    def _batches(
        self, tokens: Any, positions: Any, sequences: Any, ends: Int64, outputs: Any
    ) -> Iterator[tuple[slice, Any]]:
        """Batches of n_batch rows, each with its rows; one is valid until the next."""
        n_batch = self._options.n_batch
        if len(tokens) > n_batch and not self._causal:
            raise UsageError(
                f"the model's attention is bidirectional: {len(tokens)} tokens do not fit n_batch {n_batch}; raise it"
            )
        for start in range(0, len(tokens), n_batch):
            part = slice(start, min(start + n_batch, len(tokens)))
            first = int(ends[start - 1]) if start else 0
            batch = self._batch.fill(
                tokens[part],
                positions[part],
                sequences[first : ends[part.stop - 1]],
                ends[part] - first,
                outputs[part],
            )
            yield part, batch

    def _decode(self, batch: Any) -> None:
        status = capi.llama_cpp().llama_decode(self._ctx, batch)
        if status != 0:
            raise NativeError(f"llama_decode failed with {status}; lower n_batch or change n_ctx", status)
