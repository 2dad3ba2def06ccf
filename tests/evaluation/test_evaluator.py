"""`Evaluator`: what it keeps over interruptions, scorers in threads, and what it refuses."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, BusyError, FormatError, ModelMismatchError, SteeredLlama, UsageError
from steermoe_local.evaluation.measuring.evaluator import Evaluator, EvaluatorSettings, plan
from steermoe_local.evaluation.measuring.measurements import UNSTEERED, bias_key
from steermoe_local.evaluation.measuring.replies import Reply
from steermoe_local.evaluation.measuring.scoring import Scoring
from steermoe_local.evaluation.tasks.neutral_text import NeutralText
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.evaluation.tasks.tasks import Choice, Score, Scorer, Task
from steermoe_local.generation.answer_file import AnswerFile
from steermoe_local.generation.engine import FinishEvent, Request, TokenEvent
from steermoe_local.pairs.prompts import PromptItem
from steermoe_local.steering.old_digests import record_name
from tests.support.evaluators import SETTINGS, N, texts
from tests.support.generation import GREEDY

#
# what is kept
#


def test_what_was_measured_is_not_measured_again(
    open_evaluator: Callable[..., Evaluator],
    biases: list[BiasFile | None],
    benign: tuple[Task, Scorer],
    neutral: NeutralText,
) -> None:
    shown: list[tuple[str, int, int]] = []
    evaluator = open_evaluator(benign=benign, neutral=neutral, progress=lambda *facts: shown.append(facts))
    ids = [str(item.id) for item in evaluator.task.items]
    (first,) = evaluator.measure([biases[1]], items=ids[:2], text=False, benign=False, what="a")
    assert evaluator.n_computed == 2
    assert shown == [("a", 0, 2), ("a", 1, 2), ("a", 2, 2)]
    assert (first.text, first.benign) == (None, ())
    full = evaluator.measure([biases[1], None, biases[1]], what="b")
    assert evaluator.n_computed == 2 * (N + 2 + 1)
    assert texts(full[0])[:2] == texts(first)
    assert texts(full[0]) == texts(full[2])
    assert shown[-1][1] == shown[-1][2]
    again = evaluator.measure([biases[1], None])
    assert evaluator.n_computed == 2 * (N + 2 + 1)
    assert texts(again[1]) == texts(full[1])
    with pytest.raises(UsageError, match="no items"):
        evaluator.measure([None], items=[])


class Interrupted(Exception):
    """A failure of the test's own."""


def run(
    make: Callable[..., Evaluator], output: Path, biases: list[BiasFile | None], stop: float, **options: Any
) -> None:
    """One run of a program that measures twice; it is interrupted when `stop` results are there."""
    left = [stop]

    def progress(_what: str, done: int, _total: int) -> None:
        if done:
            left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    with AnswerFile(output) as kept:
        resume = kept.exists()
        evaluator = make(kept=kept, resume=resume, metadata={"model": "tiny"}, progress=progress, **options)
        evaluator.measure(biases[:2], items=[str(i.id) for i in evaluator.task.items[:3]], text=False, benign=False)
        evaluator.measure(biases)
        evaluator.finish()


