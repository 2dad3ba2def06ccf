"""Neutral texts: what is cut where, `Engine.logits` against llama_cpp's own, and scores by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local import BiasFile, FormatError, Message, SteeredLlama, UsageError
from steermoe_local.evaluation.tasks.neutral_text import (
    Document,
    NeutralText,
    TextScore,
    load_neutral_text,
    log_probabilities,
    score_text,
)
from steermoe_local.generation.engine import Engine, FinishEvent, Request, Sampling
from steermoe_local.llama.rendering import Renderer
from steermoe_local.llama.sampling import log_softmax
from steermoe_local.models.embedded import data_folder
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.steering.steering import Steering
from tests.support import rounding
from tests.support.low_level import F32

pytestmark = pytest.mark.numeric

PROSE = "three and four are seven . " * 40


@pytest.fixture(scope="module")
def llama(tiny_f32_path: Path) -> Iterator[SteeredLlama]:
    """Weights and cache in F32: in F16, what differs in the last bit of F32 is rounded to neighbours in F16."""
    model = SteeredLlama(
        tiny_f32_path, n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, type_k=F32, type_v=F32
    )
    yield model
    model.close()


@pytest.fixture(scope="module")
def renderer(llama: SteeredLlama) -> Any:
    return Renderer(llama._model)


@pytest.fixture(scope="module")
def bias() -> BiasFile | None:
    return Steering.open(map_file=map_path("digits-words"), activate=2, deactivate=2).build()


def engine_of(llama: SteeredLlama, **options: Any) -> Engine:
    return Engine(llama, n_threads=1, type_k=F32, type_v=F32, **options)


def logprobs(llama: SteeredLlama, tokens: list[int], bias: BiasFile | None) -> Any:
    llama.set_bias(bias)
    llama.reset()
    llama.eval(tokens)
    found = log_softmax(np.array(llama.scores[: len(tokens)], dtype=np.float32))
    llama.set_bias(None)
    return found


#
# documents
#


def test_plain_text_is_cut_right_at_the_context(renderer: Any) -> None:
    tokens = renderer.tokenize(PROSE, add_special=True)
    text = NeutralText("prose", ((None, PROSE),))
    for n_ctx in (2, 7, 64, len(tokens) - 1, len(tokens), len(tokens) + 1):
        documents = text.documents(renderer, n_ctx)
        pieces = [tokens[i : i + n_ctx] for i in range(0, len(tokens), n_ctx)]
        assert [list(d.tokens) for d in documents] == [piece for piece in pieces if len(piece) > 1]
        assert all(d.first == 0 and d.n == len(d.tokens) - 1 for d in documents)
        assert all(len(d.tokens) <= n_ctx for d in documents)


@given(n_ctx=st.integers(2, 80), most=st.integers(1, 300))
@settings(max_examples=25)
def test_no_more_tokens_count_than_wanted(renderer: Any, n_ctx: int, most: int) -> None:
    text = NeutralText("prose", ((None, PROSE), (None, "four")))
    whole = sum(d.n for d in text.documents(renderer, n_ctx))
    found = text.documents(renderer, n_ctx, most)
    assert sum(d.n for d in found) == min(most, whole)
    assert all(d.n > 0 for d in found)


def test_behind_a_prompt_the_answer_alone_counts(renderer: Any) -> None:
    text = load_neutral_text(data_folder() / "neutral.heldout.jsonl")
    text = replace(text, passages=text.passages[:3])
    for (prompt, answer), document in zip(text.passages, text.documents(renderer, 64), strict=True):
        assert prompt is not None
        head = renderer.chat_text([m.to_dict() for m in prompt])
        assert list(document.tokens) == renderer.tokenize(head + answer, add_special=False)
        assert document.first == len(renderer.tokenize(head, add_special=False)) - 1
        assert document.n == len(document.tokens) - 1 - document.first
    longest = text.longest(renderer)
    assert longest == max(len(d.tokens) for d in text.documents(renderer, 64))
    assert len(text.documents(renderer, longest)) == 3
    with pytest.raises(UsageError, match=f"{longest} tokens, but n_ctx is {longest - 1}"):
        text.documents(renderer, longest - 1)
    assert NeutralText("prose", ((None, PROSE),)).longest(renderer) == 0


def test_nothing_to_predict(renderer: Any) -> None:
    with pytest.raises(UsageError, match=r"^x: no text"):
        NeutralText("x", ((None, PROSE),)).documents(renderer, 1)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffEin Text.\n".encode())
    assert load_neutral_text(path) == NeutralText("a.txt", ((None, "Ein Text.\n"),))
    chat = tmp_path / "a.jsonl"
    chat.write_text('{"prompt": "Hi", "answer": "Ho"}\n', "utf-8")
    assert load_neutral_text(chat).passages == (((Message("user", "Hi"),), "Ho"),)
    assert load_neutral_text(chat).sha256 != load_neutral_text(path).sha256
    for name, data, words in (
        ("b.txt", b"\xff\xfe", r"b\.txt: not UTF-8"),
        ("b.txt", b" \n", r"b\.txt: empty"),
        ("b.jsonl", b'{"prompt": "Hi"}\n', r"b\.jsonl:1: answer: "),
        ("b.jsonl", b'{"prompt": "Hi", "answer": ""}\n', r"b\.jsonl:1: answer: "),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormatError, match=words):
            load_neutral_text(tmp_path / name)
    with pytest.raises(FormatError, match=r"missing\.txt: "):
        load_neutral_text(tmp_path / "missing.txt")


#
# Engine.logits
#


@pytest.mark.parametrize(("n_batch", "first"), [(512, 0), (512, 5), (6, 0), (7, 11), (4, 3), (512, 37)])
def test_logits_are_those_of_llama(
    llama: SteeredLlama, renderer: Any, bias: BiasFile | None, n_batch: int, first: int
) -> None:
    tokens = renderer.tokenize(PROSE, add_special=True)[:40]
    with engine_of(llama, n_ctx=64, n_slots=2, n_batch=n_batch) as engine:
        parts = list(engine.logits([None, bias], tokens, first))
        starts = [start for start, _ in parts]
        assert starts[0] == first
        ends = [start + found.shape[1] for start, found in parts]
        assert [*starts[1:], len(tokens) - 1] == ends, "no gap, up to the last token but one"
        together = np.concatenate([found for _, found in parts], axis=1)
        for place, steered in enumerate((None, bias)):
            wanted = logprobs(llama, tokens[:-1], steered)[first:]
            allowance = rounding.logprobs(wanted, **rounding.TINY)
            np.testing.assert_allclose(log_softmax(together[place]), wanted, rtol=0, atol=allowance)
        # the same again: nothing depends on what was in memory
        again = np.concatenate([found for _, found in engine.logits([None, bias], tokens, first)], axis=1)
        np.testing.assert_array_equal(again, together)


def test_logits_refuses(llama: SteeredLlama) -> None:
    with Engine(llama, n_ctx=8, n_slots=2, n_batch=2, n_threads=1) as engine:
        for n_biases, tokens, first, words in (
            (0, [1, 2, 3], 0, "behind 0 of 2"),
            (1, [1], 0, "behind 0 of 0"),
            (1, [1, 2, 3], 2, "behind 2 of 2"),
            (1, [1, 2, 3], -1, "behind -1 "),
            (1, [1] * 10, 0, "n_ctx 8 "),
            (2, [1, 10**6, 3], 0, "the vocabulary has"),
            (3, [1, 2, 3], 0, "n_batch 2 is below 3"),
        ):
            with pytest.raises(UsageError, match=words):
                list(engine.logits([None] * n_biases, tokens, first))
        assert len(list(engine.logits([None, None], [1] * 9))) == 8
        with engine.slot(), pytest.raises(UsageError, match="2 free slots"):
            list(engine.logits([None, None], [1, 2, 3]))


@pytest.mark.parametrize("prompt_from", [0, 1, 2, 9, 20, 29])
def test_probabilities_from_a_token_on(llama: SteeredLlama, renderer: Any, prompt_from: int) -> None:
    """`Request.prompt_from`: the same as all of them, and what stands before is taken from memory."""
    tokens = renderer.tokenize(PROSE, add_special=True)[:30]
    allowance = rounding.logprobs(logprobs(llama, tokens, None), **rounding.TINY)
    with engine_of(llama, n_ctx=64, n_slots=1, n_batch=512) as engine:

        def end(first: int) -> FinishEvent:
            request = Request(tokens, None, Sampling(temperature=0), 0, prompt_probs=0, prompt_from=first)
            events = [event for _, event in engine.generate(request)]
            assert isinstance(events[-1], FinishEvent)
            return events[-1]

        whole = end(0).prompt
        assert len(whole) == 30
        for n_cached in (max(0, prompt_from - 1), 0):
            finish = end(prompt_from)
            assert finish.n_cached == n_cached
            assert [piece.token for piece in finish.prompt] == tokens[prompt_from:]
            for piece, wanted in zip(finish.prompt, whole[prompt_from:], strict=True):
                assert (piece.logprob is None) == (wanted.logprob is None)
                assert piece.logprob is None or piece.logprob == pytest.approx(wanted.logprob, rel=0, abs=allowance)
            engine.forget()
        for wrong in (-1, 30):
            with pytest.raises(UsageError, match=f"prompt_from: {wrong} "):
                end(wrong)


#
# scores
#


class FakeEngine:
    """Gives made-up logits."""

    def __init__(self, *sides: Any) -> None:
        self.sides = np.asarray(sides, dtype=np.float32)

    def logits(self, biases: Any, tokens: Any, first: int, *, n_prompt: int) -> Any:
        """[n_biases, n, n_vocab] in two parts."""
        assert len(biases) == len(self.sides)
        assert n_prompt == first + 1, "what is scored is the reply"
        n = len(tokens) - 1 - first
        yield first, self.sides[:, :1]
        if n > 1:
            yield first + 1, self.sides[:, 1:n]


def test_scores_by_hand() -> None:
    even, sure = np.log([0.25] * 4), np.log([0.7, 0.1, 0.1, 0.1])
    engine: Any = FakeEngine([even, sure], [sure, even])
    document = Document((0, 0, 3), 0)
    one, two = score_text(engine, [None, None], [document])
    assert one.n == two.n == 2
    assert one.nll == pytest.approx(-(np.log(0.25) + np.log(0.1)) / 2)
    assert two.nll == pytest.approx(-(np.log(0.7) + np.log(0.25)) / 2)
    assert one.perplexity == pytest.approx((0.25 * 0.1) ** -0.5)
    forward = (0.25 * (np.log(0.25) - np.log([0.7, 0.1, 0.1, 0.1]))).sum()
    back = (np.exp(sure) * (sure - even)).sum()
    assert two.kl == pytest.approx((forward + back) / 2)
    assert (one.kl, one.same_top) == (0.0, 1.0)
    assert two.same_top == 1.0, "the first of equal ones is the top"


def test_impossible_tokens() -> None:
    never, some, broken = [0.0, -np.inf, 0.0], [0.0, 0.0, -1.0], [np.nan] * 3
    engine: Any = FakeEngine([never], [some], [broken])
    document = Document((0, 1), 0)  # the token that the unsteered model excludes
    scores = score_text(engine, [None] * 3, [document])
    assert np.isfinite([(s.nll, s.kl, s.perplexity) for s in scores]).all()
    assert scores[0].perplexity > 1e300
    assert scores[1].kl > 0
    assert scores[2].kl > 100, "what is no number is the worst there is"


def test_records() -> None:
    score = TextScore(1.5, 0.25, 0.5, 8)
    assert TextScore.from_record({"id": "x", **score.to_dict()}) == score


def test_log_probabilities_are_finite() -> None:
    found = log_probabilities(np.array([[0.0, -np.inf], [np.nan, 0.0]], dtype=np.float32))
    assert np.isfinite(found).all()
    assert found[0, 0] == 0
    assert found[0, 1] < -600
