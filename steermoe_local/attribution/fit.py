"""Fits a soft bias: from the estimates of an attribution, by measuring (docs/fit.md)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util.files import tool_name
from ..errors import UsageError
from ..evaluation.tasks.neutral_text import Document, NeutralText
from ..generation.answer_file import AnswerFile
from ..llama.rendering import Renderer
from ..llama.steered_llama import SteeredLlama
from ..maps.effects import Effects
from ..maps.expert_map import ExpertMap
from ..maps.ranks import require_effects
from ..pairs.pairs import Pair
from ..steering.bias_file import BiasFile
from .decoding import InterventionDecoder
from .fitted import CMA, Choice, Comparison, Fit, FitOptions, Shift
from .items import Item, as_items, digest, split
from .parts import Parts, Progress
from .search import Direction, Point, choose, direction, refine, require_search, scale_start, search_version
from .texts import documents, n_tokens, other_documents

FloatArray = npt.NDArray[np.float64]

_CHOOSING = 3  # one of so many items, and documents, chooses between start and search
_LEAST_CHOOSING = 2  # items: with fewer there is no error


def fit(
    llama: SteeredLlama,
    items: Iterable[Item] | Iterable[Pair],
    expert_map: ExpertMap,
    *,
    neutral: NeutralText | None,
    renderer: Renderer | None = None,
    options: FitOptions | None = None,
    kept: AnswerFile | None = None,
    resume: bool = False,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    log: Callable[[str], None] | None = None,
    **fields: Any,
) -> Fit:
    """Fit a soft bias to a map's effects: the largest change of the margin whose cost is within a budget.

    Args:
        llama: the model; its own context is not touched.
        items: those that the map's effects were estimated with, as `attribute` takes them. The search sees two thirds
            of those that the attribution estimated on, and the others decide whether its result is better than the
            start; those that the attribution confirmed on are measured once, at the end.
        expert_map: a map with effects, as `attribute` returns it.
        neutral: text on which the cost is measured; it is divided in the same way, by documents.
        renderer: of the neutral text; None: the model's.
        options: how. Its fields may also be given as keywords: `fit(llama, items, m, neutral=text, budget=0.05)`.
        kept: where finished parts are kept; with `resume` the run goes on from it, to the bit.
        metadata: further facts that the results depend on, as JSON values.
        progress: called with (what, steps done, steps at most).
        log: called with a line on what is being done.

    Raises UsageError (a map without effects, other items, no significant effect, a budget that is too small, cma is
    missing), ModelMismatchError (the map is of another model), ModelError, NativeError, StorageError.
    """
    if options is None and "budget" not in fields:
        raise UsageError("budget: none; give the KL per token, in nats, that the steering may cost, like 0.05")
    chosen = FitOptions(**fields) if options is None else replace(options, **fields)
    with _Run(llama, as_items(items, renderer, llama), expert_map, neutral, renderer, chosen, progress, log) as run:
        run.open(kept, resume, metadata or {})
        return run.fit()


def split_as_attributed(items: Sequence[Item], effects: Effects) -> tuple[list[Item], list[Item]]:
    """Items that an attribution estimated on and confirmed on, by its own split.

    Raises UsageError when the items are not those of the attribution.
    """
    facts = effects.facts
    # an attribution that had no room for two steerings at once did not confirm, and says that it has no such items
    for n in sorted({facts.n_items + facts.n_confirm, 2 * facts.n_items - 1, 2 * facts.n_items}):
        estimating, confirming = split(items, n, facts.seed)
        if digest([*estimating, *confirming]) == facts.items_sha256:
            return estimating, confirming
    raise UsageError(
        f"these {len(items)} items are not those that the map's effects were estimated on (they differ, or are "
        "rendered otherwise), so none could be kept to confirm; give the pairs or the task of steermoe attribute, with "
        "its options of the chat template, such as --date"
    )


class _Run:
    """One run: the items, the texts, the context, and the parts that are finished."""

    def __init__(
        self,
        llama: SteeredLlama,
        items: Sequence[Item],
        expert_map: ExpertMap,
        neutral: NeutralText | None,
        renderer: Renderer | None,
        options: FitOptions,
        progress: Progress | None,
        log: Callable[[str], None] | None,
    ) -> None:
        self._options, self._map = options, expert_map
        self._effects = effects = require_effects(expert_map, "fit")
        self._log = log or (lambda _: None)
        self._toward: Direction = direction(effects, options.n_experts, reverse=options.reverse)
        self._searches = options.method == CMA and len(self._toward) > 1
        if options.method == CMA:
            require_search()
        if neutral is None:
            raise UsageError("no neutral text, so the cost cannot be measured; give one")
        self._neutral = neutral
        estimating, self._confirm = split_as_attributed(items, effects)
        self._choosing = estimating[::_CHOOSING] if self._searches else []
        if len(self._choosing) < _LEAST_CHOOSING:
            self._choosing = []
        held = {item.id for item in self._choosing}
        self._items = [item for item in estimating if item.id not in held]
        renderer = renderer or Renderer(llama._model)
        text = documents(neutral, renderer, options.n_text)
        self._choosing_text = text[_CHOOSING - 1 :: _CHOOSING] if self._choosing else []
        self._text = [document for document in text if document not in self._choosing_text]
        used = max(options.n_text, effects.facts.n_text)  # the start's costs were estimated on the text's beginning
        self._other_text = other_documents(neutral, renderer, used, options.n_text)
        self._stack = ExitStack()
        self._decoder = self._stack.enter_context(
            InterventionDecoder(
                llama._model,
                [*estimating, *self._confirm],
                [*text, *self._other_text],
                n_steerings=options.population,
                steer="all" if effects.facts.steer == "all" else "answer",
                **options.decoder_arguments,
            )
        )
        try:
            self._identity = self._decoder.identity
            expert_map.identity.require_same(self._identity, "the map", "the model", options.force)
        except BaseException:
            self._stack.close()
            raise
        self._parts = Parts(self._decoder, "fit", progress, self._log)
        self._base = 0.0

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, kept: AnswerFile | None, resume: bool, metadata: Mapping[str, Any]) -> None:
        """Read what an interrupted run has kept, or begin a new one. Raises UsageError."""
        settings = {
            **metadata,
            "map": self._map.sha256,
            "items": self._effects.facts.items_sha256,
            "neutral": self._neutral.sha256,
            "search": search_version() if self._options.method == CMA else None,
            **self._options.settings(),
        }
        self._parts.open(kept, settings, resume)

    def fit(self) -> Fit:
        """Find the start, refine it, and measure both on other items."""
        options = self._options
        common: dict[str, Any] = {
            "budget": options.budget,
            "bound": options.bound,
            "population": options.population,
        }
        n_batches = 2 + (max(1, options.evaluations // options.population - 1) + 1 if self._searches else 0)
        per_batch = (len(self._items) + 1) * math.ceil(options.population / self._decoder.n_steerings)
        last = math.ceil(3 / self._decoder.n_steerings)
        self._parts.at_most = "at most " if self._searches else ""
        self._parts.total = (
            len(self._items)
            + n_batches * per_batch
            + last * (len(self._choosing) + bool(self._choosing_text))
            + last * (len(self._items) + len(self._text))
            + (last * (len(self._confirm) + len(self._other_text)) if self._confirm else 0)
        )
        self._log(
            f"{len(self._toward)} experts; items: {len(self._items)} to fit, {len(self._choosing)} to choose, "
            f"{len(self._confirm)} to confirm; neutral text: {n_tokens(self._text)} tokens to fit, "
            f"{n_tokens(self._choosing_text)} to choose, {n_tokens(self._other_text)} to confirm; "
            f"{self._parts.at_most}{self._parts.total:,} steps"
        )
        self._base = float(self._margins("unsteered", self._items, [None]).mean())
        start, n = scale_start(self._measure, self._toward, **common)
        more = n // options.population - 2  # grids that a small budget has needed
        self._parts.total += more * per_batch
        self._log(f"start: margin {start.gain:+.3f} at a KL of {start.cost:.4f}, {n} scales")
        best, generations, ended = start, 0, "no search"
        choice: Choice | None = None
        if self._searches:
            found = refine(self._measure, start, **common, evaluations=options.evaluations, seed=options.seed)
            generations, ended = found.n_generations, found.ended
            n += found.n_evaluations
            self._log(
                f"search: margin {found.best.gain:+.3f} at a KL of {found.best.cost:.4f}, {generations} generations "
                f"({ended})"
            )
            self._parts.total += (n // options.population - n_batches - more) * per_batch  # it may have ended early
            best, choice = self._choose([start, found.best, found.ray])
        biases = [None, self._bias(start.values), self._bias(best.values, n)]
        return Fit(
            bias=biases[2],  # type: ignore[arg-type]
            start=biases[1],  # type: ignore[arg-type]
            experts=tuple((int(layer), int(expert)) for layer, expert in self._toward.experts),
            options=options,
            choice=choice,
            fitted_on=self._compare("fitted", self._items, self._text, biases),
            confirmed_on=self._compare("confirmed", self._confirm, self._other_text, biases) if self._confirm else None,
            n_evaluations=n,
            n_generations=generations,
            ended=ended,
        )

    def _choose(self, points: Sequence[Point]) -> tuple[Point, Choice]:
        """The start, which is the first point, or a better one, by the items and the text that choose."""
        n_text = n_tokens(self._choosing_text)
        if not self._choosing:
            return points[1], Choice("search", 0, 0, None, None, None)
        biases = [self._bias(point.values) for point in points]
        name = "choosing/" + "".join(bias.key[:16] for bias in biases)
        margins = self._margins(name, self._choosing, biases)
        costs = np.zeros(len(points))
        if self._choosing_text:
            costs = self._costs(name, self._choosing_text, biases, whole=True)[0] / n_text
        gains = -margins if self._options.reverse else margins
        taken, best, gain, error = choose(gains, costs, self._options.budget)
        cost = float(costs[best]) if n_text else None
        at = "" if cost is None else f", at a KL of {cost:.4f}"
        verdict = "it is taken" if taken else "the start stays"
        self._log(
            f"choosing: the search's margin is {gain:+.3f} \N{PLUS-MINUS SIGN} {error:.3f} from the start's on other "
            f"items{at}; {verdict}"
        )
        choice = Choice("search" if taken else "start", len(self._choosing), n_text, gain, error, cost)
        return points[taken], choice

    def _bias(self, values: FloatArray, n_evaluations: int | None = None) -> BiasFile:
        """The soft bias of some values; with provenance if the number of measured steerings is given."""
        table = np.zeros(self._identity.shape)
        table[tuple(self._toward.experts.T)] = values
        provenance = {}
        if n_evaluations is not None:
            settings = {
                name: getattr(self._options, name)
                for name in ("method", "budget", "n_experts", "bound", "reverse", "population", "n_text", "seed")
            }
            facts = self._effects.facts
            provenance = {
                "behaviour": self._map.behaviour,
                "map_sha256": self._map.sha256,
                "fit": json.dumps({**settings, "n_evaluations": n_evaluations, "items_sha256": facts.items_sha256}),
                "tool": tool_name(),
            }
        return BiasFile.from_soft(table, self._identity, 1.0, provenance)

    def _measure(self, what: str, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Gains (change of the mean margin to the wanted side) and costs of some values, as `search.Measure`."""
        # by their values, so that a resumed run takes no part that other values gave
        name = f"{what}/{hashlib.sha256(values.astype('<f8').tobytes()).hexdigest()[:16]}"
        biases = [self._bias(row) for row in values]
        change = self._margins(name, self._items, biases).mean(axis=0) - self._base
        cost = self._costs(name, self._text, biases, whole=True).sum(axis=0) / n_tokens(self._text)
        return -change if self._options.reverse else change, cost

    def _margins(self, name: str, items: Sequence[Item], biases: Sequence[BiasFile | None]) -> FloatArray:
        """Margins [n_items, n_biases]."""
        n = self._decoder.n_steerings
        found = np.empty((len(items), len(biases)))
        for first in range(0, len(biases), n):
            group = partial(_same, biases[first : first + n])
            for row, item in enumerate(items):
                found[row, first : first + n] = self._parts.values(
                    f"{name}/{first}/{item.id}",
                    len(group()),
                    group,
                    partial(self._decoder.margins, item),
                    typical=len(biases) == self._options.population,
                )
        return found

    def _costs(
        self, name: str, of: Sequence[Document], biases: Sequence[BiasFile | None], *, whole: bool = False
    ) -> FloatArray:
        """Divergences of documents [n_documents, n_biases], or their sums over the `whole` text, [1, n_biases]."""
        n = self._decoder.n_steerings
        texts = [list(of)] if whole else [[document] for document in of]
        found = np.empty((len(texts), len(biases)))

        def divergences(text: list[Document]) -> FloatArray:
            total: FloatArray = sum(self._decoder.divergences(document) for document in text)  # type: ignore[assignment]
            return total

        for first in range(0, len(biases), n):
            group = partial(_same, biases[first : first + n])
            for row, text in enumerate(texts):
                found[row, first : first + n] = self._parts.values(
                    f"{name}/{first}//{row}", len(group()), group, partial(divergences, text)
                )
        return found

    def _compare(
        self, name: str, items: Sequence[Item], text: Sequence[Document], biases: Sequence[BiasFile | None]
    ) -> Comparison:
        """Measure the unsteered model, the start and the fitted bias in the same batches."""
        keys = "".join("" if bias is None else bias.key[:16] for bias in biases)
        margins = self._margins(f"{name}/{keys}", items, biases)
        costs = self._costs(f"{name}/{keys}", text, biases)
        change = margins - margins[:, :1]
        sizes = np.array([document.n for document in text], dtype=np.float64)

        def shift(index: int) -> Shift:
            kl, kl_se = _ratio(costs[:, index], sizes)
            mean, se = _mean(change[:, index])
            return Shift(float(margins[:, index].mean()), mean, se, kl, kl_se)

        difference, difference_se = _mean(margins[:, 2] - margins[:, 1])
        return Comparison(
            n_items=len(items),
            n_text=n_tokens(list(text)),
            unsteered=float(margins[:, 0].mean()),
            start=shift(1),
            fitted=shift(2),
            difference=difference,
            difference_se=difference_se,
        )


def _same(biases: Sequence[BiasFile | None]) -> Sequence[BiasFile | None]:
    return biases


def _mean(values: FloatArray) -> tuple[float, float | None]:
    """Mean and its standard error, None for a single value."""
    n = len(values)
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None


def _ratio(sums: FloatArray, sizes: FloatArray) -> tuple[float, float | None]:
    """Sum of `sums` over sum of `sizes`, and its standard error over the documents (ratio estimator)."""
    n, ratio = len(sums), float(sums.sum() / sizes.sum())
    if n < 2:
        return ratio, None
    return ratio, math.sqrt(n / (n - 1) * float(np.square(sums - ratio * sizes).sum())) / float(sizes.sum())
