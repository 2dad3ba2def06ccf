"""`Evaluator` against answers one at a time and llama_cpp's logits, interrupted anywhere, and with scorer threads."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, FormatError, ModelMismatchError, SteeredLlama, UsageError, write_bias
from steermoe_local.evaluation.measuring.evaluator import Evaluator, EvaluatorSettings, plan
from steermoe_local.evaluation.measuring.measurements import UNSTEERED, Measurement, bias_key
from steermoe_local.evaluation.measuring.replies import Reply
from steermoe_local.evaluation.measuring.scoring import Scoring
from steermoe_local.evaluation.tasks.builtin import builtin_task
from steermoe_local.evaluation.tasks.neutral_text import NeutralText, load_neutral_text
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.evaluation.tasks.tasks import Choice, Score, Scorer, Task
from steermoe_local.generation import reply as generation_reply
from steermoe_local.generation.answer_file import AnswerFile
from steermoe_local.generation.answering import answers
from steermoe_local.generation.engine import Engine, FinishEvent, Request, Sampling, TokenEvent
from steermoe_local.llama.reasoning import reasoning_style
from steermoe_local.models.embedded import data_folder
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.pairs.prompts import PromptItem
from steermoe_local.steering.old_digests import record_name
from steermoe_local.steering.steering import Steering
from tests.support import rounding
from tests.support.generation import GREEDY
from tests.support.low_level import F32, identity_of

N = 6
SETTINGS = EvaluatorSettings(n_parallel=4, context={"n_threads": 1, "type_k": F32, "type_v": F32})


@pytest.fixture(scope="module")
def llama(tiny_f32_path: Path) -> Iterator[SteeredLlama]:
    model = SteeredLlama(tiny_f32_path, n_ctx=64, n_threads=1, n_threads_batch=1)
    yield model
    model.close()


@pytest.fixture(scope="module")
def biases() -> list[BiasFile | None]:
    """Unsteered, towards, away, and a soft rule."""
    steering = Steering.open(map_file=map_path("digits-words"), activate=2, deactivate=2)
    choices = (steering, steering.changed(reverse=True), steering.changed(scale=1.5))
    return [None, *(choice.build() for choice in choices)]


@pytest.fixture(scope="module")
def task() -> Task:
    return builtin_task("digits-words").first(N)


@pytest.fixture(scope="module")
def benign() -> tuple[Task, Scorer]:
    task = replace(builtin_task("neutral"), scorer="refusal").first(2)
    return task, make_scorer("refusal")


@pytest.fixture(scope="module")
def neutral() -> NeutralText:
    text = load_neutral_text(data_folder() / "neutral.heldout.jsonl")
    return replace(text, passages=text.passages[:5])


@pytest.fixture
def open_evaluator(llama: SteeredLlama, task: Task) -> Iterator[Callable[..., Evaluator]]:
    """Benches on the embedded model, closed behind the test."""
    opened: list[Evaluator] = []

    def make(task: Task = task, scorer: Scorer | None = None, **options: Any) -> Evaluator:
        scorer = scorer or make_scorer(task.scorer, task.options)
        opened.append(Evaluator(llama, task, scorer, **{"settings": SETTINGS} | options))
        return opened[-1]

    yield make
    for evaluator in opened:
        evaluator.__exit__()


def texts(measured: Measurement) -> list[str]:
    return [answer.text for answer in measured.answers]


#
# what is measured
#


@pytest.mark.numeric
def test_answers_are_those_of_one_at_a_time(
    open_evaluator: Callable[..., Evaluator], llama: SteeredLlama, task: Task, biases: list[BiasFile | None]
) -> None:
    measured = open_evaluator().measure(biases)
    with Engine(llama, n_ctx=96, n_threads=1, record=False) as engine:
        prompts = [engine.renderer.render(item.messages()) for item in task.items]
        for bias, found in zip(biases, measured, strict=True):
            events = answers(engine, prompts, {"": bias}, sampling=GREEDY, max_tokens=task.max_tokens)
            ends = [what for _, _, what in events if isinstance(what, generation_reply.Reply)]
            assert texts(found) == [reply.text for reply in ends]
            assert [answer.finish for answer in found.answers] == [reply.finish.reason for reply in ends]
            assert [answer.n_tokens for answer in found.answers] == [reply.finish.n_generated for reply in ends]
    assert len({tuple(texts(found)) for found in measured}) >= 3, "the steerings are told apart"
    assert measured[1].rate == 1
    assert measured[2].rate == 0


@pytest.mark.numeric
def test_how_many_are_decoded_at_once_does_not_matter(
    open_evaluator: Callable[..., Evaluator], tiny_f32_path: Path, biases: list[BiasFile | None], neutral: NeutralText
) -> None:
    some = neutral.documents(open_evaluator().renderer, 64)[0]
    allowance = rounding.logprobs(teacher_forced(tiny_f32_path, list(some.tokens), None), **rounding.TINY)
    one, many = (
        open_evaluator(settings=replace(SETTINGS, n_parallel=n), neutral=neutral).measure(biases) for n in (1, 16)
    )
    assert [texts(found) for found in one] == [texts(found) for found in many]
    assert [found.rate for found in one] == [found.rate for found in many]
    for first, second in zip(one, many, strict=True):
        assert first.text is not None
        assert second.text is not None
        assert first.text.nll == pytest.approx(second.text.nll, rel=0, abs=allowance)
        assert first.text.kl == pytest.approx(second.text.kl, rel=0, abs=rounding.kl(second.text.kl, allowance))
        assert (first.text.same_top, first.text.n) == (second.text.same_top, second.text.n)


def test_sampled_answers_follow_their_seeds(
    open_evaluator: Callable[..., Evaluator], biases: list[BiasFile | None]
) -> None:
    hot = replace(SETTINGS, sampling=Sampling(temperature=2.0), seeds=(3, 4))
    one = open_evaluator(settings=hot).measure(biases[:2])
    two = open_evaluator(settings=replace(hot, n_parallel=16)).measure(biases[:2])
    for first, second in zip(one, two, strict=True):
        assert texts(first) == texts(second)
        assert len(first.answers) == 2 * N
        assert first.values.shape == (N,)
    by_seed = [[a.text for a in one[0].answers if a.seed == seed] for seed in (3, 4)]
    assert by_seed[0] != by_seed[1]
    items = list(dict.fromkeys(answer.item for answer in one[0].answers))
    means = [np.mean([answer.value for answer in one[0].answers if answer.item == item]) for item in items]
    assert one[0].values.tolist() == means


@dataclass(frozen=True)
class Sides:
    """Chooses between an item's two sides."""

    n_parallel: int = 0
    kind: Any = "choices"

    def check(self, item: PromptItem) -> None:
        """Any."""

    def score(self, item: PromptItem, text: str) -> Score:
        """Not of texts."""
        raise AssertionError

    def choices(self, item: PromptItem) -> tuple[str, ...]:
        """The two sides."""
        return item.extra["positive"], item.extra["negative"]

    def score_choices(self, item: PromptItem, choices: tuple[Choice, ...]) -> Score:
        """The likelier one."""
        return Score(float(choices[0].logprob > choices[1].logprob), "positive")


