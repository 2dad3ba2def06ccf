"""Splits the pairs of a recording into batches: prompts decoded together, with a checkpoint after each batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from ..errors import PairsError
from ..llama.rendering import Prompt, Renderer
from ..llama.tokenizing import common_prefix
from ..pairs.pairs import SIDES, Pair
from .decoding import GroupDecoder
from .grouping import Group, GroupBuilder
from .spans import ConditionSpan

_MIN_KEPT = 8  # a shorter common beginning is not worth a decode of its own


@dataclass(frozen=True)
class Item:
    """A pair and its two prompts."""

    index: int  # of the pair in the file
    pair: Pair
    prompts: tuple[Prompt, Prompt]
    parts: tuple[list[int], list[int]] | None = None  # of the targets' tokens; None: they are not divided


Owners = list[tuple[int, int]]
"""(item, side) of each prompt of a group."""


@dataclass(frozen=True)
class PairBatch:
    """Pairs that are counted between two checkpoints: one decode, or several for a pair that does not fit one."""

    items: list[Item]
    groups: list[tuple[Group, Owners]]
    n_skipped: int  # since the batch before
    next: int  # index of the first pair of the next batch


class PairBatches:
    """The pairs of a shard, rendered, in batches."""

    def __init__(
        self,
        source: Collection[Pair],
        shard: tuple[int, int],
        renderer: Renderer,
        n_ctx: int,
        on_skip: Callable[[Pair, str], None] | None,
        span: ConditionSpan | None = None,
        part_of: Callable[[Prompt], list[int]] | None = None,
    ) -> None:
        """`part_of` gives the part, 0 or 1, of each token of a target; None: targets are not divided."""
        self._source, self._shard, self._renderer = source, shard, renderer
        self._n_ctx, self._on_skip, self._span, self._part_of = n_ctx, on_skip, span, part_of

    def common_beginning(self, n_batch: int) -> list[int]:
        """The tokens that the shard's first prompts (a batch of them) begin with: mostly the chat template's own text.

        They are the same for every start of a run, so that a resumed run computes the same bits.
        """
        common: list[int] | None = None
        n_tokens = 0
        for _, pair in self._indexed(0):
            try:
                prompts = self._prompts(pair)
            except PairsError:
                continue
            for prompt in prompts:
                before = prompt.tokens[: min(prompt.target)]
                common = before if common is None else common[: common_prefix(common, before)]
                n_tokens += len(prompt.tokens)
            if n_tokens >= n_batch:
                break
        return common if common and len(common) >= _MIN_KEPT else []

    def following(
        self,
        first: int,
        decoder: GroupDecoder,
        n_batch: int,
        share: bool,
        *,
        n_counted: int = 0,
        ends: Collection[int] = (),
    ) -> Iterator[PairBatch]:
        """Batches from pair `first` on. Where one ends depends on the pairs and the settings only.

        `n_counted` pairs were counted before `first`; a batch ends after each number of counted pairs in `ends`.

        Raises PairsError for a pair that cannot be counted, unless `on_skip` takes it.
        """
        builder = GroupBuilder(
            n_rows=n_batch,
            n_prompts=decoder.n_prompts,
            n_bins=decoder.n_bins,
            kept=decoder.kept,
            share=share,
            n_parts=1 if self._part_of is None else 2,
        )
        items: list[Item] = []
        n_skipped = 0

        def batch(following: int) -> PairBatch:
            nonlocal items, n_skipped
            groups: list[tuple[Group, Owners]] = []
            if len(items) == 1 and self._n_ctx and builder.n_rows > max(n_batch, self._n_ctx):
                for side, prompt in enumerate(items[0].prompts):  # one side at a time fits
                    builder.clear()
                    builder.add([prompt], items[0].parts and [items[0].parts[side]])
                    groups.append((builder.build(), [(0, side)]))
            elif items:
                groups.append((builder.build(), [(item, side) for item in range(len(items)) for side in (0, 1)]))
            builder.clear()
            done = PairBatch(items, groups, n_skipped, following)
            items, n_skipped = [], 0
            return done

        for index, pair in self._indexed(first):
            try:
                prompts = self._prompts(pair)
            except PairsError as error:
                if self._on_skip is None:
                    raise PairsError(f"pair {pair.id!r}{error}") from None
                self._on_skip(pair, str(error).lstrip(", :"))
                n_skipped += 1
                continue
            parts = None if self._part_of is None else (self._part_of(prompts[0]), self._part_of(prompts[1]))
            if not builder.add(prompts, parts):
                yield batch(index)
                builder.add(prompts, parts)
            items.append(Item(index, pair, prompts, parts))
            n_counted += 1
            if n_counted in ends:
                yield batch(index + 1)
        if items or n_skipped:
            yield batch(len(self._source))

    def _indexed(self, first: int) -> Iterator[tuple[int, Pair]]:
        number, n_shards = self._shard
        for index, pair in enumerate(self._source):
            if index >= first and index % n_shards == number - 1:
                yield index, pair

    def _prompts(self, pair: Pair) -> tuple[Prompt, Prompt]:
        """Render both sides. Raises PairsError with a message that continues "pair ID"."""
        prompts = self._targets(pair) if self._span is None else self._span.prompts(self._renderer, pair)
        longest = max(len(prompt.tokens) for prompt in prompts)
        if self._n_ctx and longest > self._n_ctx:
            raise PairsError(
                f" needs {longest} tokens of context, but n_ctx is {self._n_ctx}; raise it (-c {longest}) or leave it 0"
            )
        return prompts

    def _targets(self, pair: Pair) -> tuple[Prompt, Prompt]:
        prompts = []
        for name, (side, target) in zip(SIDES, pair.sides(), strict=True):
            try:
                prompts.append(self._renderer.prompt(side, target))
            except PairsError as error:
                raise PairsError(f", {name}: {error}") from None
        return prompts[0], prompts[1]
