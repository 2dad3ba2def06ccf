"""One run of `learn`: its steps one after the other, each from what the one before it left in the folder of work."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .._util.files import human_duration
from ..errors import PairsError
from ..evaluation.tasks.neutral_text import Document, NeutralText
from ..evaluation.tasks.tasks import Task
from ..generation.answer_file import AnswerFile
from ..generation.engine import Engine
from ..llama.rendering import Renderer
from ..llama.steered_llama import SteeredLlama
from ..maps.expert_map import ExpertMap
from ..pairs.pairs import Pair, load_pairs, save_pairs
from ..pairs.prompts import PromptItem
from ..steering.steering import Steering
from . import steps
from .answers import ask
from .clock import Clock, Speed, expected_seconds
from .judging import Confirmed
from .material import Material, least_pairs, of_behaviour, of_pairs
from .options import LearnOptions
from .source import Source
from .speed import measure_speed
from .work import WorkFolder
from .workload import (
    sample_of_material,
    sample_of_questions,
    shorter,
    with_text,
    work_of_material,
    work_of_questions,
)

_ROOM = 128  # tokens of context beyond a prompt and an answer, for what a template adds to an instruction


@dataclass(frozen=True, eq=False)
class Found:
    """What the steps found: up to the one that failed (`step`, with its `problem`), "" if none did."""

    step: str = ""
    problem: str = ""
    material: Material | None = None
    expert_map: ExpertMap | None = None
    steering: Steering | None = None
    pick: Mapping[str, Any] | None = None
    confirmed: Confirmed | None = None
    notes: tuple[str, ...] = ()


class Run:
    """The steps of one run on a loaded model."""

    def __init__(
        self,
        llama: SteeredLlama,
        work: WorkFolder,
        source: Source,
        neutral: NeutralText | None,
        options: LearnOptions,
        clock: Clock,
        about: Mapping[str, Any],
        report: Callable[[str, int, int], None],
        say: Callable[[str], None],
    ) -> None:
        self._llama, self._work, self._source, self._neutral = llama, work, source, neutral
        self._options, self._clock, self._about = options, clock, about
        self._report, self._say = report, say
        self._sides = source.positive, source.negative
        # the map is made under the names that the contrast gives its sides
        self._named = replace(
            options, positive=source.positive, negative=source.negative, license=options.license or source.license
        )
        self._renderer = Renderer(llama._model, **options.rendering)
        self._notes: list[str] = []

    def found(self) -> Found:
        """Take all steps, or those up to the first that fails."""
        try:
            material = self._answers()
        except _TooFewPairs as error:
            return Found("answers", str(error), notes=tuple(self._notes))
        self._foresee(material)
        expert_map, problem = self._detect(material)
        if expert_map is None or problem:
            return Found("detect", problem, material, expert_map, notes=tuple(self._notes))
        expert_map = self._attribute(material, expert_map)
        pick, steering = self._tune(material, expert_map)
        if steering is None:
            problem = f"{pick['outcome']}: {pick['reason']}"
            return Found("tune", problem, material, expert_map, pick=pick, notes=tuple(self._notes))
        confirmed = self._confirm(material, steering)
        step = "confirm" if confirmed.problem else ""
        return Found(step, confirmed.problem, material, expert_map, steering, pick, confirmed, notes=tuple(self._notes))

    #
    # answers
    #

    def _answers(self) -> Material:
        """The material: of the model's own answers, of given pairs, or of a behaviour that ships."""
        self._clock.begin("answers")
        source, done = self._source, self._work.steps.get("answers")
        if source.instructions is None:
            self._expect(self._divided(list(source.pairs)))
            if done is None:
                self._work.finish("answers", {})
            return self._divided(list(source.pairs))
        path = self._work.work / "pairs.jsonl"
        if done is None:
            self._expect(None)
            pairs, tally = self._own_pairs()
            if pairs:
                save_pairs(pairs, path)
            self._work.finish("answers", {"n_pairs": len(pairs), "tally": tally})
        else:
            pairs = load_pairs(path) if done["n_pairs"] else []
            tally = done["tally"]
        return self._of_answers(pairs, tally)

    def _of_answers(self, pairs: list[Pair], tally: Mapping[str, int]) -> Material:
        left_out = [f"{n} times {reason}" for reason, n in tally.items() if reason != "asked" and n]
        words = f"{len(pairs)} of {tally['asked']} questions made a pair"
        self._notes.append("; ".join([words, *left_out]))
        try:
            return self._divided(pairs)
        except PairsError:
            most = max((n, reason) for reason, n in [("", 0), *((r, n) for r, n in tally.items() if r != "asked")])[1]
            why = f"; most often {most}" if most else ""
            raise _TooFewPairs(f"the model answers too few questions differently: {words}{why}") from None

    def _divided(self, pairs: list[Pair]) -> Material:
        """The pairs in parts. Raises PairsError."""
        sizes, source, options = self._options.all_sizes, self._source, self._options
        most = sizes.n_pairs, sizes.n_choosing, sizes.n_heldout
        if source.task is not None:
            task = replace(source.task, positive=self._sides[0], negative=self._sides[1])
            material = of_behaviour(task, pairs, 1 - options.heldout - 0.2, most)
        else:
            material = of_pairs(self._work.name, pairs, options.heldout, self._sides, most)
        if options.judge is None:
            return material
        bare = tuple(PromptItem(item.id, item.content, item.system) for item in material.heldout.items)
        judged = replace(
            material.heldout,
            items=bare,
            scorer="judge",
            options=options.judge.to_dict(),
            max_tokens=sizes.answer_tokens,
        )
        return replace(material, heldout=judged)

    def _own_pairs(self) -> tuple[list[Pair], dict[str, int]]:
        source, sizes = self._source, self._options.all_sizes
        assert source.instructions is not None
        wanted = self._wanted
        with AnswerFile(self._work.work / "answers.jsonl") as kept:
            records: dict[str, dict[str, Any]] = {}
            if kept.exists():
                kept.resume(self._metadata)
                records = {str(record["id"]): record for record in kept.records()}
            else:
                kept.start(self._metadata)
            with self._engine(self._longest, sizes.answer_tokens) as engine:
                pairs, tally = ask(
                    engine,
                    self._renderer,
                    source.questions,
                    source.instructions,
                    max_tokens=sizes.answer_tokens,
                    wanted=wanted,
                    kept=kept,
                    records=records,
                    enough=lambda n: n >= _enough(self._options.heldout) and self._clock.over(),
                    progress=lambda done, total: self._report("answers", done, total),
                )
            kept.finish(records)
        return pairs, tally

    @property
    def _wanted(self) -> int:
        """Pairs that fill the parts."""
        sizes, heldout = self._options.all_sizes, self._options.heldout
        return math.ceil(max(sizes.n_heldout / heldout, sizes.n_choosing / (0.3 * (1 - heldout))))

    @property
    def _longest(self) -> int:
        """Tokens of the longest question under an instruction."""
        instructions = self._source.instructions or {}
        texts = sorted(
            (question.messages() for question in self._source.questions), key=lambda m: sum(len(x.content) for x in m)
        )[-4:]
        first = [PromptItem("0", messages, text) for messages in texts for text in instructions.values()]
        return max(len(self._renderer.render(item.messages()).tokens) for item in first)

    def _engine(self, n_prompt: int, max_tokens: int) -> Engine:
        options = self._options
        context = {name: value for name, value in options.context.items() if value is not None}
        context["n_batch"] = max(context.get("n_batch") or 512, options.n_parallel)
        n_ctx = max(n_prompt + max_tokens + _ROOM, self._longest_text)
        return Engine(self._llama, n_ctx=n_ctx, n_slots=options.n_parallel, record=False, **context)

    @functools.cached_property
    def _longest_text(self) -> int:
        return 0 if self._neutral is None else self._neutral.longest(self._renderer)

    #
    # time
    #

    def _expect(self, material: Material | None) -> None:
        """Measure the model's speed in the first seconds, and say how long the steps take."""
        if "expected" in self._work.facts:
            return
        renderer, source, options = self._renderer, self._source, self._options
        if material is None:
            sample = sample_of_questions(renderer, source, options)
        else:
            sample = sample_of_material(renderer, material, options)
        with self._engine(sample.longest, sample.max_tokens) as engine:
            documents = self._documents(engine.n_ctx)
            found = measure_speed(engine, sample.prompts, documents, max_tokens=sample.max_tokens, now=self._clock.now)
        if material is None:
            work = work_of_questions(renderer, source, options, self._wanted, sample, found.lengths)
        else:
            work = work_of_material(renderer, material, options, sum(found.lengths) / len(found.lengths))
        work = with_text(work, renderer, self._neutral, documents)
        expected = expected_seconds(options.all_sizes, work, found.speed)
        expected["answers"] += self._clock.elapsed  # the model was loaded and measured
        self._clock.expected |= expected
        self._work.facts |= {"speed": found.speed.to_dict(), "expected": expected, "written": round(work.written, 2)}
        self._work.save()
        parts = ", ".join(f"{step} {human_duration(seconds)}" for step, seconds in expected.items() if seconds >= 1)
        what = f"{2 * work.n_asked} answers, " if work.n_asked else ""
        most = human_duration(self._clock.total, most=True)
        self._say(
            f"{what}{work.n_pairs} pairs, {work.n_heldout} held-out items; the model reads {found.speed.prompt:.0f} "
            f"tokens/s and writes {found.speed.decode:.0f}: at most about {most} ({parts})"
            f"{shorter(options, work, found.speed)}"
        )

    def _foresee(self, material: Material) -> None:
        """Once the pairs are there, tell the clock what the steps on them take; never more than was said."""
        facts = self._work.facts
        if "speed" not in facts or "written" not in facts:
            return
        speed = Speed(**facts["speed"])
        work = work_of_material(self._renderer, material, self._options, facts["written"])
        work = with_text(work, self._renderer, self._neutral, self._documents(_ROOM))
        seconds = expected_seconds(self._options.all_sizes, work, speed)
        self._clock.foresee({step: value for step, value in seconds.items() if step != "answers"})

    def _documents(self, n_ctx: int) -> list[Document]:
        """Those of the neutral text that evaluators read, in a context of this size."""
        if self._neutral is None:
            return []
        return self._neutral.documents(self._renderer, max(n_ctx, self._longest_text), self._options.all_sizes.n_text)

    #
    # the steps on the model
    #

    def _detect(self, material: Material) -> tuple[ExpertMap | None, str]:
        self._clock.begin("detect")
        if "detect" not in self._work.steps:
            show = self._show("detect")
            try:
                steps.detect(self._llama, material.pairs, self._work.work, self._work.name, self._named, show)
            except PairsError as error:
                return None, str(error)
            self._work.finish("detect", {})
        expert_map = ExpertMap.load(self._work.work / "rd.json")
        problem = ""
        if expert_map.confidence is not None and not expert_map.confidence.differs_from_shuffled:
            problem = (
                f"both sides of the {expert_map.n_pairs} pairs select the same experts: the largest RD, "
                f"{abs(expert_map.rd).max():.3f}, is no larger than that of pairs with shuffled sides "
                f"(p = {expert_map.confidence.max_rd.p:.2g})"
            )
        return expert_map, problem

    def _attribute(self, material: Material, expert_map: ExpertMap) -> ExpertMap:
        self._clock.begin("attribute")
        done = self._work.steps.get("attribute")
        if done is None:
            found = steps.attribute_experts(
                self._llama,
                material.pairs,
                expert_map,
                self._neutral,
                self._work.work,
                self._named,
                metadata=self._metadata,
                over=self._clock.over,
                show=self._show("attribute"),
            )
            done = {"effects": found is not None}
            self._work.finish("attribute", done)
        if not done["effects"]:
            self._notes.append("effects of single experts were not estimated: experts are chosen by RD")
            return expert_map
        return ExpertMap.load(self._work.work / "effects.json")

    def _tune(self, material: Material, expert_map: ExpertMap) -> tuple[Mapping[str, Any], Steering | None]:
        self._clock.begin("tune")
        done = self._work.steps.get("tune")
        if done is None:
            with (
                AnswerFile(self._work.work / "tune.jsonl") as kept,
                self._evaluator(material.choosing, kept, "tune") as e,
            ):
                pick, steering, notes = steps.choose(e, expert_map, self._work.name, self._named, self._clock.over)
                choice = None if steering is None else {**_numbers(steering)}
                done = {"pick": pick.to_dict(), "choice": choice, "notes": notes}
                self._work.finish("tune", done)
                e.finish()
        self._notes += done["notes"]
        choice = done["choice"]
        return done["pick"], None if choice is None else Steering(self._work.name, expert_map=expert_map, **choice)

    def _confirm(self, material: Material, steering: Steering) -> Confirmed:
        self._clock.begin("confirm")
        done = self._work.steps.get("confirm")
        if done is None:
            path = self._work.work
            with (
                AnswerFile(path / "confirm.jsonl") as kept,
                self._evaluator(material.heldout, kept, "confirm") as e,
            ):
                confirmed = steps.confirm(e, steering, path / "pairs.npz", self._named, self._clock.over)
                done = replace(confirmed, by_margin=self._margins(material, steering)).to_dict()
                self._work.finish("confirm", done)
                e.finish()
        return Confirmed.from_dict(dict(done))

    def _margins(self, material: Material, steering: Steering) -> Any:
        if material.margin is None:
            return None
        with (
            AnswerFile(self._work.work / "margin.jsonl") as kept,
            self._evaluator(material.margin, kept, "confirm") as evaluator,
        ):
            found = steps.compare_margins(evaluator, steering, self._options.seed)
            evaluator.finish()
        return found

    def _evaluator(self, task: Task, kept: AnswerFile, step: str) -> Any:
        return steps.evaluator_of(self._llama, task, self._neutral, self._named, kept, self._metadata, self._show(step))

    def _show(self, step: str) -> Callable[[int, int], None]:
        return lambda done, total: self._report(step, done, total)

    @property
    def _metadata(self) -> dict[str, Any]:
        return {"model": dict(self._about)}


class _TooFewPairs(Exception):
    """The model's own answers made too few pairs."""


def _numbers(steering: Steering) -> dict[str, Any]:
    """The fields of a choice that are not default."""
    return {"activate": steering.activate, "deactivate": steering.deactivate} | steering.further


def _enough(heldout: float) -> int:
    """Pairs with which every part is likely to have its least."""
    return math.ceil(1.5 * least_pairs(heldout))
