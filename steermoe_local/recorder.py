"""Routing counts of a model on contrastive pairs: the activations a and tokens N of arXiv 2509.09660, Eq. 3."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import _native
from ._rendering import Prompt, Renderer
from .counts import RoutingCounts
from .errors import ModelError, NativeError, PairsError, UsageError
from .identity import ModelIdentity
from .pairs import Pair, pairs_digest

__all__ = ["record_counts"]

_POSITIVE, _NEGATIVE = 0, 1
_MAX_SEQUENCES = 16


@dataclass(frozen=True)
class _Item:
    prompt: Prompt
    bin: int

    def bins(self) -> list[int]:
        bins = [-1] * len(self.prompt.tokens)
        for index in self.prompt.target:
            bins[index] = self.bin
        return bins


def record_counts(
    model: str | os.PathLike[str] | Any,
    pairs: Iterable[Pair],
    *,
    behaviour: str = "",
    n_ctx: int = 0,
    n_batch: int = 512,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    type_k: int | None = None,
    type_v: int | None = None,
    flash_attn: bool = False,
    progress: Callable[[int, int], None] | None = None,
    verbose: bool = False,
) -> RoutingCounts:
    """Run the pairs through a model, unsteered, and count the experts that the targets' tokens select.

    Args:
        model: path of a GGUF model, or a `llama_cpp.Llama` whose weights are shared (its context is not touched).
        pairs: contrastive pairs, see `load_pairs`.
        behaviour: name kept in the counts.
        n_ctx: longest prompt in tokens; 0 takes the longest of the pairs.
        n_batch: tokens of one llama_decode. Short prompts share one as parallel sequences.
        n_ubatch, n_threads, n_gpu_layers, type_k, type_v, flash_attn: as in `llama_cpp.Llama`.
        progress: called with (prompts done, prompts in all).
        verbose: let llama.cpp log to stderr.

    Returns: counts with a1, a2 [n_layer, n_expert] and N1, N2.

    Raises ModelError (not a MoE model), PairsError (a target that cannot be located; a prompt longer than n_ctx),
    UsageError (no pairs), NativeError.
    """
    pairs = list(pairs)
    if not pairs:
        raise UsageError("no pairs to record; give at least one")
    if n_batch < 1 or n_ubatch < 1 or n_ctx < 0:
        raise UsageError("n_batch and n_ubatch must be at least 1, n_ctx at least 0")
    with contextlib.ExitStack() as stack:
        native_model = _open_model(model, n_gpu_layers, verbose, stack)
        identity = _identity(native_model)
        items = list(_items(pairs, Renderer(native_model)))
        longest = max(len(item.prompt.tokens) for item in items)
        if n_ctx and longest > n_ctx:
            worst = max(range(len(items)), key=lambda i: len(items[i].prompt.tokens))
            raise PairsError(
                f"pair {pairs[worst // 2].id!r} needs {longest} tokens of context, but n_ctx is {n_ctx}; "
                f"raise it (-c {longest}) or leave it 0"
            )
        recorder = _native.NativeRecorder(native_model.model, 2, identity.shape)
        stack.callback(recorder.close)
        # llama.cpp aborts on more sequences than batch tokens
        n_sequences = min(_MAX_SEQUENCES, n_batch)
        params = _native.parallel_context_params(max(longest, n_batch), n_batch, n_sequences, n_threads)
        params.n_ubatch = min(n_ubatch, n_batch)
        params.flash_attn_type = 1 if flash_attn else 0
        if type_k is not None:
            params.type_k = type_k
        if type_v is not None:
            params.type_v = type_v
        recorder.install(params)
        ctx = _native.new_context(native_model.model, params)
        stack.callback(_native.llama_cpp().llama_free, ctx)
        recorder.bind(ctx)
        recorder.set_stop(True)  # nobody reads this context's logits
        _run(ctx, recorder, items, n_batch, progress or (lambda done, total: None))
        return _collect(recorder, identity, pairs, behaviour)


def _open_model(model: Any, n_gpu_layers: int, verbose: bool, stack: contextlib.ExitStack) -> Any:
    """llama_cpp's `LlamaModel` of a path or of a `Llama`."""
    lib = _native.llama_cpp()
    if isinstance(model, lib.Llama):
        return model._model
    path = Path(model)
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the path of a GGUF model")
    from llama_cpp import _internals
    from llama_cpp._logger import set_verbose

    set_verbose(verbose)
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0x7FFFFFFF if n_gpu_layers == -1 else n_gpu_layers
    with _native.loading(path):
        opened = _internals.LlamaModel(path_model=str(path), params=params, verbose=verbose)
    return stack.enter_context(contextlib.closing(opened))


