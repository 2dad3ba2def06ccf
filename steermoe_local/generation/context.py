"""A llama.cpp context whose tokens have biases of their own: decode, memory, routing counts, selected experts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ModelError, ModelMismatchError, SteerMoEError, UsageError
from ..llama import capi
from ..llama.grammars import guided_tokenizer
from ..llama.loaded_model import is_causal, loaded_identity
from ..llama.plan_state import require_tokens
from ..llama.steered_llama import SteeredLlama, native_bias
from ..llama.tokenizing import token_bytes
from ..steering.bias_file import BiasFile, none_if_empty
from ..steering.bias_plan import AnyBias, BiasPlan, simplest

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

_CELLS = 256  # llama.cpp rounds a slot's cells up to a multiple of these
_ONE_STREAM = ("kimi-linear",)  # llama.cpp cannot build its graph over several streams of cells
_ONE_AT_A_TIME = ("plamo2",)  # llama.cpp's graph mixes up the sequences of one batch
_MAX_CHECKED = 1024  # biases whose check is remembered
_KEPT_ROWS = 64  # of biases, also of those that no decode needs now: each row takes memory of the device
_LEARNED_POSITIONS = ("gpt2", "mpt", "starcoder")  # llama.cpp aborts behind the last one


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of one slot for a decode, each with the bias in force at it (None: none).

    The last `n_outputs` of them are outputs, the last `n_counted` of these are counted. `traced`: the experts that the
    tokens select are wanted; the model's last layer routes the outputs alone.
    """

    slot: int
    start: int  # position of the first token
    tokens: Sequence[int]
    biases: Sequence[BiasFile | None]
    n_outputs: int = 0
    n_counted: int = 0
    traced: bool = False

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.start + len(self.tokens)

    def own_biases(self) -> dict[str, BiasFile]:
        """The biases of its tokens by their keys."""
        return {bias.key: bias for bias in dict.fromkeys(self.biases) if bias is not None}


