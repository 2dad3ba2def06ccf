"""The steps of `learn` that run the model: detection, attribution, the choice, and its confirmation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..attribution.attribute import AttributionOptions, attribute
from ..attribution.items import pair_items
from ..detection.checkpoint import CheckpointFile
from ..detection.recorder import record_counts
from ..errors import ChoiceError, PairsError
from ..evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
from ..evaluation.metrics.intervals import Interval, rate
from ..evaluation.studies.controls.draws import ControlPlan, Controls
from ..evaluation.studies.search.objective import Budget, objective_values
from ..evaluation.studies.search.tune import Pick, pick_numbers
from ..evaluation.tasks.neutral_text import NeutralText
from ..evaluation.tasks.scorers import make_scorer
from ..evaluation.tasks.tasks import Task
from ..generation.answer_file import AnswerFile
from ..identity import ModelIdentity
from ..llama.rendering import Renderer
from ..llama.steered_llama import SteeredLlama
from ..maps.expert_map import ExpertMap
from ..maps.pair_counts import PairCounts, PairCountsWriter
from ..maps.scores import risk_difference_from
from ..maps.significance import annotate
from ..maps.stability import UntilStable
from ..pairs.pairs import Pair
from ..steering.steering import Steering
from .judging import Confirmed, Values, judge
from .material import shortened
from .options import LEAST_RANDOM, LearnOptions

TEXT_OF_DRAW = 64
"""Tokens of the neutral text that each draw of an attribution predicts."""

Show = Callable[[int, int], None]


def detect(
    llama: SteeredLlama, pairs: Sequence[Pair], work: Path, name: str, options: LearnOptions, show: Show
) -> ExpertMap:
    """The map of the pairs, with standard errors; ends early once its first experts are stable. Raises PairsError."""
    output, per_pair = work / "rd.json", work / "pairs.npz"
    checkpoint = CheckpointFile(output)
    writers: list[PairCountsWriter] = []

    def sink(identity: ModelIdentity, digest: str) -> PairCountsWriter:
        writers.append(PairCountsWriter(per_pair, identity, behaviour=name, pairs_digest=digest))
        return writers[0]

    try:
        counts = record_counts(
            llama,
            list(pairs),
            behaviour=name,
            until_stable=UntilStable(),
            checkpoint=checkpoint,
            per_pair=sink,
            on_skip=lambda *_: None,
            progress=show,
            **options.rendering,
            **_context(options),
        )
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    writers[0].close()
    expert_map = ExpertMap.from_counts(
        counts, positive=options.positive, negative=options.negative, license=options.license
    )
    if counts.n_pairs > 1:
        expert_map = annotate(expert_map, PairCounts.load(per_pair))
    expert_map.save(output)
    checkpoint.remove()
    return expert_map


def attribute_experts(
    llama: SteeredLlama,
    pairs: Sequence[Pair],
    expert_map: ExpertMap,
    neutral: NeutralText | None,
    work: Path,
    options: LearnOptions,
    *,
    metadata: Mapping[str, Any],
    over: Callable[[float], bool],
    show: Show,
) -> ExpertMap | None:
    """The map with effects of its first experts; None where the pairs have no margin, or nothing could be drawn.

    `over` says whether a share of the step's time is used up: half of it is for each action.
    """
    sizes = options.all_sizes
    renderer = Renderer(llama._model, **options.rendering)
    items: list[Any] = []
    for pair in pairs[: 4 * sizes.n_items]:
        try:
            items += pair_items(renderer, [shortened(pair, sizes.item_words)])
        except PairsError:
            continue
        if len(items) == sizes.n_items:
            break
    most = int((np.abs(expert_map.rd).sum(axis=1) > 0).sum()) * expert_map.identity.n_expert // 2
    if len(items) < 2 or not sizes.n_candidates or most < 1:
        return None
    context = _context(options)
    arguments = AttributionOptions(
        n_candidates=min(sizes.n_candidates, most),
        draws="auto",
        n_text=TEXT_OF_DRAW,
        seed=options.seed,
        **{
            name: context[name]
            for name in ("n_batch", "n_threads", "type_k", "type_v", "flash_attn")
            if name in context
        },
    )
    n_drawn: dict[str, int] = {}

    def stop(action: str) -> bool:
        """After each block of 64 draws: the step's time, and the most draws that are wanted."""
        n_drawn[action] = n_drawn.get(action, 0) + 64
        return n_drawn[action] >= sizes.draws or over(0.5 if action == "promote" else 1.0)

    with AnswerFile(work / "effects.json") as kept:
        found = attribute(
            llama,
            items,
            expert_map,
            neutral=neutral,
            renderer=renderer,
            options=arguments,
            kept=kept,
            resume=kept.exists(),
            metadata=metadata,
            progress=lambda _, done, total: show(done, total),
            stop=stop,
        )
        found.save(work / "effects.json")
        kept.discard()
    return found


def evaluator_of(
    llama: SteeredLlama,
    task: Task,
    neutral: NeutralText | None,
    options: LearnOptions,
    kept: AnswerFile,
    metadata: Mapping[str, Any],
    show: Show,
) -> Evaluator:
    """An evaluator on a task, which goes on from what an interrupted run kept. Raises as `Evaluator`."""
    settings = EvaluatorSettings(
        n_parallel=options.n_parallel,
        n_text=options.all_sizes.n_text,
        thinking=options.thinking,
        template_arguments=options.template_arguments or {},
        date=options.date,
        context=_context(options),
    )
    scorer = make_scorer(task.scorer, task.options)
    return Evaluator(
        llama,
        task,
        scorer,
        neutral=neutral,
        settings=settings,
        kept=kept,
        resume=kept.exists(),
        metadata=metadata,
        progress=lambda _, done, total: show(done, total),
    )


