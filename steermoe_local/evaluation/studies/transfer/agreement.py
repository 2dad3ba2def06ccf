"""Compares two quantizations of a model on the same text, both unsteered: selected experts and predictions.

Only one of the models is in memory at a time: the results of the first one are kept as a `Reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ....detection.token_routing import selected_experts
from ....errors import ModelMismatchError, UsageError
from ...measuring.evaluator import Evaluator
from ...measuring.replies import render
from ...tasks.neutral_text import Document, TextScore, log_probabilities

_MAX_FLOATS = 1 << 26  # of the reference's predictions: 256 MiB


@dataclass(frozen=True)
class RoutingAgreement:
    """The share of selected experts that two models agree on, over `n_tokens` tokens in `n_layers` routed layers.

    `same_sets`: share of tokens x layers where both select exactly the same top-k. `overlap`: mean share of the k that
    both select; two random choices would share `chance`. `by_layer` is the overlap in each of `layers`.
    """

    same_sets: float
    overlap: float
    chance: float
    n_tokens: int
    n_layers: int
    layers: tuple[int, ...]
    by_layer: tuple[float, ...]


def routing_agreement(one: npt.NDArray[np.bool_], two: npt.NDArray[np.bool_]) -> RoutingAgreement:
    """Compare the experts that two models select, tables [n_tokens, n_layer, n_expert].

    Raises ModelMismatchError, UsageError.
    """
    if one.shape != two.shape:
        raise ModelMismatchError(f"selected experts of {one.shape} and {two.shape}: not of the same tokens and experts")
    layers = np.flatnonzero(one.any(axis=(0, 2)) | two.any(axis=(0, 2)))
    if not one.shape[0] or not layers.size:
        raise UsageError("no token that was routed; there is nothing to compare")
    a, b = one[:, layers], two[:, layers]
    k = a.sum(axis=2)
    shared = (a & b).sum(axis=2)
    overlap = shared / np.maximum(k, 1)
    return RoutingAgreement(
        same_sets=float((a == b).all(axis=2).mean()),
        overlap=float(overlap.mean()),
        chance=float(k.mean() / one.shape[2]),
        n_tokens=one.shape[0],
        n_layers=len(layers),
        layers=tuple(layers.tolist()),
        by_layer=tuple(overlap.mean(axis=0).tolist()),
    )


@dataclass(frozen=True, eq=False)
class Reference:
    """The selected experts and predictions of a model on a text.

    `selected` [n_tokens, n_layer, n_expert]: the experts of each token that counts. `logprobs` [n, n_vocab]: of the
    next token, for the first `n_predicted` documents.
    """

    documents: tuple[Document, ...]
    selected: npt.NDArray[np.bool_]
    n_predicted: int
    logprobs: npt.NDArray[np.float32]


def take_reference(evaluator: Evaluator, n_tokens: int, show: Callable[[int, int], None] | None = None) -> Reference:
    """Run the evaluator's neutral text, or else its task's prompts, through its model, up to `n_tokens` that count.

    `show` is called with (tokens done, tokens in all). Raises UsageError, NativeError.
    """
    documents = _documents(evaluator, n_tokens)
    n_vocab = int(evaluator.model._model.n_vocab())
    total = np.cumsum([document.n for document in documents])
    n_predicted = int((total * n_vocab <= _MAX_FLOATS).sum())
    if not n_predicted:  # a long document of a large vocabulary
        first = documents[0]
        n = max(1, _MAX_FLOATS // n_vocab)
        documents = (replace(first, tokens=first.tokens[: first.first + 1 + n]), *documents[1:])
        n_predicted = 1
    selected = _selected(evaluator, documents, show)
    rows = [row.astype(np.float32) for row in _logprobs(evaluator, documents[:n_predicted])]
    return Reference(documents, selected, n_predicted, np.concatenate(rows))


def compare_text(
    evaluator: Evaluator, reference: Reference, show: Callable[[int, int], None] | None = None
) -> tuple[RoutingAgreement, TextScore]:
    """Compare the evaluator's model with the reference: its routing, and how its predictions differ.

    The score's KL is KL(reference || this model). Raises UsageError, ModelMismatchError, NativeError.
    """
    routing = routing_agreement(reference.selected, _selected(evaluator, reference.documents, show))
    documents = reference.documents[: reference.n_predicted]
    targets = np.concatenate([document.tokens[document.first + 1 :] for document in documents])
    nll = kl = same = 0.0
    n = 0
    for row in _logprobs(evaluator, documents):
        base = reference.logprobs[n : n + len(row)].astype(np.float64)
        p = np.exp(base)
        kl += max(0.0, float((p * (base - row)).sum()))
        same += int((row.argmax(axis=1) == base.argmax(axis=1)).sum())
        nll -= float(row[np.arange(len(row)), targets[n : n + len(row)]].sum())
        n += len(row)
    return routing, TextScore(nll / n, kl / n, same / n, n)


def _documents(evaluator: Evaluator, n_tokens: int) -> tuple[Document, ...]:
    if evaluator.neutral is not None:
        return tuple(evaluator.neutral.documents(evaluator.renderer, evaluator.engine.n_ctx, n_tokens))
    found: list[Document] = []
    for item in evaluator.task.items:
        tokens = tuple(render(evaluator.renderer, evaluator.task, item).tokens)[: n_tokens + 1]
        if len(tokens) > 1:
            found.append(Document(tokens, 0))
            n_tokens -= len(tokens) - 1
        if n_tokens <= 0:
            break
    if not found:
        raise UsageError(f"{evaluator.task.name}: no prompt of two tokens or more, so no text to compare routing on")
    return tuple(found)


def _selected(
    evaluator: Evaluator, documents: tuple[Document, ...], show: Callable[[int, int], None] | None
) -> npt.NDArray[np.bool_]:
    # the last token of a document predicts nothing, so only its routing would be known
    texts = [(document.tokens, document.first, len(document.tokens) - 1) for document in documents]
    total, done, parts = sum(document.n for document in documents), 0, []
    for part in selected_experts(evaluator.model, texts, **evaluator.context_arguments):
        parts.append(part)
        done += len(part)
        if show:
            show(done, total)
    return np.concatenate(parts)


def _logprobs(evaluator: Evaluator, documents: tuple[Document, ...]) -> Iterator[npt.NDArray[np.float64]]:
    """Log-probabilities of the next token, [n, n_vocab] at a time."""
    for document in documents:
        for _, logits in evaluator.engine.logits([None], document.tokens, document.first):
            yield log_probabilities(logits)[0]