class SlotContext:
    """A context of its own on the weights of a `SteeredLlama`, with room for `n_ctx` tokens in each slot."""

    def __init__(
        self,
        model: SteeredLlama,
        *,
        n_ctx: int,
        n_slots: int,
        n_batch: int,
        n_ubatch: int,
        n_threads: int | None,
        type_k: int | None,
        type_v: int | None,
        flash_attn: bool | Literal["auto"] | None,
        record: bool,
        force: bool,
    ) -> None:
        """Raises UsageError, ModelError (no model that generates text), NativeError (no memory for the context)."""
        lib = capi.llama_cpp()
        self.model = model._model
        architecture = self.model.metadata().get("general.architecture", "")
        _check_generates(self.model, architecture)
        self._one_at_a_time = architecture in _ONE_AT_A_TIME
        if n_ctx < 0 or n_batch < 1 or n_ubatch < 1 or (n_threads is not None and n_threads < 1):
            raise UsageError("n_batch, n_ubatch and n_threads must be at least 1, n_ctx at least 0")
        most = min(n_batch, capi.MAX_SEQUENCES)
        if not 1 <= n_slots <= most:
            raise UsageError(f"n_slots: {n_slots} is not from 1 to {most} (n_batch, at most {capi.MAX_SEQUENCES})")
        self.n_vocab = int(self.model.n_vocab())
        self._has_text = lib.llama_vocab_type(self.model.vocab) != lib.LLAMA_VOCAB_TYPE_NONE
        self._bytes: dict[tuple[int, bool], bytes] = {}
        self.n_ctx = n_ctx or int(self.model.n_ctx_train())
        if self.n_ctx * n_slots >= 2**31:
            raise UsageError(f"n_ctx: {self.n_ctx} for {n_slots} slots is more than llama.cpp can count; lower it")
        n_trained = int(self.model.n_ctx_train())
        if self.n_ctx > n_trained and architecture in _LEARNED_POSITIONS:
            raise UsageError(f"n_ctx: {self.n_ctx}, but this {architecture} model has {n_trained} positions; lower it")
        self._force = force
        self._rows: dict[str, int] = {}  # the library's row of each bias, by its key; the least recently used first
        self._has_left = False  # whether rows or a trace may wait for a decode that did not come
        self._checked: dict[str, bool] = {}  # keys of biases that the library took; whether they change anything
        self._n_swa = int(lib.llama_model_n_swa(self.model.model))
        self._has_state = bool(
            lib.llama_model_is_recurrent(self.model.model) or lib.llama_model_is_hybrid(self.model.model)
        )
        self.identity = None
        with contextlib.suppress(SteerMoEError):  # without routers it runs all the same, unsteered
            self.identity = loaded_identity(self.model)

        own = model.context_params
        params = type(own).from_buffer_copy(own)  # RoPE, offloading and the like as the model was opened with
        # A stream of cells for each slot: what one computes does not depend on what the others hold, and its attention
        # does not run over their cells.
        params.kv_unified = architecture in _ONE_STREAM
        params.n_ctx = -(-self.n_ctx // _CELLS) * _CELLS * n_slots
        params.n_seq_max = n_slots
        params.n_batch, params.n_ubatch = n_batch, min(n_ubatch, n_batch)
        params.embeddings = False
        if n_threads is not None:
            params.n_threads = params.n_threads_batch = n_threads
        capi.set_cache_options(params, type_k, type_v, flash_attn)

        with contextlib.ExitStack() as stack:
            self._recorder: capi.NativeRecorder | None = None
            if record and self.identity is not None:
                self._recorder = capi.NativeRecorder(self.model.model, n_slots, self.identity.shape)
                stack.callback(self._recorder.close)
                self._recorder.install(params)
            self._ctx = capi.new_context(self.model.model, params)
            stack.callback(lib.llama_free, self._ctx)
            self._memory = lib.llama_get_memory(self._ctx)
            if not self._memory:
                raise ModelError("this model keeps no memory of a text, so it cannot write one; choose another")
            if self._recorder:
                self._recorder.bind(self._ctx)
            self.n_batch = min(n_batch, int(lib.llama_n_batch(self._ctx)))  # llama.cpp may take less
            self._batch = lib.llama_batch_init(self.n_batch, 0, 1)
            stack.callback(lib.llama_batch_free, self._batch)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Free the llama.cpp context."""
        self._stack.close()

    def checked(self, bias: AnyBias | None) -> AnyBias | None:
        """The bias, or the simplest plan that does the same; None for one that changes nothing.

        Raises ModelMismatchError, ModelError if it does not fit the model, UsageError for a plan whose conditions
        nothing can be seen of, with a token that is not of the vocabulary, or with more biases than a context has rows.
        """
        if bias is None:
            return None
        if isinstance(bias, BiasFile):
            return bias if self._changes_routing(bias) else None
        require_tokens(bias, self.n_vocab)
        for one in bias.biases:
            self._changes_routing(one)
        plan = simplest(bias.rules)
        if isinstance(plan, BiasPlan):
            self._check_plan(plan)
        return plan

    def _changes_routing(self, bias: BiasFile) -> bool:
        """Whether a bias does anything. Raises ModelMismatchError, ModelError if the library refuses it."""
        if bias.key not in self._checked:
            self._row(bias, ())
            if len(self._checked) >= _MAX_CHECKED:
                self._checked.clear()
            self._checked[bias.key] = none_if_empty(bias) is not None
        return self._checked[bias.key]

    def _check_plan(self, plan: BiasPlan) -> None:
        if len(plan.biases) > capi.MAX_ROWS:
            raise UsageError(f"a plan of {len(plan.biases)} biases; a context has room for {capi.MAX_ROWS}")
        if plan.needs_routing:
            self.require_trace("a rule of the plan has a condition on routing")
        for number, rule in enumerate(plan.rules, 1):
            if rule.lean is not None and self.identity and rule.lean.scores.shape != self.identity.shape:
                raise ModelMismatchError(
                    f"rule {number}: its condition looks at {rule.lean.scores.shape} experts in layers, but the model "
                    f"has {self.identity.shape}; take a map of this model"
                )

    def require_trace(self, why: str) -> None:
        """Raise UsageError if nobody sees which experts tokens select; `why` says who wants to."""
        if self._recorder is None:
            raise UsageError(f"{why}, but the model has no experts, or the engine was made without a recorder")

    def _row(self, bias: BiasFile, in_use: Collection[str]) -> int:
        """The library's row of a bias. Biases with a key of `in_use` keep theirs; another may lose it."""
        row = self._rows.pop(bias.key, None)
        if row is None:
            while len(self._rows) >= min(capi.MAX_ROWS, max(_KEPT_ROWS, len(in_use))):
                capi.detach_row(self._ctx, self._rows.pop(next(key for key in self._rows if key not in in_use)))
            taken = set(self._rows.values())
            row = next(number for number in range(capi.MAX_ROWS) if number not in taken)
            # what is attached there is nobody's until it is written down, whatever comes between
            capi.attach_row(self._ctx, row, native_bias(bias), self._force)
        self._rows[bias.key] = row
        return row

    def decode(self, parts: Sequence[Part]) -> Iterator[tuple[int, Logits | None]]:
        """Compute parts, at most `n_batch` tokens in all and one part a slot.

        Yields (index of the part, logits of its last token or None) when it is in memory; the logits, [n_vocab], are
        valid until the next item, and so are `outputs` and `experts`. Raises NativeError.
        """
        needed = [part.own_biases() for part in parts]
        for group in self._groups(needed):
            biases = {key: bias for index in group for key, bias in needed[index].items()}
            last_rows, experts = self._decode_together([parts[index] for index in group], biases)
            for index, row, selected in zip(group, last_rows, experts, strict=True):
                self._last_row, self._selected = row, selected
                yield index, self._logits(row) if parts[index].n_outputs else None

    def _groups(self, needed: Sequence[dict[str, BiasFile]]) -> list[list[int]]:
        """Indices of the parts of each llama_decode: one, unless they need more biases than there are rows."""
        if self._one_at_a_time:
            return [[index] for index in range(len(needed))]
        groups: list[list[int]] = []
        keys: set[str] = set()
        for index, own in enumerate(needed):
            if not groups or len(keys | own.keys()) > capi.MAX_ROWS:
                groups.append([])
                keys = set()
            groups[-1].append(index)
            keys |= own.keys()
        return groups

    def _decode_together(
        self, parts: Sequence[Part], biases: dict[str, BiasFile]
    ) -> tuple[list[int], list[Int32 | None]]:
        """One llama_decode; the index of each part's last row in it, and the experts of those that are traced.

        `biases` are those of all parts, by their keys.
        """
        rows: list[tuple[int, int, int, bool]] = []
        bins: list[int] = []
        traced: list[bool] = []
        ends: list[int] = []
        for part in parts:
            n, silent = len(part.tokens), len(part.tokens) - part.n_outputs
            rows += [(t, part.start + i, part.slot, i >= silent) for i, t in enumerate(part.tokens)]
            bins += [-1] * (n - part.n_counted) + [part.slot] * part.n_counted
            traced += [part.traced] * n
            ends.append(len(rows) - 1)
        token_rows = self._token_rows(parts, biases)
        left, self._has_left = self._has_left, True
        if token_rows or left:
            capi.set_token_rows(self._ctx, token_rows)
        if self._recorder:
            self._recorder.set_mask(bins)
            if any(traced) or left:
                self._recorder.set_trace(traced if any(traced) else ())
        capi.decode(self._ctx, self._batch, rows)
        self._has_left = False
        if self._recorder is None or not any(traced):
            return ends, [None] * len(parts)
        experts = self._recorder.trace().experts
        sizes = np.cumsum([len(part.tokens) if part.traced else 0 for part in parts])[:-1]
        own = np.split(experts, sizes)
        return ends, [found if part.traced else None for part, found in zip(parts, own, strict=True)]

    def _token_rows(self, parts: Sequence[Part], biases: dict[str, BiasFile]) -> list[int]:
        """The library's row for each token, -1: unsteered; no rows while nothing was ever steered."""
        if not biases and not self._rows:
            return []  # else the library keeps the graph that steered tokens needed, for those that may come
        found = {key: self._row(bias, biases) for key, bias in biases.items()}
        return [-1 if bias is None else found[bias.key] for part in parts for bias in part.biases]

    def outputs(self, part: Part) -> Iterator[Logits]:
        """Logits of the outputs of the part that `decode` has just given, in their order."""
        return (self._logits(row) for row in range(self._last_row + 1 - part.n_outputs, self._last_row + 1))

    @property
    def experts(self) -> Int32 | None:
        """Selected experts of the part that `decode` has just given, [n_tokens, n_layer, top_k], if it is traced."""
        return self._selected

    def _logits(self, row: int) -> Logits:
        return np.frombuffer(capi.logits(self._ctx, row, self.n_vocab), np.float32)

    @functools.cached_property
    def guided_tokenizer(self) -> Any:
        """The vocabulary for grammars of llguidance, made when it is first asked for."""
        return guided_tokenizer(self.model.vocab)

    def prepare_grammars(self) -> None:
        """Make `guided_tokenizer` now."""
        if self._has_text:
            _ = self.guided_tokenizer

    def is_end(self, token: int) -> bool:
        """Whether the token ends the generation."""
        return bool(capi.llama_cpp().llama_vocab_is_eog(self.model.vocab, token))

    def token_bytes(self, token: int, special: bool) -> bytes:
        """Bytes of a token (llama_token_to_piece); none without a tokenizer."""
        if not self._has_text:
            return b""
        if (token, special) not in self._bytes:
            self._bytes[token, special] = token_bytes(self.model.vocab, token, special)
        return self._bytes[token, special]

    def text_bytes(self, token: int) -> bytes:
        """Bytes of a token's text, those of control tokens included."""
        return self.token_bytes(token, True)

    def checked_tokens(self, tokens: Sequence[int]) -> list[int]:
        """The tokens as a list. Raises UsageError for one that is not of the vocabulary: llama.cpp refuses it late."""
        for token in tokens:
            if not 0 <= token < self.n_vocab:
                raise UsageError(f"token {token}: the vocabulary has 0 to {self.n_vocab - 1}")
        return [int(token) for token in tokens]

    def cut(self, slot: int, n_kept: int) -> bool:
        """Forget what a slot holds behind its first `n_kept` tokens; False: it cannot be cut there, all is gone."""
        lib = capi.llama_cpp()
        if n_kept and lib.llama_memory_seq_rm(self._memory, slot, n_kept, -1) and self._sees_back(slot, n_kept):
            return True
        lib.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return not n_kept

    def _sees_back(self, slot: int, n_kept: int) -> bool:
        """Whether all that the next token attends to is in memory: cells behind a sliding window are used again."""
        if not self._n_swa or self._has_state:  # a state that lets itself be cut was at its end: nothing was cut
            return True
        oldest = capi.llama_cpp().llama_memory_seq_pos_min(self._memory, slot)
        return bool(0 <= oldest <= max(0, n_kept - self._n_swa + 1))

    def counts(self, slot: int) -> Int64 | None:
        """Selections counted so far in a slot, [n_layer, n_expert]; None without a recorder. Raises NativeError."""
        if self._recorder is None or self.identity is None:
            return None
        counts, _ = self._recorder.counts()
        table: Int64 = np.ctypeslib.as_array(counts).reshape(-1, *self.identity.shape)[slot].copy()
        return table


def _check_generates(model: Any, architecture: str) -> None:
    """Raise ModelError for a model that does not write a text from left to right."""
    lib = capi.llama_cpp()
    if lib.llama_model_has_encoder(model.model):
        raise ModelError(f"this {architecture} model has an encoder; choose a model with a decoder alone")
    if not lib.llama_model_has_decoder(model.model) or not is_causal(model):
        raise ModelError(f"this {architecture} model does not write from left to right; choose one that does")
