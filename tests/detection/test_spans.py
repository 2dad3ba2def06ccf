"""What a condition looks at on the sides of a pair, and how it is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import Message, Pair, PairsError, UsageError, load_pairs, record_counts
from steermoe_local.detection.checkpoint import CheckpointFile
from steermoe_local.detection.recording_options import RecordingProgress
from steermoe_local.detection.spans import ConditionSpan, split_reply, usual_span
from steermoe_local.detection.token_routing import selected_experts
from steermoe_local.llama.rendering import Renderer
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.maps.kept_pairs import KeptPairs
from tests.support.detecting import CACHE, DATA, text_pairs

PROMPT = ConditionSpan()
ASK = (Message("user", "Count from two to five."),)
REPLY = Message("assistant", "2, 3, 4, 5")


def pair(one: Any, two: Any, target: str = "five", other: str | None = None) -> Pair:
    return Pair("x", one, two, target, other or target)


@pytest.fixture(scope="module")
def renderer(tiny_model: Any) -> Renderer:
    return Renderer(tiny_model)


#
# parts of a side
#


@pytest.mark.parametrize(
    ("side", "target", "parts"),
    [
        ((*ASK, REPLY), "2, 3, 4, 5", (ASK, "2, 3, 4, 5")),
        ((*ASK, REPLY), "4", (ASK, "2, 3, 4, 5")),
        ((*ASK, REPLY), "five", (ASK, None)),
        (ASK, "five", (ASK, None)),
        ((*ASK, REPLY, *ASK), "4", ((*ASK, REPLY, *ASK), None)),
        ("Count up: 1, 2", "2", ("Count up: 1, ", "2")),
        ("Count up: 1, 2\n", "2", ("Count up: 1, ", "2")),
        ("Count up: 1, 2", "1", ("Count up: 1, 2", None)),
        ("1 1 1", "1", ("1 1 ", "1")),
    ],
)
def test_prompt_and_reply(side: Any, target: str, parts: Any) -> None:
    assert split_reply(side, target) == parts


def test_the_prompt_is_that_of_a_request(renderer: Renderer) -> None:
    """With the chat template's beginning of the answer, but its last token, and without the reply."""
    other = (Message("system", "Be brief."), *ASK)
    for one, two in (((*ASK, REPLY), other), (ASK, (*other, REPLY))):
        found = PROMPT.prompts(renderer, pair(one, two))
        assert [prompt.tokens for prompt in found] == [renderer.render(side).tokens[:-1] for side in (ASK, other)]
        assert [prompt.target for prompt in found] == [list(range(len(prompt.tokens))) for prompt in found]
    texts = pair("Count up: 1, 2", "Count down: 2, 1", "2", "1")
    for prompt, text in zip(PROMPT.prompts(renderer, texts), ("Count up: 1, ", "Count down: 2, "), strict=True):
        assert prompt.tokens == renderer.render(text).tokens[:-1]


def test_the_end_of_the_reply(renderer: Renderer) -> None:
    words = Message("assistant", "two, three, four, five")
    given = pair((*ASK, REPLY), (*ASK, words), "2, 3, 4, 5", "five")
    whole = [renderer.prompt((*ASK, reply), reply.content) for reply in (REPLY, words)]
    for n in (1, 3):
        found = ConditionSpan(n).prompts(renderer, given)
        assert [prompt.tokens for prompt in found] == [prompt.tokens for prompt in whole]
        assert [prompt.target for prompt in found] == [prompt.target[-n:] for prompt in whole]


@pytest.mark.parametrize(
    ("span", "given", "words"),
    [
        (PROMPT, pair((*ASK, REPLY), (*ASK, Message("assistant", "five")), "2", "five"), "over prompt.*over last N"),
        (ConditionSpan(2), pair((*ASK, REPLY), (*ASK, REPLY), "2"), "same tokens over last 2"),
        (ConditionSpan(2), pair(ASK, (*ASK, Message("assistant", "five"))), "positive: the target is not in a reply"),
        (ConditionSpan(500), pair((*ASK, REPLY), ASK, "5", "five"), r"positive: the reply has \d+ tokens"),
        (PROMPT, pair((REPLY,), ASK, "2", "five"), "positive: nothing stands before"),
        (PROMPT, pair("five", "one five"), "positive: nothing stands before"),
        (PROMPT, pair("a", "one five", "a", "five"), "positive: nothing stands before"),
        (PROMPT, pair("afive", "one five"), "positive: the prompt has one token"),
    ],
)
def test_pairs_without_the_span(renderer: Renderer, span: ConditionSpan, given: Pair, words: str) -> None:
    with pytest.raises(PairsError, match=words):
        span.prompts(renderer, given)


