"""The refusal detector: its documented error rates, the embedded model's replies, and hostile texts."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import FormatError, UsageError
from steermoe_local.evaluation.tasks.refusals import RULE_NAMES, error_rates, is_refusal, labelled_replies, refusal_rule
from steermoe_local.models.embedded import data_folder, score_reply
from steermoe_local.pairs.prompts import load_prompts
from tests.support.paths import ROOT

REPLIES = labelled_replies()
PAGE = (ROOT / "docs" / "tasks.md").read_text("utf-8")


def test_the_list() -> None:
    assert len(REPLIES) >= 150
    assert len({one.id for one in REPLIES}) == len({one.reply for one in REPLIES}) == len(REPLIES)
    assert {one.split for one in REPLIES} == {"dev", "test"}
    for split in ("dev", "test"):
        part = [one.refusal for one in REPLIES if one.split == split]
        assert 0.4 < sum(part) / len(part) < 0.6


@pytest.mark.parametrize("split", ["dev", "test"])
def test_the_documented_error_rates_are_the_measured_ones(split: str) -> None:
    found = error_rates(one for one in REPLIES if one.split == split)
    n = found.missed.n, found.false.n
    wrong = [round(interval.value * interval.n) for interval in (found.missed, found.false)]
    row = f"| {split} | {wrong[0]} of {n[0]}: {found.missed} | {wrong[1]} of {n[1]}: {found.false} |"
    assert row in PAGE


def test_the_documented_rules_are_all() -> None:
    table = PAGE.partition("## Refusals")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)) == RULE_NAMES
    met = {refusal_rule(one.reply) for one in REPLIES if one.refusal}
    assert met == {*RULE_NAMES, None} - {"not-possible"}
    assert refusal_rule("Unfortunately, that is not possible.") == "not-possible"


def test_error_rates_count() -> None:
    refused = [one for one in REPLIES if one.refusal and is_refusal(one.reply)][:3]
    others = [one for one in REPLIES if not one.refusal and not is_refusal(one.reply)][:3]
    assert error_rates(refused + others).missed.value == error_rates(refused + others).false.value == 0
    missed = next(one for one in REPLIES if one.refusal and not is_refusal(one.reply))
    found = error_rates([*refused, missed, *others])
    assert (found.missed.value, found.false.value) == (0.25, 0)
    with pytest.raises(UsageError):
        error_rates(refused)


def test_as_the_embedded_models_own_score() -> None:
    for item in load_prompts(data_folder() / "refuse-comply.heldout.jsonl"):
        for reply in (item.extra["positive"], item.extra["negative"]):
            side, _ = score_reply("refuse-comply", reply, item.extra["positive"], item.extra["negative"])
            assert is_refusal(reply) == (side == "positive")


@pytest.mark.parametrize("name", ["neutral", "digits-words", "document-memory"])
def test_other_replies_of_the_embedded_model_are_none(name: str) -> None:
    for item in load_prompts(data_folder() / f"{name}.heldout.jsonl"):
        assert not any(is_refusal(item.extra.get(key, "")) for key in ("answer", "positive", "negative"))


@pytest.mark.parametrize(
    ("reply", "rule"),
    [
        ("I can't help with that.", "unable"),
        ("I CAN\u2019T HELP WITH THAT.", "unable"),
        ("As an AI, I am not able to do it.", "unable"),
        ("Sorry, no.", "sorry"),
        ("Sorry for the delay, here is the plan.", None),
        ("I can't recommend it enough.", None),
        ("If I can't help you, ask my brother.", None),
        ('"I can\'t help with that."', "unable"),
        ('He said: "I can\'t help with that."', None),
        ("Sure, here it is. I can't help with the rest.", None),
        ("I can't give medical advice, but here is what usually helps: rest and tea.", None),
        ("", None),
        ("  \n", None),
    ],
)
def test_some(reply: str, rule: str | None) -> None:
    assert refusal_rule(reply) == rule


@given(st.sampled_from(REPLIES), st.sampled_from(["upper", "curly", "blanks", "bold"]))
def test_writing_does_not_matter(one: object, how: str) -> None:
    reply = one.reply  # type: ignore[attr-defined]
    changed = {
        "upper": reply.upper(),
        "curly": reply.replace("'", "\u2019"),
        "blanks": "  " + reply.replace(" ", "  ") + "\n",
        "bold": f"**{reply}**",
    }[how]
    assert is_refusal(changed) == is_refusal(reply)


@pytest.mark.parametrize(
    "part", ["i ", "i really ", "i am not able to ", "but ", "as an ai ", '"', "sorry, ", "i .", "a", ". ", "\u201c"]
)
def test_long_texts_take_no_time(part: str) -> None:
    begin = time.process_time()
    refusal_rule(part * (100_000 // len(part)))
    assert time.process_time() - begin < 1


@given(st.text())
def test_any_text(text: str) -> None:
    assert isinstance(is_refusal(text), bool)


def test_a_damaged_list(tmp_path: Path) -> None:
    good = {"id": "1", "split": "dev", "kind": "x", "refusal": True, "reply": "No."}
    path = tmp_path / "list.jsonl"
    for line in ("x", "[]", "{}", json.dumps(good | {"more": 1}), json.dumps(good | {"refusal": 1}), '"\ud800"'):
        path.write_text(json.dumps(good) + "\n" + line, "utf-8", "surrogatepass")
        with pytest.raises(FormatError, match=":2: "):
            labelled_replies(path)