def log_softmax(logits: Any) -> Any:
    logits = np.asarray(logits, dtype=np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def teacher_forced(path: Path, tokens: list[int], bias: BiasFile | None) -> Any:
    """Log-probabilities behind each token, by llama_cpp's own loop."""
    options = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "type_k": F32, "type_v": F32}
    judge = SteeredLlama(path, bias=bias, **options)
    judge.eval(tokens)
    found = log_softmax(judge.scores[: len(tokens)])
    judge.close()
    return found


@pytest.mark.numeric
def test_choices_are_sums_of_log_probabilities(
    open_evaluator: Callable[..., Evaluator],
    tmp_path: Path,
    tiny_f32_path: Path,
    task: Task,
    biases: list[BiasFile | None],
) -> None:
    kept = AnswerFile(tmp_path / "records.jsonl")
    evaluator = open_evaluator(scorer=Sides(), kept=kept)
    measured = evaluator.measure(biases[:3])
    assert [found.rate for found in measured][1:] == [1, 0], "the likelier side is the one that is steered to"
    renderer = evaluator.renderer
    records = {record["id"]: record for record in kept.records()}
    item = task.items[2]
    for bias in biases[:3]:
        record = records[f"{bias_key(bias)}/0/{item.id}"]
        head = renderer.chat_text([message.to_dict() for message in item.messages()])
        n_head = len(renderer.tokenize(head, add_special=False))
        for text, logprob, n_tokens in record["choices"]:
            tokens = renderer.tokenize(head + text, add_special=False)
            logprobs = teacher_forced(tiny_f32_path, tokens, bias)
            wanted = sum(logprobs[i - 1, tokens[i]] for i in range(n_head, len(tokens)))
            assert n_tokens == len(tokens) - n_head
            allowance = n_tokens * rounding.logprobs(logprobs, **rounding.TINY)
            assert logprob == pytest.approx(wanted, rel=0, abs=allowance)
    kept.close()