def choose(
    evaluator: Evaluator, expert_map: ExpertMap, name: str, options: LearnOptions, stop: Callable[[], bool]
) -> tuple[Pick, Steering | None, list[str]]:
    """The pick inside the budget: by effect where attribution found any, else, or where that does not work, by RD.

    Returns the pick, the steering that it makes (None without one), and remarks.
    """
    budget = Budget(max_ppl_increase=options.max_ppl_increase)
    n_trials = options.all_sizes.n_trials
    notes: list[str] = []
    ranks = ["effect", "rd"] if _has_effects(expert_map) else ["rd"]
    for rank in ranks:
        steering = Steering(name, expert_map=expert_map, rank=rank)
        pick = pick_numbers(evaluator, steering, budget, seed=options.seed, max_trials=n_trials, stop=stop)
        if pick.chosen is not None:
            numbers = {"activate": pick.chosen.activate, "deactivate": pick.chosen.deactivate}
            return pick, steering.changed(**numbers), notes
        notes.append(f"experts chosen by {rank}: {pick.outcome}: {pick.reason}")
    return pick, None, notes


def _has_effects(expert_map: ExpertMap) -> bool:
    return expert_map.effects is not None and sum(expert_map.n_worth(rank="effect")) > 0


def confirm(
    evaluator: Evaluator,
    steering: Steering,
    per_pair: Path,
    options: LearnOptions,
    over: Callable[[], bool],
) -> Confirmed:
    """Measure the steering on held-out items, beside random experts of its numbers and a map of shuffled pairs."""
    identity, sizes = evaluator.identity, options.all_sizes
    base, steered = evaluator.measure([None, steering.build(identity)], benign=False, what="confirm")
    assert base.text is not None
    assert steered.text is not None
    plan = ControlPlan(
        evaluator, steering, Controls(n_draws=sizes.n_random, kinds=("random",)), both_ways=False, seed=options.seed
    )
    random: list[Values] = []
    for draw in plan.draws("random").draws:
        if len(random) >= LEAST_RANDOM and over():
            break
        (measured,) = evaluator.measure([draw.biases[0]], text=False, benign=False, what="random experts")
        random.append(objective_values(measured))
    shuffled: list[Values] = []
    other = shuffled_map(PairCounts.load(per_pair), steering.expert_map, options.seed)
    if other is not None:
        changed = steering.changed(expert_map=other, path=None, rank="rd")
        try:
            biases = [changed.changed(reverse=reverse).bias_file(identity) for reverse in (False, True)]
            found = evaluator.measure(biases, text=False, benign=False, what="shuffled pairs")
            shuffled = [objective_values(measured) for measured in found]
        except ChoiceError:  # the numbers cannot be carried out on that map
            shuffled = []
    return judge(
        objective_values(base),
        objective_values(steered),
        random,
        shuffled,
        perplexity=float(np.expm1(steered.text.nll - base.text.nll)),
        kl=steered.text.kl,
        max_ppl_increase=options.max_ppl_increase,
        seed=options.seed,
    )


def compare_margins(evaluator: Evaluator, steering: Steering, seed: int) -> tuple[Interval, Interval]:
    """The share of pairs whose positive answer is the likelier one: unsteered, and steered."""
    found = evaluator.measure([None, steering.build(evaluator.identity)], text=False, benign=False, what="margin")
    one, two = (rate(objective_values(measured), seed) for measured in found)
    return one, two


def shuffled_map(pair_counts: PairCounts, real: ExpertMap | None, seed: int) -> ExpertMap | None:
    """A map of the pairs of which a random half has its sides swapped, from their counts; None for fewer than two."""
    if pair_counts.n_pairs < 2 or real is None:
        return None
    swapped = np.zeros(pair_counts.n_pairs, dtype=bool)
    swapped[np.random.default_rng([seed, 1]).permutation(pair_counts.n_pairs)[: pair_counts.n_pairs // 2]] = True
    a = np.zeros((2, *pair_counts.identity.shape), dtype=np.int64)
    n = np.zeros(2, dtype=np.int64)
    for part, counts in pair_counts.chunks():
        signs = swapped[part]
        for mine, theirs in ((~signs, [0, 1]), (signs, [1, 0])):
            a += counts[mine][:, theirs].sum(axis=0, dtype=np.int64)
            n += pair_counts.n[part][mine][:, theirs].sum(axis=0)
    if not n.all():
        return None
    return replace(
        real,
        behaviour="shuffled",
        rd=risk_difference_from(a[0], int(n[0]), a[1], int(n[1])),
        n1=int(n[0]),
        n2=int(n[1]),
        a1=a[0],
        a2=a[1],
        se=None,
        confidence=None,
        logit=None,
        weight=None,
        effects=None,
        stability=None,
    )


def _context(options: LearnOptions) -> dict[str, Any]:
    """Arguments of contexts, those that were given."""
    return {name: value for name, value in options.context.items() if value is not None}
