"""Estimates the effects of experts on a behaviour by random interventions (docs/attribution.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..evaluation.tasks.neutral_text import Document, NeutralText
from ..generation.answer_file import AnswerFile
from ..llama.rendering import Renderer
from ..llama.steered_llama import SteeredLlama
from ..maps.effects import ACTIONS, Attribution, Effects
from ..maps.expert_map import ExpertMap
from ..maps.significance import benjamini_hochberg
from ..pairs.pairs import Pair
from ..steering.bias_file import BiasFile
from .decoding import InterventionDecoder
from .design import Candidates, Design, choose_candidates, default_rate
from .estimates import Estimates, agreement, estimate, least_draws
from .items import Item, as_items, digest, split
from .options import DecoderOptions
from .parts import Parts, Progress
from .texts import documents, n_tokens

FloatArray = npt.NDArray[np.float64]

AUTO = "auto"
STABLE = 0.8
"""Agreement that ends a run with draws "auto", in two checks one after the other."""
_MOST = 16  # draws "auto" takes at most, for each candidate
_BLOCK = 64  # draws that are computed together
_LEAST_AUTO = 128


@dataclass(frozen=True)
class AttributionOptions(DecoderOptions):
    """How `attribute` estimates effects, beside the options of the context.

    Attributes:
        n_candidates: experts with the largest |RD|; as many others are drawn at random as control.
        draws: random interventions of each action, or "auto": until the first experts are stable.
        n_items: items that are used, half of them to confirm; None: all.
        actions: "promote", "suppress", or both.
        rate: probability with which a draw takes a candidate; None: 0.12, or less (`design.default_rate`).
        steer: "answer": the prompt is computed once, unsteered; "all": the prompt is steered, too.
        n_text: tokens of the neutral text that count.
        first: how many experts of each action are compared by "auto", and confirmed.
        seed: of candidates, items and draws.

    Raises UsageError for values outside their ranges.
    """

    n_candidates: int = 32
    draws: int | Literal["auto"] = "auto"
    n_items: int | None = None
    actions: tuple[str, ...] = tuple(ACTIONS)
    rate: float | None = None
    steer: Literal["answer", "all"] = "answer"
    n_text: int = 96
    first: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        self._require_whole("n_candidates", "n_text", "first", "n_batch")
        if self.draws != AUTO and (type(self.draws) is not int or self.draws < 1):
            raise UsageError(f'draws: {self.draws!r} is neither "auto" nor a whole number from 1 up')
        if self.n_items is not None and (type(self.n_items) is not int or self.n_items < 1):
            raise UsageError(f"n_items: {self.n_items!r} is not a whole number from 1 up")
        if not self.actions or len(set(self.actions)) < len(self.actions) or set(self.actions) - set(ACTIONS):
            raise UsageError(f"actions: {self.actions!r} are not promote, suppress, or both")
        if self.rate is not None and not 0 < self.rate < 1:
            raise UsageError(f"rate: {self.rate!r} is not between 0 and 1")
        if self.steer not in ("answer", "all"):
            raise UsageError(f"steer: {self.steer!r} is neither answer nor all")

    def settings(self) -> dict[str, Any]:
        """What results depend on, as plain JSON values. The number of draws is not in it: more can be added."""
        without = {"draws", "n_threads", "first"}
        return {name: value for name, value in asdict(self).items() if name not in without}


def attribute(
    llama: SteeredLlama,
    items: Iterable[Item] | Iterable[Pair],
    expert_map: ExpertMap,
    *,
    response: str = "pairs",
    neutral: NeutralText | None = None,
    renderer: Renderer | None = None,
    options: AttributionOptions | None = None,
    kept: AnswerFile | None = None,
    resume: bool = False,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
    **fields: Any,
) -> ExpertMap:
    """Estimate which experts cause a behaviour; returns the map with `effects`.

    Args:
        llama: the model; its own context is not touched.
        items: what the response is measured on: pairs of one prompt and two answers, or what `items.pair_items` and
            `items.task_items` make.
        expert_map: the map whose first experts are the candidates.
        response: "pairs" or the task's name, for the map.
        neutral: text on which the cost is measured, None: no costs.
        renderer: of pairs and of the neutral text; None: the model's.
        options: how. Its fields may also be given as keywords: `attribute(llama, items, m, draws=400)`.
        kept: where finished parts are kept; with `resume` the run goes on from it, to the bit.
        metadata: further facts that the results depend on, as JSON values.
        progress: called with (what, steps done, steps at most).
        log: called with a line on what is being done.

    Raises UsageError (too few draws, items, candidates), ModelMismatchError (the map is of another model), ModelError,
    NativeError, StorageError.
    """
    chosen = replace(options or AttributionOptions(), **fields)
    run = _Run(llama, as_items(items, renderer, llama), expert_map, response, neutral, renderer, chosen)
    with run:
        run.open(kept, resume, metadata or {}, progress or (lambda *_: None), log or (lambda _: None))
        effects = run.effects()
    recommended = expert_map.recommended
    if recommended is not None and {"effect", "efficiency"} & {*map(str, recommended.choice.values())}:
        recommended = None  # chosen by other effects
    return replace(expert_map, effects=effects, recommended=recommended)


class _Run:
    """One run: items, candidates, the context, and the parts that are finished."""

    def __init__(
        self,
        llama: SteeredLlama,
        items: Sequence[Item],
        expert_map: ExpertMap,
        response: str,
        neutral: NeutralText | None,
        renderer: Renderer | None,
        options: AttributionOptions,
    ) -> None:
        if not items:
            raise UsageError("no items; give at least one")
        if twice := _twice([item.id for item in items]):
            raise UsageError(f"items: the id {twice!r} stands twice; give each its own")
        self._options, self._map, self._response, self._neutral = options, expert_map, response, neutral
        self._items, self._confirm = split(items, options.n_items, options.seed)
        self._digest = digest([*self._items, *self._confirm])
        self._documents: list[Document] = []
        if neutral is not None:
            self._documents = documents(neutral, renderer or Renderer(llama._model), options.n_text)
        self._stack = ExitStack()
        self._decoder = self._stack.enter_context(
            InterventionDecoder(
                llama._model,
                [*self._items, *self._confirm],
                self._documents,
                n_steerings=_BLOCK,
                steer=options.steer,
                **options.decoder_arguments,
            )
        )
        self._identity = self._decoder.identity
        self._candidates: Candidates
        self._parts: Parts

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(
        self,
        kept: AnswerFile | None,
        resume: bool,
        metadata: Mapping[str, Any],
        progress: Progress,
        log: Callable[[str], None],
    ) -> None:
        """Choose the candidates, and read what an interrupted run has kept. Raises UsageError."""
        options = self._options
        self._log = log
        self._parts = Parts(self._decoder, "attribute", progress, log)
        self._map.identity.require_same(self._identity, "the map", "the model", options.force)
        layers = [layer for layer in self._decoder.steerable_layers if layer < self._map.identity.n_layer]
        self._candidates = choose_candidates(self._map, layers, options.n_candidates, options.seed)
        for action in options.actions:
            if not self._rate(action):
                raise UsageError(f"actions: {action}: a token uses all experts of the model, so none can be left out")
        least = least_draws(len(self._candidates))
        if isinstance(options.draws, int) and options.draws < least:
            raise UsageError(
                f"draws: {options.draws} are too few for {len(self._candidates)} candidates (a half of them controls); "
                f"take at least {least}, or fewer candidates"
            )
        self._n_block = self._decoder.n_steerings
        settings = {
            **metadata,
            "map": self._map.sha256,
            "neutral": None if self._neutral is None else self._neutral.sha256,
            **options.settings(),
            "items": self._digest,  # after the number of items and the seed, by which they are chosen
        }
        self._parts.open(kept, settings, resume)

    def effects(self) -> Effects:
        """Run the interventions and estimate their effects."""
        options = self._options
        actions = [action for action in ACTIONS if action in options.actions]
        most = self._most_draws()
        per_block = len(self._items) + bool(self._documents)
        n_blocks = math.ceil(most / self._n_block)
        self._parts.total = len(actions) * (n_blocks * per_block + len(self._confirm))
        self._parts.at_most = at_most = "at most " if options.draws == AUTO else ""
        self._log(
            f"{len(self._candidates)} candidates ({int(self._candidates.control.sum())} of them controls), "
            f"{len(self._items)} items, {len(self._confirm)} to confirm, {at_most}{most} draws of each action"
        )
        found = {action: self._estimate(action) for action in actions}
        confirmed = {action: self._confirmed(action, found[action][0]) for action in actions}
        return self._effects(found, confirmed)

    def _rate(self, action: str) -> float:
        return self._options.rate or default_rate(action, self._candidates, self._identity)

    def _most_draws(self) -> int:
        if isinstance(self._options.draws, int):
            return self._options.draws
        n = len(self._candidates) + 1
        # whole blocks: a block is computed as one
        return self._n_block * math.ceil(max(_LEAST_AUTO, _MOST * n) / self._n_block)

    def _estimate(self, action: str) -> tuple[Estimates, Estimates | None, int, float, bool]:
        """Estimates of effect and cost, draws, agreement, and whether it is stable."""
        options = self._options
        design = Design(action, self._candidates, self._identity, self._rate(action), options.seed)
        most, least = self._most_draws(), least_draws(len(self._candidates))
        first = min(options.first, len(self._candidates))
        draws: list[npt.NDArray[np.bool_]] = []
        margins: list[FloatArray] = []
        costs: list[FloatArray] = []
        n = n_stable = block = 0
        share = 0.0
        while n < most:
            taken = design.draws(block, self._n_block)[: most - n]
            values, cost = self._block(action, design, block, taken)
            draws.append(taken)
            margins.append(values)
            costs.append(cost)
            n += len(taken)
            block += 1
            if options.draws == AUTO and n >= max(least, _LEAST_AUTO):
                found = estimate(np.concatenate(draws), np.concatenate(margins))
                share = agreement(found.effect, found.se, first)
                n_stable = n_stable + 1 if share >= STABLE else 0
                if n_stable == 2:
                    break
        x = np.concatenate(draws)
        effect = estimate(x, np.concatenate(margins))
        cost_of = estimate(x, np.concatenate(costs)) if self._documents else None
        share = agreement(effect.effect, effect.se, first)
        self._log(
            f"{action}: {n} draws, R2 on held-out draws {effect.r2:.2f}, another run would find {share:.0%} of the "
            f"first {first} again"
        )
        return effect, cost_of, n, share, share >= STABLE

    def _block(
        self, action: str, design: Design, block: int, taken: npt.NDArray[np.bool_]
    ) -> tuple[FloatArray, FloatArray]:
        """Mean margin over the items, and mean divergence of the neutral text, of each draw of a block."""

        @cache
        def biases() -> list[BiasFile | None]:
            return [BiasFile.from_signs(design.signs(draw), self._identity) for draw in taken]

        n = len(taken)
        margins = np.zeros(n)
        for item in self._items:
            # a block that ends early is another one: batches of another shape round otherwise
            margins += self._parts.values(
                f"{action}/{block}/{n}/{item.id}", n, biases, partial(self._decoder.margins, item)
            )
        cost = np.zeros(n)
        if self._documents:
            cost = self._parts.values(f"{action}/{block}/{n}/text", n, biases, self._divergences) / self._n_text
        return margins / len(self._items), cost

    @property
    def _n_text(self) -> int:
        return n_tokens(self._documents)

    def _divergences(self) -> FloatArray:
        total: FloatArray = sum(self._decoder.divergences(document) for document in self._documents)  # type: ignore[assignment]
        return total

    def _confirmed(self, action: str, found: Estimates) -> dict[int, tuple[float, float]]:
        """Effect and standard error over the confirming items of the first candidates, each intervened on alone."""
        if len(self._confirm) < 2:
            self._parts.step(len(self._confirm))
            return {}
        first = np.argsort(-np.abs(found.effect), kind="stable")[: min(self._options.first, self._n_block - 1)]
        design = Design(action, self._candidates, self._identity, 0.5, 0)

        def alone(index: int) -> BiasFile:
            return BiasFile.from_signs(design.signs(np.arange(len(self._candidates)) == index), self._identity)

        @cache
        def biases() -> list[BiasFile | None]:
            return [None, *(alone(int(index)) for index in first)]

        names, n = ",".join(str(index) for index in first), 1 + len(first)
        values = np.array(
            [
                self._parts.values(
                    f"confirm/{action}/{names}/{item.id}", n, biases, partial(self._decoder.margins, item)
                )
                for item in self._confirm
            ]
        )
        change = values[:, 1:] - values[:, :1]
        mean, se = change.mean(axis=0), change.std(axis=0, ddof=1) / math.sqrt(len(change))
        return {int(index): (float(mean[i]), float(se[i])) for i, index in enumerate(first)}

    def _effects(
        self,
        found: Mapping[str, tuple[Estimates, Estimates | None, int, float, bool]],
        confirmed: Mapping[str, Mapping[int, tuple[float, float]]],
    ) -> Effects:
        options, n = self._options, len(self._candidates)
        columns: dict[str, list[float]] = {
            name: [] for name in ("effect", "effect_se", "p", "cost", "cost_se", "confirm", "confirm_se")
        }
        actions: list[int] = []
        for action, (effect, cost, *_) in found.items():
            actions += [ACTIONS[action]] * n
            # a candidate that no draw took has no estimate: its error stays above every effect
            columns["effect"] += effect.effect.tolist()
            columns["effect_se"] += np.minimum(effect.se, 1e9).tolist()
            columns["p"] += effect.p.tolist()
            columns["cost"] += [math.nan] * n if cost is None else cost.effect.tolist()
            columns["cost_se"] += [math.nan] * n if cost is None else np.minimum(cost.se, 1e9).tolist()
            nothing = (math.nan, math.nan)
            columns["confirm"] += [confirmed[action].get(i, nothing)[0] for i in range(n)]
            columns["confirm_se"] += [confirmed[action].get(i, nothing)[1] for i in range(n)]
        columns["p"] = benjamini_hochberg(columns["p"]).tolist()
        facts = Attribution(
            response=self._response,
            items_sha256=self._digest,
            n_items=len(self._items),
            n_confirm=len(self._confirm) if any(confirmed.values()) else 0,
            neutral="" if self._neutral is None else self._neutral.name,
            n_text=self._n_text,
            n_draws={action: n_draws for action, (_, _, n_draws, _, _) in found.items()},
            rate={action: self._rate(action) for action in found},
            steer=options.steer,
            seed=options.seed,
            r2={action: effect.r2 for action, (effect, *_) in found.items()},
            r2_cost={action: cost.r2 for action, (_, cost, *_) in found.items() if cost is not None},
            first=min(options.first, n),
            agreement={action: share for action, (*_, share, _) in found.items()},
            stable={action: stable for action, (*_, stable) in found.items()},
        )
        layers, experts = self._candidates.experts.T
        times = len(found)
        return Effects(
            facts,
            layer=np.tile(layers, times),
            expert=np.tile(experts, times),
            action=np.array(actions, dtype=np.int8),
            control=np.tile(self._candidates.control, times),
            **{name: np.array(values) for name, values in columns.items()},
        )


def _twice(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]