@pytest.mark.numeric
def test_text_scores_are_those_of_numpy(
    open_evaluator: Callable[..., Evaluator], tiny_f32_path: Path, neutral: NeutralText, biases: list[BiasFile | None]
) -> None:
    evaluator = open_evaluator(neutral=neutral)
    measured = evaluator.measure(biases)
    documents = neutral.documents(evaluator.renderer, evaluator.engine.n_ctx)
    base = [teacher_forced(tiny_f32_path, list(d.tokens), None) for d in documents]
    allowance = rounding.logprobs(np.concatenate(base), **rounding.TINY)
    for bias, found in zip(biases, measured, strict=True):
        nll = kl = same = n = 0.0
        for document, unsteered in zip(documents, base, strict=True):
            steered = teacher_forced(tiny_f32_path, list(document.tokens), bias)
            for i in range(document.first, len(document.tokens) - 1):
                p, q = unsteered[i], steered[i]
                nll -= q[document.tokens[i + 1]]
                kl += float((np.exp(p) * (p - q)).sum())
                same += float(p.argmax() == q.argmax())
                n += 1
        assert found.text is not None
        assert found.text.n == n
        assert found.text.nll == pytest.approx(nll / n, rel=0, abs=allowance)
        assert found.text.kl == pytest.approx(kl / n, rel=0, abs=rounding.kl(kl / n, allowance))
        assert found.text.same_top == same / n
    assert measured[0].text is not None
    assert measured[0].text.kl == 0.0, "exactly"
    assert measured[0].text.same_top == 1.0
    assert measured[1].text is not None
    assert measured[1].text.kl > 0


def test_a_bias_that_does_nothing_is_unsteered(
    open_evaluator: Callable[..., Evaluator], tiny_path: Path, neutral: NeutralText
) -> None:
    nothing = BiasFile.from_signs(np.zeros(identity_of(tiny_path).shape, dtype=np.int8), identity_of(tiny_path))
    evaluator = open_evaluator(neutral=neutral)
    one, two = evaluator.measure([None, nothing])
    assert evaluator.n_computed == N + 1
    assert one.key == two.key == UNSTEERED
    assert texts(one) == texts(two)
    assert two.text is not None
    assert two.text.kl == 0.0
    assert two.bias is nothing


