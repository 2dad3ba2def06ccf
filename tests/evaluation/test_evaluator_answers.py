"""`Evaluator` against answers one at a time and llama_cpp's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, SteeredLlama, write_bias
from steermoe_local.evaluation.measuring.evaluator import Evaluator
from steermoe_local.evaluation.measuring.measurements import UNSTEERED, bias_key
from steermoe_local.evaluation.measuring.replies import Reply
from steermoe_local.evaluation.tasks.neutral_text import NeutralText
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.evaluation.tasks.tasks import Choice, Score, Task
from steermoe_local.generation import reply as generation_reply
from steermoe_local.generation.answer_file import AnswerFile
from steermoe_local.generation.answering import answers
from steermoe_local.generation.engine import Engine, FinishEvent, Sampling, TokenEvent
from steermoe_local.llama.reasoning_styles import reasoning_style
from steermoe_local.pairs.prompts import PromptItem
from tests.support import rounding
from tests.support.evaluators import SETTINGS, N, texts
from tests.support.generation import GREEDY
from tests.support.low_level import F32, identity_of


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
    assert len({tuple(texts(found)) for found in measured}) >= 3, "the steerings differ"
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
    assert not all(text.replace(", ", "").isdigit() for text in plain), "positively steered, they would be digits alone"


def test_a_model_that_is_steered_itself_does_not_steer_the_evaluator(
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
