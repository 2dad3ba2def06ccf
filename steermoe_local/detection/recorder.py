"""Routing counts of a model on contrastive pairs: the activations a and tokens N of arXiv 2509.09660, Eq. 3."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ModelError, NativeError, PairsError, UsageError
from ..identity import ModelIdentity
from ..llama import capi
from ..llama.loaded_model import can_share, loaded_identity
from ..llama.rendering import Renderer
from ..maps.counts import RoutingCounts, Source
from ..pairs.pairs import Pair, PairsFile, pairs_digest
from .checkpoint import Checkpoint, CheckpointFile, PairRecords
from .decoding import ContextOptions, GroupDecoder
from .grouping import Group
from .steps import Owners, Steps

__all__ = ["PairSink", "RecordingProgress", "record_counts"]

Int64 = npt.NDArray[np.int64]


class PairSink(Protocol):
    """Where per-pair counts go; `pair_counts.PairCountsWriter` is one."""

    def append(self, pair_ids: Sequence[str], a: npt.ArrayLike, n: npt.ArrayLike) -> None:
        """Take some pairs: `a` [pairs, 2, n_layer, n_expert], `n` [pairs, 2]; positive, negative."""


@dataclass(frozen=True)
class RecordingProgress:
    """How far a run has come. Pairs of an earlier, interrupted run count as done, their tokens do not."""

    n_done: int  # pairs counted or skipped
    n_total: int  # pairs of the run (of its shard)
    n_skipped: int
    n_tokens: int  # of the prompts that this process worked on, up to the targets' ends
    n_decoded: int  # tokens that this process computed; fewer where prompts share their beginning


def record_counts(
    model: str | os.PathLike[str] | Any,
    pairs: Iterable[Pair] | PairsFile,
    *,
    behaviour: str = "",
    n_ctx: int = 0,
    n_batch: int = 512,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    type_k: int | None = None,
    type_v: int | None = None,
    flash_attn: bool | Literal["auto"] = False,
    thinking: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
    share_prefixes: bool = True,
    shard: tuple[int, int] = (1, 1),
    checkpoint: CheckpointFile | None = None,
    per_pair: Callable[[ModelIdentity, str], PairSink] | None = None,
    on_skip: Callable[[Pair, str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_batch: Callable[[RecordingProgress], None] | None = None,
    verbose: bool = False,
) -> RoutingCounts:
    """Run the pairs through a model, unsteered, and count the experts that the targets' tokens select.

    Args:
        model: path of a GGUF model, or a `llama_cpp.Llama` whose weights are shared (its context is not touched).
        pairs: contrastive pairs, see `load_pairs`; a `PairsFile` is read as it is needed, whatever its size.
        behaviour: name kept in the counts.
        n_ctx: longest prompt in tokens; 0 takes the longest of the pairs.
        n_batch: tokens of one llama_decode. Short prompts share one as parallel sequences.
        n_ubatch, n_threads, n_gpu_layers, type_k, type_v, flash_attn: as in `llama_cpp.Llama`.
        thinking, template_arguments: the chat template's switch for thinking, and further variables for it.
        share_prefixes: compute what prompts begin with once. It is the same mathematics; float rounding may differ, as
            it does between any two batch sizes. Models with recurrent layers never share.
        shard: (i, n): only pairs i, i + n, i + 2n, ... of the file, counted from 1.
        checkpoint: where the counts so far are kept, after every batch. If it exists, the run goes on from it; the
            result is the same to the bit. Remove it when the result is saved.
        per_pair: called once with the identity and the pairs' digest; what it returns takes each pair's counts, in
            order. With a checkpoint it gets them all at the end.
        on_skip: called with a pair that cannot be counted, and why; the run goes on without it. None: raise.
        progress: called with (prompts done, prompts in all).
        on_batch: called after every batch.
        verbose: let llama.cpp log to stderr.

    Returns: counts with a1, a2 [n_layer, n_expert] and N1, N2.

    Raises ModelError (not a MoE model), PairsError (a target that cannot be located; a prompt longer than n_ctx; no
    pair that could be counted), UsageError (no pairs; a checkpoint of another run), NativeError.
    """
    if n_batch < 1 or n_ubatch < 1 or n_ctx < 0:
        raise UsageError("n_batch and n_ubatch must be at least 1, n_ctx at least 0")
    if not 1 <= shard[0] <= shard[1]:
        raise UsageError(f"shard {shard[0]}/{shard[1]}: the first number is not from 1 to the second")
    source: Collection[Pair] = pairs if isinstance(pairs, PairsFile) else list(pairs)
    if not len(source):
        raise UsageError("no pairs to record; give at least one")
    digest = source.digest if isinstance(source, PairsFile) else pairs_digest(source)
    n_total = len(range(shard[0] - 1, len(source), shard[1]))
    if not n_total:
        raise UsageError(f"shard {shard[0]}/{shard[1]}: empty, there are only {len(source)} pairs")
    options = ContextOptions(n_batch, n_ubatch, n_threads, type_k, type_v, flash_attn)
    with contextlib.ExitStack() as stack:
        native_model = _open_model(model, n_gpu_layers, verbose, stack)
        identity = loaded_identity(native_model)
        renderer = Renderer(native_model, thinking=thinking, template_arguments=template_arguments)
        share = share_prefixes and can_share(native_model)
        settings: dict[str, Any] = {
            **_model_settings(native_model, identity),
            "pairs": digest,
            "behaviour": behaviour,
            "shard": list(shard),
            "n_ctx": n_ctx,
            "n_batch": n_batch,
            "n_ubatch": n_ubatch,
            "type_k": type_k,
            "type_v": type_v,
            "flash_attn": flash_attn,
            "template_arguments": renderer.template_arguments,
            "share_prefixes": share,
            "per_pair": per_pair is not None,
        }
        state = Checkpoint(np.zeros((2, *identity.shape), np.int64), np.zeros((2, identity.n_layer), np.int64))
        if checkpoint is not None and checkpoint.exists():
            state = checkpoint.load(settings, identity.shape)
        sink = per_pair(identity, digest) if per_pair else None

        run = Steps(source, shard, renderer, n_ctx, on_skip)
        decoder = stack.enter_context(GroupDecoder(native_model, identity.shape, options))
        if share:
            decoder.kept = run.common_beginning(n_batch)
        n_tokens = n_decoded = 0

        def report() -> None:
            done = len(range(shard[0] - 1, state.next, shard[1]))
            if progress:
                progress(2 * done, 2 * n_total)
            if on_batch:
                on_batch(RecordingProgress(done, n_total, state.n_skipped, n_tokens, n_decoded))

        if state.next:
            report()
        for step in run.steps(state.next, decoder, n_batch, share):
            records = PairRecords(
                np.array([item.place for item in step.items], np.int64),
                np.zeros((len(step.items), 2), np.int64),
                np.zeros((len(step.items), 2, *identity.shape), np.uint32),
            )
            a, n = np.zeros_like(state.a), np.zeros_like(state.n)
            for group, owners in step.groups:
                counts, tokens = decoder.count(group)
                n_decoded += len(group.tokens)
                _pool(a, n, counts, tokens, group, owners)
                if sink is not None:
                    _split(records, counts, tokens, group, owners)
            n_tokens += sum(len(prompt.tokens) for item in step.items for prompt in item.prompts)
            state.a += a
            state.n += n
            state.n_pairs += len(step.items)
            state.n_skipped += step.n_skipped
            state.next = step.next
            if checkpoint is not None:
                if sink is not None and step.items:
                    state.journal = checkpoint.append(records, state.journal)
                checkpoint.save(state, settings)
            elif sink is not None:
                sink.append([item.pair.id for item in step.items], records.a, records.n)
            report()
        if not state.n_pairs:
            if checkpoint is not None:
                checkpoint.remove()  # another start would skip them all the same
            raise PairsError(f"none of the {n_total} pairs could be counted; see why each was skipped")
        if checkpoint is not None and sink is not None:
            ids = _ids(source)
            for records in checkpoint.records(state.journal, identity.shape):
                sink.append([ids(int(place)) for place in records.places], records.a, records.n)
        return _result(state, identity, Source(digest, shard, state.n_pairs, state.n_skipped), behaviour)


def _open_model(model: Any, n_gpu_layers: int, verbose: bool, stack: contextlib.ExitStack) -> Any:
    """llama_cpp's `LlamaModel` of a path or of a `Llama`."""
    lib = capi.llama_cpp()
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
    with capi.loading(path):
        opened = _internals.LlamaModel(path_model=str(path), params=params, verbose=verbose)
    return stack.enter_context(contextlib.closing(opened))


