"""Records routing counts on contrastive pairs: the activations a and tokens N of arXiv 2509.09660, Eq. 3."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ModelError, NativeError, PairsError, UsageError
from ..identity import ModelIdentity
from ..llama import capi
from ..llama.loaded_model import can_share, loaded_identity, open_model
from ..llama.rendering import Renderer
from ..llama.template_date import AnyDate, may_lack
from ..maps.counts import RoutingCounts, Source
from ..maps.map_phases import PhaseSplit
from ..maps.routing_sums import RoutingSums
from ..maps.stability import Stability, UntilStable
from ..pairs.pairs import SIDES, Pair, PairsFile, in_fixed_order, pairs_digest
from .batches import Owners, PairBatch, PairBatches
from .checkpoint import Checkpoint, CheckpointFile, PairRecords, Tables
from .decoding import ContextOptions, GroupDecoder
from .grouping import Group
from .spans import ConditionSpan
from .stopping import StabilityCheck
from .target_phases import TargetPhases

Int64 = npt.NDArray[np.int64]


class PairSink(Protocol):
    """Receiver of per-pair counts, for example `PairCountsWriter`."""

    def append(self, pair_ids: Sequence[str], a: npt.ArrayLike, n: npt.ArrayLike) -> None:
        """Add some pairs: `a` [pairs, 2, n_layer, n_expert], `n` [pairs, 2]; positive, negative."""


@dataclass(frozen=True)
class RecordingProgress:
    """Progress of a run. Pairs of an earlier, interrupted run count as done, their tokens do not."""

    n_done: int  # pairs counted or skipped
    n_total: int  # pairs of the run (of its shard)
    n_skipped: int
    n_tokens: int  # of the prompts that this process worked on, up to the targets' ends
    n_decoded: int  # tokens that this process computed; fewer where prompts share their beginning


@dataclass(frozen=True)
class RecordingOptions:
    """How `record_counts` runs the pairs.

    Attributes:
        behaviour: name kept in the counts.
        n_ctx: longest prompt in tokens; 0 takes the longest of the pairs.
        n_batch: tokens of one llama_decode. Short prompts share one as parallel sequences.
        n_ubatch, n_threads, n_gpu_layers, type_k, type_v: as in `llama_cpp.Llama`.
        flash_attn: use flash attention, which is faster for prompts; "auto": where the backend has it. Where two router
            logits are nearly equal, another expert may be counted than without it.
        thinking, template_arguments: the chat template's switch for thinking, and further variables for it.
        date: for templates that print one (a `datetime.date`, or YYYY-MM-DD). None: that of the run's start.
        share_prefixes: compute what prompts begin with once. The mathematics is the same; float rounding may differ, as
            it does between any two batch sizes. Models with recurrent layers never share.
        shard: (i, n): only pairs i, i + n, i + 2n, ... of the file, counted from 1.
        verbose: let llama.cpp log to stderr.
        repack: as in `SteeredLlama`, for a model that is given by its path.
        until_stable: end as soon as the first experts are settled; the pairs then come in an order that does not depend
            on their order in the file, and they and their counts are kept in memory. Not with a shard.
        span: count the tokens that a condition of a steering plan looks at, in place of the targets.
        phase: count the tokens of two phases of each target apart, too (`record_phases`).

    Raises UsageError for values outside their ranges.
    """

    behaviour: str = ""
    n_ctx: int = 0
    n_batch: int = 512
    n_ubatch: int = 512
    n_threads: int | None = None
    n_gpu_layers: int = 0
    type_k: int | None = None
    type_v: int | None = None
    flash_attn: bool | Literal["auto"] = "auto"
    thinking: bool = False
    template_arguments: Mapping[str, Any] | None = None
    date: AnyDate = None
    share_prefixes: bool = True
    shard: tuple[int, int] = (1, 1)
    verbose: bool = False
    repack: bool = True
    until_stable: UntilStable | None = None
    span: ConditionSpan | None = None
    phase: PhaseSplit | None = None

    def __post_init__(self) -> None:
        if self.n_batch < 1 or self.n_ubatch < 1 or self.n_ctx < 0:
            raise UsageError("n_batch and n_ubatch must be at least 1, n_ctx at least 0")
        if not 1 <= self.shard[0] <= self.shard[1]:
            raise UsageError(f"shard {self.shard[0]}/{self.shard[1]}: the first number is not from 1 to the second")
        if self.until_stable is not None and self.shard != (1, 1):
            raise UsageError(
                f"shard {self.shard[0]}/{self.shard[1]}: a shard alone cannot tell when all pairs are stable; "
                "leave out --shard or --until-stable"
            )

    @property
    def context(self) -> ContextOptions:
        """The part of the options that llama.cpp's context takes."""
        return ContextOptions(self.n_batch, self.n_ubatch, self.n_threads, self.type_k, self.type_v, self.flash_attn)

    def pairs_before(self, n_pairs: int) -> int:
        """How many of the first `n_pairs` pairs of a file belong to the shard."""
        return len(range(self.shard[0] - 1, n_pairs, self.shard[1]))


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
        on_batch: called after every batch.

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
        if counted.next:
            report(self._progress())
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
                sides = _sides(group, owners, phase)
                _pool(tables, counts, tokens, sides)
                tables.sums += _pooled_sums(sums, sides)
            if self._sinks or self._check is not None:
                _split(records, counts, tokens, group, owners)
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


def _sides(group: Group, owners: Owners, phase: int | None) -> Int64:
    """How often each bin counts for each side, int64 [2, bins]: of one phase of the targets, or of all tokens."""
    n_parts = group.members.shape[1] // len(owners)
    members = group.members.reshape(len(group.members), len(owners), n_parts)
    chosen = (
        np.asarray(members.any(axis=2)) if phase is None else members[:, :, phase]
    )  # a prompt has a row in one part only
    sides = np.array([side for _, side in owners])
    return np.stack([chosen[:, sides == side].sum(axis=1, dtype=np.int64) for side in (0, 1)])


def _pooled_sums(sums: Sequence[npt.NDArray[np.float64]], times: Int64) -> RoutingSums:
    """The sums of a group's sides. The bins are added in their order, so that the same group has the same bits."""
    totals = []
    for table in sums:
        total = np.zeros((2, *table.shape[1:]))
        for side, number in np.argwhere(times):
            with np.errstate(invalid="ignore"):  # infinities of a router that overflowed
                total[side] += times[side, number] * table[number]
        totals.append(total)
    return RoutingSums(*totals)


def _pool(tables: Tables, counts: Int64, tokens: Int64, times: Int64) -> None:
    """Add a group's counts to its sides."""
    tables.a += np.tensordot(times, counts, axes=1)
    tables.n += times @ tokens


def _split(records: PairRecords, counts: Int64, tokens: Int64, group: Group, owners: Owners) -> None:
    """Add a group's counts to the records of their pairs."""
    n_parts = group.members.shape[1] // len(owners)
    for column in range(group.members.shape[1]):
        item, side = owners[column // n_parts]
        at = (item, side) if records.n.ndim == 2 else (item, side, column % n_parts)
        mine = group.members[:, column]
        records.a[at] = counts[mine].sum(axis=0)
        records.n[at] = tokens[mine].sum(axis=0).max()
