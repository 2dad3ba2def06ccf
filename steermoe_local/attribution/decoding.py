"""Decodes an item's answers, or a neutral text, under many steerings at once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ModelError, NativeError, UsageError
from ..evaluation.tasks.neutral_text import Document
from ..identity import ModelIdentity
from ..llama import capi
from ..llama.loaded_model import can_share, is_causal, loaded_identity
from ..llama.steered_llama import native_bias
from ..llama.token_batch import TokenBatch
from ..steering.bias_file import BiasFile, none_if_empty
from .items import Item

FloatArray = npt.NDArray[np.float64]

_LOGITS_BYTES = 128 << 20  # of one decode's outputs: a large vocabulary takes fewer rows at once
_LEAST = -700.0  # stands for -inf as a log-probability of a token that some models never give; its exponential is 0
_STATES = 16  # sequences of a recurrent model, which keeps a state for each


Targets = tuple[tuple[int, int], ...]
"""(number of the answer, token that it has next) of what a row predicts."""
_OUTPUT: Targets = ((0, 0),)  # of a row whose logits are all wanted


class _Row(NamedTuple):
    """A token of a decode, in one or several sequences; an output if it has targets."""

    token: int
    position: int
    sequences: tuple[int, ...]
    targets: Targets = ()


class InterventionDecoder:
    """A context with a sequence for each steering and answer; a context manager.

    `steer` is "answer" (the prompt is computed once, unsteered, and shared by all) or "all". The last token of the
    prompt, which predicts an answer's first one, is steered in both.
    """

    def __init__(
        self,
        model: Any,
        items: Sequence[Item],
        documents: Sequence[Document],
        *,
        n_steerings: int,
        steer: Literal["answer", "all"] = "answer",
        n_batch: int = 512,
        n_threads: int | None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        flash_attn: bool | Literal["auto"] = "auto",
        force: bool = False,
    ) -> None:
        """`model` is llama_cpp's `LlamaModel`. `n_steerings` is lowered to what the sequences allow.

        Raises ModelError (not a Mixture-of-Experts model that reads from left to right; a model whose prompts cannot
        be shared with `steer` "answer"), UsageError, NativeError.
        """
        if not is_causal(model):
            raise ModelError("the model's attention is bidirectional, so it gives no log-probability of an answer")
        self.identity: ModelIdentity = loaded_identity(model)
        self._shares = can_share(model)
        if steer == "answer" and not self._shares:
            raise ModelError(
                "the model keeps a state that sequences cannot share, so its prompts cannot stay unsteered; "
                "take --steer all"
            )
        self._steer, self._force = steer, force
        n_answers = max(len(item.answers) for item in items)
        # the last sequence is unsteered: it holds the prompt, and the reference of the neutral text
        most = (capi.MAX_SEQUENCES - 1) // n_answers if self._shares else (_STATES - 1) // n_answers
        if most < 1:
            raise UsageError(f"an item has {n_answers} answers, more than the model's sequences; give fewer choices")
        self.n_steerings = min(n_steerings, most)
        self._n_answers = n_answers
        self._unsteered = self.n_steerings * n_answers
        self._n_vocab = int(model.n_vocab())
        self._max_outputs = max(16, _LOGITS_BYTES // (4 * self._n_vocab))
        self.attached: Sequence[BiasFile | None] | None = None
        """What `steer_by` has attached."""
        n_sequences = self._unsteered + 1
        self._n_batch = max(n_batch, n_sequences, max((len(d.tokens) for d in documents), default=0))
        trained = int(model.n_ctx_train())
        longest = max([item.n_tokens for item in items] + [len(document.tokens) for document in documents])
        if trained and longest > trained:
            raise UsageError(
                f"an item needs {longest} tokens of context, but the model was trained with {trained}; leave it out"
            )
        params = capi.parallel_context_params(
            max(self._cells(items), 2 * self._n_batch + longest), self._n_batch, n_sequences, n_threads
        )
        capi.set_cache_options(params, type_k, type_v, flash_attn)
        self._batch = TokenBatch(self._n_batch)
        self._stack = contextlib.ExitStack()
        self._ctx = capi.new_context(model.model, params)
        self._stack.callback(capi.llama_cpp().llama_free, self._ctx)
        self._memory = capi.llama_cpp().llama_get_memory(self._ctx)

    def __enter__(self) -> InterventionDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def steerable_layers(self) -> list[int]:
        """Layers whose experts a router chooses."""
        n_layer = self.identity.n_layer
        return [layer for layer in range(n_layer) if capi.layer_info(self._ctx, layer).steerable]

    def _cells(self, items: Sequence[Item]) -> int:
        """Cells that the largest item takes for all steerings."""
        return max(
            len(item.prompt) * (1 if self._steer == "answer" else self._unsteered)
            + self.n_steerings * sum(len(answer.tokens) for answer in item.answers)
            + self._n_batch
            for item in items
        )

    def steer_by(self, biases: Sequence[BiasFile | None]) -> None:
        """Attach a steering to each answer's sequence, for the calls that follow; at most `n_steerings`, None: none.

        Raises ModelMismatchError, ModelError, UsageError.
        """
        if len(biases) > self.n_steerings:
            raise UsageError(f"{len(biases)} steerings, but the context has room for {self.n_steerings}")
        capi.llama_cpp().llama_memory_clear(self._memory, False)
        self.attached = None
        natives = [None if none_if_empty(bias) is None else native_bias(bias) for bias in biases]  # type: ignore[arg-type]
        for sequence in range(self._unsteered + 1):
            index = sequence // self._n_answers
            native = natives[index] if index < len(natives) else None
            capi.attach_sequence(self._ctx, sequence, native, self._force)
        self.attached = biases

    def margins(self, item: Item) -> FloatArray:
        """The margin of an item under each attached steering, float64 [n_steerings attached], in nats per token.

        Raises NativeError, ModelError for logits that are no numbers.
        """
        n = self._n_attached
        lib = capi.llama_cpp()
        lib.llama_memory_clear(self._memory, False)
        last = len(item.prompt) - 1  # index of the token that predicts the answers' first ones
        if self._steer == "answer":
            self._prompt(item.prompt[:last], [self._unsteered])
            for sequence in range(n * self._n_answers):
                lib.llama_memory_seq_cp(self._memory, self._unsteered, sequence, 0, last)
        else:
            firsts = [i * self._n_answers for i in range(n)]
            if not self._shares:
                firsts = [i * self._n_answers + j for i in range(n) for j in range(len(item.answers))]
            self._prompt(item.prompt[:last], firsts)
            if self._shares:
                for first in firsts:
                    for sequence in range(first + 1, first + len(item.answers)):
                        lib.llama_memory_seq_cp(self._memory, first, sequence, 0, last)
        nodes = _tree(item) if self._shares else _branches(item)
        rows: list[_Row] = []
        for steering in range(n):
            first = steering * self._n_answers
            rows += [
                _Row(token, position, tuple(first + number for number in numbers), targets)
                for token, position, numbers, targets in nodes
            ]
        values = iter(self._log_probabilities(rows))
        sums = np.zeros((n, len(item.answers)))
        for row in rows:
            for number, _ in row.targets:
                sums[row.sequences[0] // self._n_answers, number] += next(values)
        lengths = np.array([len(answer.scored) for answer in item.answers])
        signs = np.array([answer.sign for answer in item.answers])
        found: FloatArray = (sums / lengths) @ signs
        return found

    def divergences(self, document: Document) -> FloatArray:
        """Sum over a document's tokens of KL(unsteered || steered) for each attached steering, float64, in nats.

        Raises NativeError, ModelError for logits that are no numbers.
        """
        n = self._n_attached
        shared = document.first if self._steer == "answer" else 0  # what no steering changes
        inputs = document.tokens[: document.first + document.n]
        found = np.zeros(n)
        # the unsteered text is computed in the same batch as the steered ones: rounding does not differ by position
        together = min(self._n_batch // (len(inputs) - shared), self._max_outputs // document.n) - 1
        together = max(1, min(together, n))
        for start in range(0, n, together):
            group = range(start, min(n, start + together))
            sequences = [self._unsteered, *(i * self._n_answers for i in group)]
            base, *others = self._texts(inputs, shared, document.first, sequences)
            p = np.exp(base)
            for i, steered in zip(group, others, strict=True):
                found[i] = np.maximum(0.0, (p * (base - steered)).sum())  # NaN stays NaN
        return _finite(found)

    @property
    def _n_attached(self) -> int:
        if self.attached is None:
            raise UsageError("no steering is attached; call steer_by first")
        return len(self.attached)

    def _prompt(self, tokens: Sequence[int], sequences: Sequence[int]) -> None:
        """Compute a prompt in each of some sequences."""
        rows = [_Row(token, position, (sequence,)) for sequence in sequences for position, token in enumerate(tokens)]
        for start in range(0, len(rows), self._n_batch):
            self._decode(rows[start : start + self._n_batch])

    def _texts(self, inputs: Sequence[int], shared: int, first: int, sequences: Sequence[int]) -> list[FloatArray]:
        """Log-probabilities [tokens from `first` on, n_vocab] after each token of a text, in several sequences.

        The first `shared` tokens are computed once, in the first of the sequences.
        """
        lib = capi.llama_cpp()
        lib.llama_memory_clear(self._memory, False)
        if shared:
            self._prompt(inputs[:shared], sequences[:1])
            for sequence in sequences[1:]:
                lib.llama_memory_seq_cp(self._memory, sequences[0], sequence, 0, shared)
        n_outputs = len(inputs) - first
        most = min(self._n_batch // (len(inputs) - shared), self._max_outputs // n_outputs)
        found: list[FloatArray] = []
        for start in range(0, len(sequences), max(1, most)):  # one at a time where two do not fit
            group = sequences[start : start + max(1, most)]
            self._decode(
                [
                    _Row(inputs[position], position, (sequence,), _OUTPUT if position >= first else ())
                    for sequence in group
                    for position in range(shared, len(inputs))
                ]
            )
            for logits in self._outputs(len(group) * n_outputs).reshape(len(group), n_outputs, self._n_vocab):
                values = logits.astype(np.float64)
                found.append(np.maximum(values - _log_sum_exp(values)[:, None], _LEAST))
        return found

    def _log_probabilities(self, rows: Sequence[_Row]) -> FloatArray:
        """Log-probability of each target of each row, in their order."""
        found: list[FloatArray] = []
        start = 0
        while start < len(rows):
            stop, n_outputs = start, 0
            while stop < min(len(rows), start + self._n_batch):
                n_outputs += bool(rows[stop].targets)
                if n_outputs > self._max_outputs:
                    break
                stop += 1
            part = [row.targets for row in rows[start:stop] if row.targets]
            self._decode(rows[start:stop])
            if part:
                logits = self._outputs(len(part))
                output = np.repeat(np.arange(len(part)), [len(targets) for targets in part])
                tokens = np.array([token for targets in part for _, token in targets])
                found.append(logits[output, tokens].astype(np.float64) - _log_sum_exp(logits)[output])
            start = stop
        return _finite(np.concatenate(found))

    def _decode(self, rows: Sequence[_Row]) -> None:
        sequences = np.array([sequence for row in rows for sequence in row.sequences], dtype=np.int32)
        ends = np.cumsum([len(row.sequences) for row in rows])
        tokens = [row.token for row in rows]
        outputs = [bool(row.targets) for row in rows]
        batch = self._batch.fill(tokens, [row.position for row in rows], sequences, ends, outputs)
        status = capi.llama_cpp().llama_decode(self._ctx, batch)
        if status != 0:
            raise NativeError(f"llama_decode failed with {status}; lower -b or give fewer choices", status)

    def _outputs(self, n: int) -> npt.NDArray[np.float32]:
        """Logits of the last decode's outputs, [n, n_vocab], valid until the next decode."""
        pointer = capi.llama_cpp().llama_get_logits(self._ctx)
        if not pointer:
            raise NativeError("llama.cpp gave no logits; report this")
        logits: npt.NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(n, self._n_vocab))
        return logits