def test_an_interrupted_run_comes_to_the_same_file(
    open_evaluator: Callable[..., Evaluator],
    tmp_path: Path,
    biases: list[BiasFile | None],
    benign: tuple[Task, Scorer],
    neutral: NeutralText,
) -> None:
    options: dict[str, Any] = {"benign": benign, "neutral": neutral}
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    run(open_evaluator, whole, biases, np.inf, **options)
    total = len(whole.read_text("utf-8").splitlines())
    assert total == 4 * (N + 2 + 1)
    rng = random.Random(7)
    for _ in range(4):
        while True:
            try:
                run(open_evaluator, parts, biases, rng.randrange(total // 2), **options)
            except KeyboardInterrupt:
                continue
            break
        assert parts.read_bytes() == whole.read_bytes()
        assert not parts.with_name("parts.jsonl.partial").exists()


def test_a_run_that_an_earlier_version_began(
    open_evaluator: Callable[..., Evaluator],
    tmp_path: Path,
    biases: list[BiasFile | None],
    benign: tuple[Task, Scorer],
    neutral: NeutralText,
) -> None:
    """Its records name biases otherwise; it is finished under those names, and nothing is measured again."""
    options: dict[str, Any] = {"benign": benign, "neutral": neutral}
    whole, old = tmp_path / "whole.jsonl", tmp_path / "old.jsonl"
    run(open_evaluator, whole, biases, np.inf, **options)
    with pytest.raises(KeyboardInterrupt):
        run(open_evaluator, old, biases[:3], 3 * N, **options)
    names = {bias_key(bias): record_name(bias) for bias in biases if bias is not None}
    assert len(set(names.values()) | set(names)) == 2 * len(names)

    def renamed(text: str, known: set[str]) -> str:
        for name in known:
            text = text.replace(name, names[name])
        return text

    partial = old.with_name("old.jsonl.partial")
    text = partial.read_text("utf-8")
    begun = {name for name in names if name in text}
    assert 0 < len(begun) < len(names)
    partial.write_text(renamed(text, begun), "utf-8")
    n_kept = len(text.splitlines()) - 1
    with AnswerFile(old) as kept:
        evaluator = open_evaluator(kept=kept, resume=True, metadata={"model": "tiny"}, **options)
        ids = [str(item.id) for item in evaluator.task.items[:3]]
        evaluator.measure(biases[:2], items=ids, text=False, benign=False)
        evaluator.measure(biases)
        evaluator.finish()
        assert (evaluator.n_computed, evaluator.n_kept) == (4 * (N + 2 + 1) - n_kept, 4 * (N + 2 + 1))
    assert old.read_text("utf-8") == renamed(whole.read_text("utf-8"), begun)


def test_a_line_that_was_cut_off_is_measured_again(
    open_evaluator: Callable[..., Evaluator], tmp_path: Path, biases: list[BiasFile | None]
) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    run(open_evaluator, whole, biases, np.inf)
    with pytest.raises(KeyboardInterrupt):
        run(open_evaluator, parts, biases, 7)
    partial = parts.with_name("parts.jsonl.partial")
    partial.write_bytes(partial.read_bytes()[:-11])
    run(open_evaluator, parts, biases, np.inf)
    assert parts.read_bytes() == whole.read_bytes()


def test_other_settings_are_no_continuation(
    open_evaluator: Callable[..., Evaluator], tmp_path: Path, task: Task
) -> None:
    with AnswerFile(tmp_path / "a.jsonl") as kept:
        open_evaluator(kept=kept, metadata={"model": "one"}).measure([None])
        before = kept.path.read_bytes()
        for options, words in (
            ({"metadata": {"model": "two"}}, 'model "one", now it is "two"'),
            ({"task": task.first(3)}, "with task_sha256 "),
            ({"settings": replace(SETTINGS, n_text=5)}, "n_text 2000, now it is 5"),
            # a plain neutral text is cut to the context
            ({"settings": replace(SETTINGS, n_ctx=300)}, "with n_ctx .* 300"),
        ):
            with pytest.raises(UsageError, match=words):
                open_evaluator(**{"kept": kept, "resume": True, "metadata": {"model": "one"}} | options)
        assert kept.path.read_bytes() == before
        resumed = open_evaluator(kept=kept, resume=True, metadata={"model": "one"})
        resumed.measure([None])
        assert (resumed.n_computed, resumed.n_kept) == (0, N)


def test_records_of_an_answer_file(tmp_path: Path) -> None:
    records = [{"id": 1, "text": "ä\u2028"}, {"id": "b", "text": ""}]
    with AnswerFile(tmp_path / "a.jsonl") as kept:
        kept.start({})
        assert list(kept.records()) == []
        for record in records:
            kept.add(record)
        assert list(kept.records()) == records
        kept.add({"id": "c"})
        assert [record["id"] for record in kept.records()] == [1, "b", "c"], "reading does not move writing"
        with pytest.raises(BusyError), AnswerFile(tmp_path / "a.jsonl") as other:
            other.resume({})
    with AnswerFile(tmp_path / "a.jsonl") as again:
        assert again.resume({}) == {"1", "b", "c"}
        assert list(again.records())[:2] == records


#
# scorers
#


class Slow:
    """Scores in threads, the first answers last."""

    kind: Any = "text"
    n_parallel = 3

    def __init__(self, fail: int | None = None) -> None:
        self.fail, self.n, self.lock = fail, 0, threading.Lock()
        self.threads: set[int] = set()

    def check(self, item: PromptItem) -> None:
        """Any."""

    def score(self, item: PromptItem, text: str) -> Score:
        """Long for the first."""
        with self.lock:
            number, self.n = self.n, self.n + 1
            self.threads.add(threading.get_ident())
        time.sleep(0.03 if number % 3 == 0 else 0.001)
        if number == self.fail:
            raise Interrupted
        return Score(1.0 if text.strip().isdigit() else 0.0, text)

    def choices(self, item: PromptItem) -> tuple[str, ...]:
        """None."""
        raise AssertionError

    def score_choices(self, item: PromptItem, choices: tuple[Choice, ...]) -> Score:
        """None."""
        raise AssertionError


def test_threads_change_nothing(
    open_evaluator: Callable[..., Evaluator], tmp_path: Path, biases: list[BiasFile | None]
) -> None:
    files = []
    for number, n_parallel in enumerate((0, 3)):
        scorer = Slow()
        scorer.n_parallel = n_parallel
        with AnswerFile(tmp_path / f"{number}.jsonl") as kept:
            evaluator = open_evaluator(scorer=scorer, kept=kept)
            for found in evaluator.measure(biases):
                assert [answer.label for answer in found.answers] == texts(found), "each with its own score"
            evaluator.finish()
            assert (threading.get_ident() in scorer.threads) == (n_parallel == 0)
        files.append(kept.output.read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("n_parallel", [0, 3])
def test_a_scorer_that_fails_loses_nothing(
    open_evaluator: Callable[..., Evaluator], tmp_path: Path, n_parallel: int, biases: list[BiasFile | None]
) -> None:
    scorer = Slow(fail=8)
    scorer.n_parallel = n_parallel
    with AnswerFile(tmp_path / "a.jsonl") as kept:
        evaluator = open_evaluator(scorer=scorer, kept=kept)
        with pytest.raises(Interrupted):
            evaluator.measure(biases)
        assert evaluator.n_kept >= 8, "what was scored before is kept"
        before = evaluator.n_computed
        found = evaluator.measure(biases)  # its slots are free again
        assert evaluator.n_computed == 4 * N >= before
        assert [answer.label for answer in found[0].answers] == texts(found[0])


def test_what_is_being_scored_when_another_fails_is_kept() -> None:
    kept: list[str] = []
    failing = threading.Event()

    class FailsAtB(Slow):
        def score(self, item: PromptItem, text: str) -> Score:
            """`a` is being scored when `b` fails, whichever thread comes first."""
            if text == "b":
                failing.set()
                raise Interrupted
            assert failing.wait(60)
            return Slow.score(self, item, text)

    scorer = FailsAtB()

    def job(name: str) -> Any:
        item = PromptItem(name, "x")
        return SimpleNamespace(id=name, item=item, scorer=scorer)

    def reply_of(text: str) -> Reply:
        reply = Reply()
        reply.add(TokenEvent(text, 0))
        return reply

    def run_both() -> None:
        with Scoring(2, lambda job, _reply, score: kept.append(f"{job.id} {score.label}")) as scoring:
            for name in ("a", "b"):
                scoring.add(job(name), reply_of(name))
            scoring.finish()

    with pytest.raises(Interrupted):
        run_both()
    assert kept == ["a a"]


#
# what is refused, before long work
#


def test_a_bias_of_another_model(open_evaluator: Callable[..., Evaluator], biases: list[BiasFile | None]) -> None:
    assert biases[1] is not None
    other = replace(biases[1], identity=replace(biases[1].identity, router_sha256="1" * 64))
    evaluator = open_evaluator()
    with pytest.raises(ModelMismatchError):
        evaluator.measure([None, biases[1], other])
    assert evaluator.n_computed == 0
    forced = open_evaluator(settings=replace(SETTINGS, force=True))
    assert forced.measure([other])[0].rate == 1


def test_a_prompt_that_does_not_fit(
    open_evaluator: Callable[..., Evaluator], task: Task, tiny_path: Path, neutral: NeutralText
) -> None:
    scorer = make_scorer(task.scorer, task.options)
    needed = plan(tiny_path, task, scorer)
    assert open_evaluator().engine.n_ctx == needed
    small = replace(SETTINGS, n_ctx=needed - 1)
    words = rf"task digits-words, .* {needed} tokens .* n_ctx is {needed - 1}"
    with pytest.raises(UsageError, match=words):
        plan(tiny_path, task, scorer, settings=small)
    with pytest.raises(UsageError, match=words):
        open_evaluator(settings=small)
    long = replace(task, items=(PromptItem("long", "three " * 3000, extra={"positive": "3", "negative": "three"}),))
    with pytest.raises(UsageError, match=r"long: .* trained with "):
        plan(tiny_path, long, scorer)
    behind = replace(neutral, passages=((neutral.passages[0][0], "three " * 400),))
    assert plan(tiny_path, task, scorer, neutral=behind) > 400
    with pytest.raises(UsageError, match=rf"a passage of .* n_ctx is {needed}"):
        plan(tiny_path, task, scorer, neutral=behind, settings=replace(SETTINGS, n_ctx=needed))


def test_an_item_that_cannot_be_scored(open_evaluator: Callable[..., Evaluator], task: Task) -> None:
    bad = replace(task, items=(*task.items, PromptItem("x", "Count.", line=9)))
    with pytest.raises(FormatError):
        open_evaluator(task=bad)
    raw = replace(task, raw=True, items=(PromptItem("x", task.items[0].messages(), extra=task.items[0].extra),))
    with pytest.raises(UsageError, match=r"x: .*chat template"):
        open_evaluator(task=raw)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1, 1)}, "none twice"),
        ({"seeds": (1, 2)}, "temperature"),
        ({"n_parallel": 0}, "n_parallel: 0 "),
        ({"n_parallel": 257}, "n_parallel: 257 "),
    ],
)
def test_impossible_settings(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        EvaluatorSettings(**fields)


def test_settings_are_json(
    open_evaluator: Callable[..., Evaluator], benign: tuple[Task, Scorer], neutral: NeutralText
) -> None:
    evaluator = open_evaluator(benign=benign, neutral=neutral)
    assert json.loads(json.dumps(evaluator.settings)) == evaluator.settings
    assert evaluator.settings["task_sha256"] == evaluator.task.sha256
    assert evaluator.settings["sampling"] == {"temperature": 0}


def test_keys_of_biases(biases: list[BiasFile | None]) -> None:
    keys = [bias_key(bias) for bias in biases]
    assert len(set(keys)) == 4
    assert keys[0] == UNSTEERED
    hard = biases[1]
    assert hard is not None
    assert bias_key(replace(hard, provenance={"behaviour": "other"})) == keys[1]
    assert bias_key(replace(hard, epsilon=0.5)) != keys[1]


def test_engine_is_its_own(llama: SteeredLlama, open_evaluator: Callable[..., Evaluator]) -> None:
    evaluator = open_evaluator()
    evaluator.measure([None])
    assert evaluator.engine.n_free == SETTINGS.n_parallel
    assert list(evaluator.engine.generate()) == []
    with evaluator.engine as engine:
        request = Request([1, 2, 3], None, GREEDY, 1)
        assert [type(event) for _, event in engine.generate(request)][-1] is FinishEvent