def test_the_same_reply_to_other_prompts_is_scored(renderer: Renderer) -> None:
    """Its tokens are the same, what they route by is not."""
    other = (Message("user", "Say two to five."),)
    one, two = ConditionSpan(3).prompts(renderer, pair((*ASK, REPLY), (*other, REPLY), "5"))
    assert one.tokens != two.tokens
    assert [one.tokens[i] for i in one.target] == [two.tokens[i] for i in two.target]


@pytest.mark.parametrize("last", [0, -1, 4097])
def test_numbers_that_no_condition_has(last: int) -> None:
    with pytest.raises(UsageError, match=str(last)):
        ConditionSpan(last)


def test_the_usual_span() -> None:
    differ, same = pair(ASK, (Message("user", "To five."),)), pair((*ASK, REPLY), (*ASK, REPLY), "2")
    assert usual_span([differ, same]) == PROMPT
    assert usual_span([differ, same, same]) == ConditionSpan(16)
    assert str(PROMPT) == "prompt"
    assert str(ConditionSpan(16)) == "last 16"


def test_contents_decide_what_is_scored() -> None:
    """Over the prompt the reply does not count; over the reply all does."""
    one, two = pair((*ASK, REPLY), ASK, "2", "five"), pair(ASK, ASK)
    assert len({*PROMPT.content(one), *PROMPT.content(two)}) == 1
    assert len({*ConditionSpan(1).content(one), *ConditionSpan(1).content(two)}) == 2


#
# recording
#


@pytest.fixture(scope="module")
def chats() -> list[Pair]:
    """Pairs whose prompts and replies differ, and share beginnings with others."""
    numbers = load_pairs(DATA / "digits-words.pairs.jsonl")[:12]
    others = load_pairs(DATA / "refuse-comply.pairs.jsonl")[:12]
    return [
        Pair(f"p{i}", one.positive, two.negative, one.positive_target, two.negative_target)
        for i, (one, two) in enumerate(zip(numbers, others, strict=True))
    ]


@pytest.fixture(scope="module")
def llama(tiny_f32_path: Path) -> Iterator[SteeredLlama]:
    llama = SteeredLlama(tiny_f32_path, n_ctx=64, verbose=False)
    yield llama
    llama.close()


def recorded(model: Any, pairs: list[Pair], **options: Any) -> tuple[KeptPairs, Any]:
    kept = KeptPairs()
    return kept, record_counts(model, pairs, n_threads=1, per_pair=lambda *_: kept, **{**CACHE, **options})


@pytest.mark.parametrize("span", [PROMPT, ConditionSpan(1)], ids=str)
@pytest.mark.parametrize("n_batch", [32, 512])
def test_counts_are_those_of_the_tokens(
    llama: SteeredLlama, chats: list[Pair], span: ConditionSpan, n_batch: int
) -> None:
    """Against each token's experts, in texts of their own: what prompts of a batch share counts for each of them."""
    kept, counts = recorded(llama, chats, span=span, n_batch=n_batch)
    assert kept.ids == [given.id for given in chats]
    some = kept.some(np.arange(len(kept)))
    a = np.concatenate([part for _, part in some.chunks()])
    prompts = [prompt for given in chats for prompt in span.prompts(Renderer(llama._model), given)]
    assert some.n.ravel().tolist() == [len(prompt.target) for prompt in prompts]
    texts = [(prompt.tokens, prompt.target[0], prompt.target[-1] + 1) for prompt in prompts]
    for mine, alone in zip(a.reshape(len(prompts), *a.shape[2:]), selected_experts(llama, texts, **CACHE), strict=True):
        assert np.array_equal(mine, alone.sum(axis=0))
    assert (counts.n1, counts.n2) == tuple(some.n.sum(axis=0))


def test_a_checkpoint_is_of_one_span(tiny_path: Path, tmp_path: Path) -> None:
    file = CheckpointFile(tmp_path / "out")

    def stop(progress: RecordingProgress) -> None:
        if progress.n_done:  # a batch is done, and kept
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorded(tiny_path, text_pairs(40), span=PROMPT, checkpoint=file, on_batch=stop, n_batch=40)
    for other in (ConditionSpan(1), None):
        with pytest.raises(UsageError, match="over was"):
            recorded(tiny_path, text_pairs(40), span=other, checkpoint=file, n_batch=40)


def test_pairs_that_cannot_be_scored_are_left_out(llama: SteeredLlama, chats: list[Pair]) -> None:
    same = Pair("same", chats[0].positive, chats[0].positive, chats[0].positive_target, chats[0].positive_target)
    skipped: list[tuple[str, str]] = []
    kept, counts = recorded(
        llama, [same, *chats], span=PROMPT, on_skip=lambda given, reason: skipped.append((given.id, reason))
    )
    assert kept.ids == [given.id for given in chats]
    assert counts.n_skipped == 1
    ((name, reason),) = skipped
    assert name == "same"
    assert reason.startswith("both sides have the same tokens over prompt")
    with pytest.raises(PairsError, match="pair 'same': both sides"):
        recorded(llama, [same, *chats], span=PROMPT)