def _tree(item: Item) -> list[tuple[int, int, tuple[int, ...], Targets]]:
    """(token, position, numbers of the answers, targets) of the rows after the shared prompt, parents first.

    What several answers begin with is one row in the sequences of all of them; the first is the prompt's last token.
    """
    last = len(item.prompt) - 1
    levels: list[dict[tuple[int, ...], list[int]]] = [{(): list(range(len(item.answers)))}]
    for length in range(1, max(len(answer.tokens) for answer in item.answers)):
        level: dict[tuple[int, ...], list[int]] = {}
        for number, answer in enumerate(item.answers):
            if len(answer.tokens) > length:
                level.setdefault(answer.tokens[:length], []).append(number)
        levels.append(level)
    return [
        (
            beginning[-1] if beginning else item.prompt[last],
            last + length,
            tuple(numbers),
            tuple((i, item.answers[i].tokens[length]) for i in numbers if length in item.answers[i].scored),
        )
        for length, level in enumerate(levels)
        for beginning, numbers in level.items()
    ]


def _branches(item: Item) -> list[tuple[int, int, tuple[int, ...], Targets]]:
    """The same where sequences cannot share tokens: every answer has the prompt's last token in its own sequence."""
    last = len(item.prompt) - 1
    return [
        (token, last + index, (number,), ((number, target),) if index in answer.scored else ())
        for number, answer in enumerate(item.answers)
        for index, (token, target) in enumerate(zip((item.prompt[last], *answer.tokens), answer.tokens, strict=False))
    ]


def _log_sum_exp(logits: npt.NDArray[Any]) -> FloatArray:
    """log(sum(exp(logits))) of each row, summed in float64."""
    most = logits.max(axis=1)
    total: FloatArray = np.log(np.exp(logits - most[:, None]).sum(axis=1, dtype=np.float64)) + most
    return total


def _finite(values: FloatArray) -> FloatArray:
    if not np.isfinite(values).all():
        raise ModelError("the model's logits are no numbers under an intervention; check the file with steermoe info")
    return values
