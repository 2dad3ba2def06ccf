"""Records routing counts on contrastive pairs: the activations a and tokens N of arXiv 2509.09660, Eq. 3."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError, NativeError, PairsError, UsageError
from ..identity import ModelIdentity
from ..llama import capi
from ..llama.loaded_model import can_share, loaded_identity, open_model
from ..llama.rendering import Renderer
from ..llama.template_date import may_lack
from ..maps.counts import RoutingCounts, Source
from ..maps.stability import Stability
from ..pairs.pairs import SIDES, Pair, PairsFile, in_fixed_order, pairs_digest
from .batches import PairBatch, PairBatches
from .checkpoint import Checkpoint, CheckpointFile, PairRecords, Tables
from .decoding import GroupDecoder
from .pooling import add_counts, pooled_sums, split_pairs, times_counted
from .recording_options import PairSink, RecordingOptions, RecordingProgress
from .stopping import StabilityCheck
from .target_phases import TargetPhases

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PhaseCounts:
    """Counts of a run whose targets were split: of all tokens, and by the names of the phases, in their order.

    A phase that had no tokens on a side is in `missing`, with the sentence that says so and the cure.
    """

    whole: RoutingCounts
    phases: Mapping[str, RoutingCounts] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


def record_counts(
    model: str | os.PathLike[str] | Any,
    pairs: Iterable[Pair] | PairsFile,
    options: RecordingOptions | None = None,
    *,
    checkpoint: CheckpointFile | None = None,
    per_pair: Callable[[ModelIdentity, str], PairSink] | None = None,
    on_skip: Callable[[Pair, str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_batch: Callable[[RecordingProgress], None] | None = None,
    **fields: Any,
) -> RoutingCounts:
    """Run pairs through a model, unsteered, and count the experts that the targets' tokens select.

    Args:
        model: path of a GGUF model, or a `llama_cpp.Llama` whose weights are shared (its context is not touched).
        pairs: contrastive pairs, see `load_pairs`; a `PairsFile` is read as it is needed, whatever its size.
        options: how to run them. Its fields may also be given as keywords: `record_counts(llama, pairs, n_batch=256)`.
        checkpoint: where the counts so far are kept, after every batch. If it exists, the run goes on from it; the
            result is the same to the bit. Remove it when the result is saved.
        per_pair: called once with the identity and the pairs' digest; what it returns takes each pair's counts, in
            order. With a checkpoint it gets them all at the end.
        on_skip: called with a pair that cannot be counted, and why; the run goes on without it. None: raise.
        progress: called with (prompts done, prompts in all).
        on_batch: called before the first batch, with what an earlier run has done, and after every batch.

    Returns: counts with a1, a2 [n_layer, n_expert] and N1, N2, and the sums of what the routers computed for the same
    tokens, unless a router overflowed.

    Raises ModelError (not a MoE model), PairsError (a target that cannot be located; a prompt longer than n_ctx; no
    pair that could be counted), UsageError (no pairs; a checkpoint of another run; a phase), BusyError (another process
    is at the checkpoint's output), StorageError (no room for the checkpoint), NativeError.
    """
    options = replace(options or RecordingOptions(), **fields)
    if options.phase is not None:
        raise UsageError("phase: gives counts of each phase; call record_phases")
    sinks = None if per_pair is None else lambda identity, digest, _: per_pair(identity, digest)
    return _recorded(model, pairs, options, checkpoint, sinks, on_skip, progress, on_batch).whole


def record_phases(
    model: str | os.PathLike[str] | Any,
    pairs: Iterable[Pair] | PairsFile,
    options: RecordingOptions | None = None,
    *,
    checkpoint: CheckpointFile | None = None,
    per_pair: Callable[[ModelIdentity, str, str], PairSink] | None = None,
    on_skip: Callable[[Pair, str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_batch: Callable[[RecordingProgress], None] | None = None,
    **fields: Any,
) -> PhaseCounts:
    """`record_counts` in one pass for all tokens of the targets and for those of two phases, `options.phase`.

    The counts of the phases add up to those of all tokens. `per_pair` is called for all tokens (with "") and for each
    phase (with its name). Every pair counts as one of the phase, also one whose targets have no token there.

    Raises as `record_counts`, and UsageError without a phase, and for a model whose chat template marks no reasoning.
    """
    options = replace(options or RecordingOptions(), **fields)
    if options.phase is None:
        raise UsageError("phase: missing; give a PhaseSplit, or call record_counts")
    return _recorded(model, pairs, options, checkpoint, per_pair, on_skip, progress, on_batch)


def _recorded(
    model: Any,
    pairs: Iterable[Pair] | PairsFile,
    options: RecordingOptions,
    checkpoint: CheckpointFile | None,
    per_pair: Callable[[ModelIdentity, str, str], PairSink] | None,
    on_skip: Callable[[Pair, str], None] | None,
    progress: Callable[[int, int], None] | None,
    on_batch: Callable[[RecordingProgress], None] | None,
) -> PhaseCounts:
    source: Collection[Pair] = pairs if isinstance(pairs, PairsFile) else list(pairs)
    if not len(source):
        raise UsageError("no pairs to record; give at least one")
    if not options.pairs_before(len(source)):
        raise UsageError(f"shard {options.shard[0]}/{options.shard[1]}: empty, there are only {len(source)} pairs")

    def report(done: RecordingProgress) -> None:
        if progress:
            progress(2 * done.n_done, 2 * done.n_total)
        if on_batch:
            on_batch(done)

    with checkpoint or contextlib.nullcontext(), _llama_model(model, options) as native_model:
        recording = _Recording(native_model, source, options, checkpoint, per_pair)
        return recording.run(on_skip, report)


class _Recording:
    """One run: its counts so far, and the checkpoint and sink that they are written to."""

    def __init__(
        self,
        model: Any,
        source: Collection[Pair],
        options: RecordingOptions,
        checkpoint: CheckpointFile | None,
        per_pair: Callable[[ModelIdentity, str, str], PairSink] | None,
    ) -> None:
        self._digest = source.digest if isinstance(source, PairsFile) else pairs_digest(source)
        if options.until_stable is not None:
            source = in_fixed_order(source)
        self._model, self._source, self._options, self._checkpoint = model, source, options, checkpoint
        self._identity = loaded_identity(model)
        self._renderer = Renderer(
            model, thinking=options.thinking, template_arguments=options.template_arguments, date=options.date
        )
        self._share = options.share_prefixes and can_share(model)
        self._settings = self._all_settings(per_pair is not None)
        shape = self._identity.shape
        self._names = () if options.phase is None else options.phase.names
        self._part_of: TargetPhases | None = None
        if options.phase is not None:
            self._part_of = TargetPhases(options.phase, self._renderer.template, model.vocab)
        self._counted = Checkpoint(**vars(Tables.zeros(shape)), phases=[Tables.zeros(shape) for _ in self._names])
        if checkpoint is not None and checkpoint.exists():
            lacks = may_lack(self._renderer.date_given)
            self._counted = checkpoint.load(self._settings, shape, lacks, n_phases=len(self._names))
        self._sinks: list[PairSink] = []
        if per_pair is not None:
            self._sinks = [per_pair(self._identity, self._digest, name) for name in ("", *self._names)]
        self._check: StabilityCheck | None = None
        if options.until_stable is not None:
            self._check = StabilityCheck(options.until_stable, len(source), shape)
            if checkpoint is not None:
                for records in checkpoint.records(self._counted.journal, shape, len(self._names)):
                    self._check.add(records.of().a, records.of().n)
        self._n_tokens = self._n_decoded = 0

    def run(
        self, on_skip: Callable[[Pair, str], None] | None, report: Callable[[RecordingProgress], None]
    ) -> PhaseCounts:
        options, counted = self._options, self._counted
        if not isinstance(next(iter(self._source)).positive, str) and self._renderer.has_template:
            self._renderer.check_template()  # one line, not one for each pair
        batches = PairBatches(
            self._source, options.shard, self._renderer, options.n_ctx, on_skip, options.span, self._part_of
        )
        report(self._progress())  # how much there is, before the first batch
        n_parts = len(self._names) or 1
        with GroupDecoder(self._model, self._identity.shape, options.context, sums=True, n_parts=n_parts) as decoder:
            if self._share:
                decoder.kept = batches.common_beginning(options.n_batch)
            looks = self._check.looks if self._check else ()
            stopped = self._check.stopped() if self._check else None  # a resumed run repeats its checks
            following = batches.following(
                counted.next, decoder, options.n_batch, self._share, n_counted=counted.n_pairs, ends=looks
            )
            while stopped is None and (batch := next(following, None)) is not None:
                self._count(batch, decoder)
                report(self._progress())
                stopped = self._check.stopped() if self._check else None
        if not counted.n_pairs:
            if self._checkpoint is not None:
                self._checkpoint.remove()  # another start would skip them all the same
            n_total = options.pairs_before(len(self._source))
            raise PairsError(f"none of the {n_total} pairs could be counted; see why each was skipped")
        self._give_kept_records()
        return self._result(stopped or (self._check.ended() if self._check else None))

    def _all_settings(self, has_sink: bool) -> dict[str, Any]:
        """Everything that changes the counts: a checkpoint made under other settings is refused."""
        options = self._options
        return {
            **_model_settings(self._model, self._identity),
            "pairs": self._digest,
            "behaviour": options.behaviour,
            "shard": list(options.shard),
            "n_ctx": options.n_ctx,
            "n_batch": options.n_batch,
            "n_ubatch": options.n_ubatch,
            "type_k": options.type_k,
            "type_v": options.type_v,
            "flash_attn": options.flash_attn,
            "template_arguments": self._renderer.template_arguments,
            "share_prefixes": self._share,
            "per_pair": has_sink,
            **({} if self._renderer.date is None else {"date": self._renderer.date}),
            **({} if options.until_stable is None else {"until_stable": asdict(options.until_stable)}),
            **({} if options.span is None else {"over": str(options.span)}),
            **({} if options.phase is None else {"phase": str(options.phase)}),
        }

    def _progress(self) -> RecordingProgress:
        options, counted = self._options, self._counted
        return RecordingProgress(
            options.pairs_before(counted.next),
            options.pairs_before(len(self._source)),
            counted.n_skipped,
            self._n_tokens,
            self._n_decoded,
        )

    def _count(self, batch: PairBatch, decoder: GroupDecoder) -> None:
        """Decode a batch, add its counts, and keep them. Nothing is added when decoding fails."""
        shape, counted = self._identity.shape, self._counted
        n_phases = len(self._names)
        records = PairRecords.zeros(np.array([item.index for item in batch.items], np.int64), shape, n_phases)
        added = [Tables.zeros(shape) for _ in ("", *self._names)]
        for group, owners in batch.groups:
            counts, tokens = decoder.count(group)
            self._n_decoded += len(group.tokens)
            sums = decoder.sums(len(group.members))
            for phase, tables in zip((None, *range(n_phases)), added, strict=True):
                times = times_counted(group, owners, phase)
                add_counts(tables, counts, tokens, times)
                tables.sums += pooled_sums(sums, times)
            if self._sinks or self._check is not None:
                split_pairs(records, counts, tokens, group, owners)
        self._n_tokens += sum(len(prompt.tokens) for item in batch.items for prompt in item.prompts)
        for total, tables in zip((counted, *counted.phases), added, strict=True):
            total.add(tables)
        counted.n_pairs += len(batch.items)
        counted.n_skipped += batch.n_skipped
        counted.next = batch.next
        if self._check is not None:
            self._check.add(records.of().a, records.of().n)
        if self._checkpoint is not None:
            if (self._sinks or self._check is not None) and batch.items:
                counted.journal = self._checkpoint.append(records, counted.journal)
            self._checkpoint.save(counted, self._settings)
        else:
            self._give([item.pair.id for item in batch.items], records)

    def _give(self, ids: Sequence[str], records: PairRecords) -> None:
        """Give the sinks some pairs."""
        for phase, sink in zip((None, *range(len(self._names))), self._sinks, strict=False):
            part = records.of(phase)
            sink.append(ids, part.a, part.n)

    def _give_kept_records(self) -> None:
        """Give the sinks the per-pair counts that the checkpoint's journal holds, in the order of the pairs."""
        if self._checkpoint is None or not self._sinks:
            return
        pairs = enumerate(self._source)

        def id_of(wanted: int) -> str:  # asked for in ascending order
            return next(pair.id for index, pair in pairs if index == wanted)

        for records in self._checkpoint.records(self._counted.journal, self._identity.shape, len(self._names)):
            self._give([id_of(index) for index in records.indices.tolist()], records)

    def _result(self, stability: Stability | None) -> PhaseCounts:
        counted, split = self._counted, self._options.phase
        whole = self._counts(counted, stability, "")
        phases: dict[str, RoutingCounts] = {}
        missing: dict[str, str] = {}
        for name, tables in zip(self._names, counted.phases, strict=True):
            assert split is not None
            empty = [side for side, n in zip(SIDES, tables.n, strict=True) if not n.any()]
            if empty:
                missing[name] = split.missing(name, empty[0])
            else:
                phases[name] = self._counts(tables, None, name)
        for name in ("a", "n") if counted.phases else ():
            if not np.array_equal(sum(getattr(tables, name) for tables in counted.phases), getattr(counted, name)):
                raise NativeError("the counts of the phases are not those of all tokens together; report this")
        return PhaseCounts(whole, phases, missing)

    def _counts(self, tables: Tables, stability: Stability | None, phase: str) -> RoutingCounts:
        counted = self._counted
        moe_layers = np.flatnonzero(counted.n.any(axis=0))
        if not len(moe_layers):
            raise ModelError("no layer of the model routed a token; it cannot be steered")
        seen = tables.n[:, moe_layers]
        if (seen != seen[:, :1]).any():
            raise NativeError(f"the layers saw different numbers of tokens: {seen.tolist()}; report this")
        source = Source(self._digest, self._options.shard, counted.n_pairs, counted.n_skipped)
        result = RoutingCounts(
            identity=self._identity,
            a1=tables.a[0],
            a2=tables.a[1],
            n1=int(seen[0, 0]),
            n2=int(seen[1, 0]),
            moe_layers=tuple(int(layer) for layer in moe_layers),
            pairs_digest=(source.pairs_sha256,),
            n_pairs=counted.n_pairs,
            behaviour=self._options.behaviour,
            sources=(source,),
            dates=() if self._renderer.date is None else (self._renderer.date,),
            stability=stability,
            sums=tables.sums if tables.sums.is_finite else None,
            phase=phase,
        )
        result.validate("recorded counts")
        return result


@contextlib.contextmanager
def _llama_model(model: Any, options: RecordingOptions) -> Iterator[Any]:
    """llama_cpp's `LlamaModel` of a path, closed at the end, or that of a `Llama`."""
    if isinstance(model, capi.llama_cpp().Llama):
        yield model._model
        return
    n_gpu_layers = 0x7FFFFFFF if options.n_gpu_layers == -1 else options.n_gpu_layers
    placed = {"n_gpu_layers": n_gpu_layers, "use_extra_bufts": options.repack}
    with open_model(model, verbose=options.verbose, **placed) as opened:
        yield opened


def _model_settings(model: Any, identity: ModelIdentity) -> dict[str, str]:
    """Facts that differ between two files of one model: quantizations have the same routers."""
    lib = capi.llama_cpp()
    size = int(lib.llama_model_size(model.model))
    metadata = json.dumps(model.metadata(), sort_keys=True).encode("utf-8", "replace")
    return {
        "model": identity.short,
        "model file": f"{model.desc()}, {size} bytes",
        "model metadata": hashlib.sha256(metadata).hexdigest(),
    }