def _identity(model: Any) -> ModelIdentity:
    """Identity of a loaded model, from llama.cpp's own view of it."""
    metadata = model.metadata()
    architecture = metadata.get("general.architecture", "")
    n_expert = int(metadata.get(f"{architecture}.expert_count", 0))
    if not n_expert:
        raise ModelError(f"this {architecture} model has no experts; only Mixture-of-Experts models route")
    return ModelIdentity(
        architecture=architecture,
        n_layer=int(_native.llama_cpp().llama_model_n_layer(model.model)),
        n_expert=n_expert,
        n_expert_used=int(metadata[f"{architecture}.expert_used_count"]),
        router_sha256=_native.router_sha256(model.model),
    )


def _items(pairs: Sequence[Pair], renderer: Renderer) -> Iterator[_Item]:
    for pair in pairs:
        for bin_, (side, target) in zip((_POSITIVE, _NEGATIVE), pair.sides(), strict=True):
            try:
                yield _Item(renderer.prompt(side, target), bin_)
            except PairsError as error:
                name = "positive" if bin_ == _POSITIVE else "negative"
                raise PairsError(f"pair {pair.id!r}, {name}: {error}") from None


def _run(
    ctx: Any,
    recorder: _native.NativeRecorder,
    items: Sequence[_Item],
    n_batch: int,
    progress: Callable[[int, int], None],
) -> None:
    """Decode all prompts, several short ones at a time, long ones in pieces."""
    lib = _native.llama_cpp()
    memory = lib.llama_get_memory(ctx)
    batch = lib.llama_batch_init(n_batch, 0, 1)
    try:
        done = 0
        while done < len(items):
            group = _next_group(items, done, n_batch)
            lib.llama_memory_clear(memory, True)
            rows = [
                (token, position, sequence, bin_)
                for sequence, item in enumerate(group)
                for position, (token, bin_) in enumerate(zip(item.prompt.tokens, item.bins(), strict=True))
            ]
            for start in range(0, len(rows), n_batch):
                part = rows[start : start + n_batch]
                recorder.set_mask([bin_ for _, _, _, bin_ in part])
                # The last layer routes only outputs, so every counted token must be one.
                _native.decode(ctx, batch, [(*row[:3], row[3] >= 0) for row in part])
            done += len(group)
            progress(done, len(items))
    finally:
        lib.llama_batch_free(batch)


def _next_group(items: Sequence[_Item], first: int, n_batch: int) -> Sequence[_Item]:
    last, room = first + 1, n_batch - len(items[first].prompt.tokens)
    while last < len(items) and last - first < _MAX_SEQUENCES and len(items[last].prompt.tokens) <= room:
        room -= len(items[last].prompt.tokens)
        last += 1
    return items[first:last]


def _collect(
    recorder: _native.NativeRecorder, identity: ModelIdentity, pairs: Sequence[Pair], behaviour: str
) -> RoutingCounts:
    raw_counts, raw_tokens = recorder.counts()
    counts = np.ctypeslib.as_array(raw_counts).reshape(2, *identity.shape)
    tokens = np.ctypeslib.as_array(raw_tokens).reshape(2, identity.n_layer)
    moe_layers = np.flatnonzero(tokens.any(axis=0))
    if not len(moe_layers):
        raise ModelError("no layer of the model routed a token; it cannot be steered")
    seen = tokens[:, moe_layers]
    if (seen != seen[:, :1]).any():
        raise NativeError(f"the layers saw different numbers of tokens: {seen.tolist()}; report this")
    result = RoutingCounts(
        identity=identity,
        a1=counts[_POSITIVE],
        a2=counts[_NEGATIVE],
        n1=int(seen[_POSITIVE, 0]),
        n2=int(seen[_NEGATIVE, 0]),
        moe_layers=tuple(int(layer) for layer in moe_layers),
        pairs_digest=(pairs_digest(pairs),),
        n_pairs=len(pairs),
        behaviour=behaviour,
    )
    result.validate("recorded counts")
    return result