def test_the_environment_does_not_steer_the_unsteered_side(
    tmp_path: Path, tiny_path: Path, task: Task, biases: list[BiasFile | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert biases[1] is not None
    write_bias(biases[1], tmp_path / "bias.gguf")

    def unsteered() -> list[str]:
        model = SteeredLlama(tiny_path, n_ctx=64, n_threads=1)
        with Evaluator(model, task, make_scorer(task.scorer, task.options), settings=SETTINGS) as evaluator:
            found = texts(evaluator.measure([None])[0])
        model.close()
        return found

    plain = unsteered()
    monkeypatch.setenv("STEERMOE_BIAS", str(tmp_path / "bias.gguf"))
    assert unsteered() == plain
    assert not all(text.replace(", ", "").isdigit() for text in plain), "towards would be digits alone"


def test_a_model_that_is_steered_itself_does_not_steer_the_bench(
    tiny_path: Path, task: Task, biases: list[BiasFile | None], open_evaluator: Callable[..., Evaluator]
) -> None:
    model = SteeredLlama(tiny_path, n_ctx=64, n_threads=1, bias=biases[1])
    with Evaluator(model, task, make_scorer(task.scorer, task.options), settings=SETTINGS) as evaluator:
        assert texts(evaluator.measure([None])[0]) == texts(open_evaluator().measure([None])[0])
    model.close()


def test_reasoning_is_no_part_of_an_answer() -> None:
    style = reasoning_style("{{ x }}<think>", "user: hi<think>\n")
    reply = Reply(style)
    for number, text in enumerate(("three or ", "3?</th", "ink>\n", "the answer")):
        reply.add(TokenEvent(text, number))
        assert reply.finish is None
    end = FinishEvent("stop", 3, 0, 4, 0.0, 0.0, 0, None)
    reply.add(end)
    assert reply.finish is end
    assert reply.text == "the answer"
    assert reply.tokens == [0, 1, 2, 3], "loops in the reasoning count, too"


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
    with pytest.raises(UsageError, match="no items to measure"):
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
        evaluator = make(kept=kept, resume=resume, about={"model": "tiny"}, progress=progress, **options)
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
        evaluator = open_evaluator(kept=kept, resume=True, about={"model": "tiny"}, **options)
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
        open_evaluator(kept=kept, about={"model": "one"}).measure([None])
        before = kept.path.read_bytes()
        for options, words in (
            ({"about": {"model": "two"}}, 'begun with model "one", now it is "two"'),
            ({"task": task.first(3)}, "begun with task_sha256"),
            ({"settings": replace(SETTINGS, n_text=5)}, "begun with n_text 2000, now it is 5"),
            # a plain neutral text is cut to the context
            ({"settings": replace(SETTINGS, n_ctx=300)}, "begun with n_ctx .*, now it is 300"),
        ):
            with pytest.raises(UsageError, match=words):
                open_evaluator(**{"kept": kept, "resume": True, "about": {"model": "one"}} | options)
        assert kept.path.read_bytes() == before
        resumed = open_evaluator(kept=kept, resume=True, about={"model": "one"})
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
        again = AnswerFile(tmp_path / "a.jsonl")
        assert again.resume({}) == {"1", "b", "c"}
        assert list(again.records())[:2] == records
        again.close()


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
    scorer = Slow(fail=1)  # the second; the first takes longer

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
    words = rf"task digits-words, .*: prompt and answer need {needed} tokens of context, but n_ctx is {needed - 1}"
    with pytest.raises(UsageError, match=words):
        plan(tiny_path, task, scorer, settings=small)
    with pytest.raises(UsageError, match=words):
        open_evaluator(settings=small)
    long = replace(task, items=(PromptItem("long", "three " * 3000, extra={"positive": "3", "negative": "three"}),))
    with pytest.raises(UsageError, match=r"long: .* but the model was trained with .*; shorten the prompt"):
        plan(tiny_path, long, scorer)
    behind = replace(neutral, passages=((neutral.passages[0][0], "three " * 400),))
    assert plan(tiny_path, task, scorer, neutral=behind) > 400
    with pytest.raises(UsageError, match=f"a passage of .* tokens, but n_ctx is {needed}"):
        plan(tiny_path, task, scorer, neutral=behind, settings=replace(SETTINGS, n_ctx=needed))


def test_an_item_that_cannot_be_scored(open_evaluator: Callable[..., Evaluator], task: Task) -> None:
    bad = replace(task, items=(*task.items, PromptItem("x", "Count.", line=9)))
    with pytest.raises(FormatError):
        open_evaluator(task=bad)
    raw = replace(task, raw=True, items=(PromptItem("x", task.items[0].messages(), extra=task.items[0].extra),))
    with pytest.raises(UsageError, match="x: messages need a chat template"):
        open_evaluator(task=raw)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1, 1)}, "none twice"),
        ({"seeds": (1, 2)}, "need a temperature above 0"),
        ({"n_parallel": 0}, "is not from 1 to 256"),
        ({"n_parallel": 257}, "is not from 1 to 256"),
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