def _model_settings(model: Any, identity: ModelIdentity) -> dict[str, str]:
    """What tells this file of a model from another one: quantizations share their routers."""
    lib = capi.llama_cpp()
    size = int(lib.llama_model_size(model.model))
    metadata = json.dumps(model.metadata(), sort_keys=True).encode("utf-8", "replace")
    return {
        "model": identity.short,
        "model file": f"{model.desc()}, {size} bytes",
        "model metadata": hashlib.sha256(metadata).hexdigest(),
    }


def _pool(a: Int64, n: Int64, counts: Int64, tokens: Int64, group: Group, owners: Owners) -> None:
    """Add a group's counts to its sides: `a` [2, n_layer, n_expert], `n` [2, n_layer]."""
    sides = np.array([side for _, side in owners])
    for side in (0, 1):
        times = group.members[:, sides == side].sum(axis=1, dtype=np.int64)
        a[side] += np.tensordot(times, counts, axes=1)
        n[side] += times @ tokens


def _split(records: PairRecords, counts: Int64, tokens: Int64, group: Group, owners: Owners) -> None:
    """Put a group's counts to their pairs."""
    for prompt, (item, side) in enumerate(owners):
        mine = group.members[:, prompt]
        records.a[item, side] = counts[mine].sum(axis=0)
        records.n[item, side] = tokens[mine].sum(axis=0).max()


def _ids(source: Iterable[Pair]) -> Callable[[int], str]:
    """Ids of pairs by place, asked for in ascending order."""
    pairs = enumerate(source)

    def id_of(wanted: int) -> str:
        return next(pair.id for place, pair in pairs if place == wanted)

    return id_of


def _result(state: Checkpoint, identity: ModelIdentity, source: Source, behaviour: str) -> RoutingCounts:
    moe_layers = np.flatnonzero(state.n.any(axis=0))
    if not len(moe_layers):
        raise ModelError("no layer of the model routed a token; it cannot be steered")
    seen = state.n[:, moe_layers]
    if (seen != seen[:, :1]).any():
        raise NativeError(f"the layers saw different numbers of tokens: {seen.tolist()}; report this")
    result = RoutingCounts(
        identity=identity,
        a1=state.a[0],
        a2=state.a[1],
        n1=int(seen[0, 0]),
        n2=int(seen[1, 0]),
        moe_layers=tuple(int(layer) for layer in moe_layers),
        pairs_digest=(source.pairs_sha256,),
        n_pairs=state.n_pairs,
        behaviour=behaviour,
        sources=(source,),
    )
    result.validate("recorded counts")
    return result
