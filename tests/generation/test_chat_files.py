"""Conversations as files, good and damaged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import FormatError, UsageError
from steermoe_local.generation.engine import Sampling
from steermoe_local.steering.steering import Steering
from tests.support.chats import (
    COUNT,
    FOREIGN,
    MAP,
    MAPS,
    QUESTIONS,
    TO_DIGITS,
    TO_WORDS,
    fresh,
    say,
)
from tests.support.paths import ROOT


def test_saved_and_loaded(new: Any, tmp_path: Path) -> None:
    sampling = Sampling(temperature=0, top_k=7, seed=3, logit_bias={5: -float("inf"), 6: 0.5}, grammar='root ::= [^"]*')
    chat = new(TO_WORDS.changed(layers="1-4"), system="Be brief.", sampling=sampling, max_tokens=20)
    say(chat, QUESTIONS[0])
    chat.messages[1]["reasoning_content"] = "hm"
    chat.save(tmp_path / "chat.json")
    other = new()
    say(other, "Something else.")
    assert other.load(tmp_path / "chat.json") == []
    assert (other.messages, other.system, other.max_tokens) == (chat.messages, "Be brief.", 20)
    assert other.sampling == sampling
    assert other.steering is not None
    assert other.steering.layers == "1-4"
    assert other.steered
    assert other.last is None
    assert say(other, COUNT)[0] == say(chat, COUNT)[0]
    text = (tmp_path / "chat.json").read_text("utf-8")
    assert "Infinity" not in text
    assert json.loads(text)["steering"]["map"] == str(MAP)
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "no"))):
        chat.save(tmp_path / "no" / "chat.json")


def test_a_relative_map_is_found_from_elsewhere(new: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(MAP, tmp_path / "m.json")
    monkeypatch.chdir(tmp_path)
    chat = new(Steering.open(map_file="m.json", activate=2))
    chat.save("chat.json")
    monkeypatch.chdir(ROOT)
    assert chat.load(tmp_path / "chat.json") == []
    assert chat.steered


def test_switched_off_stays_off(new: Any) -> None:
    chat = new(TO_WORDS)
    chat.switch(False)
    data = json.loads(json.dumps(chat.to_dict()))
    chat.switch(True)
    assert chat.load(data) == []
    assert chat.steering is not None
    assert not chat.steering_on
    assert not chat.steered
    chat.steer(None)
    assert chat.load(chat.to_dict()) == []


def test_the_map_has_gone_or_changed(new: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    shutil.copy(MAP, path)
    chat = new(Steering.open(map_file=path, activate=8, reverse=True))
    say(chat, QUESTIONS[0])
    chat.save(tmp_path / "chat.json")
    shutil.copy(MAPS / "document-memory.json", path)
    for words in ("not the file that it was", "no such file"):
        other = new(TO_DIGITS)
        warnings = other.load(tmp_path / "chat.json")
        assert len(warnings) == 1
        assert warnings[0].startswith(f"{tmp_path / 'chat.json'}: steering.map: {path}: {words}")
        assert warnings[0].endswith("goes on unsteered")
        assert other.messages == chat.messages
        assert other.steering is None
        assert not other.steered
        assert say(other, COUNT)[0] == fresh(new, chat.messages, None, COUNT)[0]
        other.close()
        path.unlink(missing_ok=True)


def test_a_chat_of_another_model(new: Any, tmp_path: Path) -> None:
    FOREIGN.save(tmp_path / "m.json")
    chat = new()
    data = chat.to_dict()
    data["model"] = FOREIGN.identity.to_dict()
    data["steering"] = Steering.open(map_file=tmp_path / "m.json", activate=2).to_dict()
    data["steering_on"] = True
    first, second = chat.load(data)
    assert first.startswith("chat: the answers are of olmoe")
    assert "made for olmoe" in second
    assert second.endswith("the chat goes on unsteered")
    assert not chat.steered


QUESTION = {"role": "user", "content": "x"}
ANSWER = {"role": "assistant", "content": "x"}
DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"format": "steermoe-expert-map"}, 'no "format": "steermoe-chat"'),
    ({"version": 4}, "version 4"),
    ({"more": 1}, "more: "),
    ({"system": 3}, "system: 3"),
    ({"steering": "x"}, "steering: 'x'"),
    ({"steering_on": 1}, "steering_on: 1"),
    ({"messages": {}}, "messages: {}"),
    ({"messages": [QUESTION]}, "no answer"),
    ({"messages": [QUESTION, QUESTION]}, r"messages\[1\]: role 'user'"),
    ({"messages": [{"role": "system", "content": "x"}] * 2}, r"messages\[0\]: role 'system'"),
    ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, r"messages\[1\]: not an object"),
    ({"messages": [QUESTION | {"reasoning_content": "x"}, QUESTION]}, r"messages\[0\]: .*reasoning_content"),
    ({"messages": [QUESTION, {"role": "assistant"}]}, r"messages\[1\]: .*\brole;"),
    ({"messages": ["x", "y"]}, r"messages\[0\]: not an object"),
    ({"sampling": {"temperature": "hot"}}, "sampling.temperature: 'hot'"),
    ({"sampling": {"temperature": -1}}, "sampling: temperature: -1"),
    ({"sampling": {"top_k": 1.5}}, "sampling.top_k: 1.5"),
    ({"sampling": {"seed": 1 << 80}}, "sampling: seed"),
    ({"sampling": {"heat": 1}}, "sampling.heat: "),
    ({"sampling": {"logit_bias": {"x": 1}}}, "sampling: "),
    ({"sampling": {"logit_bias": [1]}}, "sampling: "),
    ({"sampling": {"logit_bias": {"1" * 11: 1}}}, "sampling: logit_bias"),
    ({"sampling": {"logit_bias": {"4294967296": 1}}}, "sampling: logit_bias"),
    (
        {"sampling": {"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}},
        "logit_bias: not an object of at most 1024",
    ),
    ({"sampling": {"logit_bias": {"1": 1e30}}}, "sampling: logit_bias: 1e\\+30"),
    ({"sampling": {"logit_bias": {"1": True}}}, "sampling: logit_bias"),
    ({"sampling": {"temperature": 1e300}}, "sampling: temperature: 1e\\+300"),
    ({"sampling": {"temperature": float("nan")}}, "sampling: temperature: nan"),
    ({"sampling": {"presence_penalty": -1e30}}, "sampling: presence_penalty: -1e\\+30"),
    ({"sampling": {"repeat_penalty": 1e30}}, "sampling: repeat_penalty: 1e\\+30"),
    ({"sampling": {"top_k": 10**300}}, "sampling: top_k"),
    ({"sampling": {"grammar": "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000}}, "sampling: grammar: .* at most"),
    ({"sampling": {"grammar": 'root ::= ((("a"?){9}){9}){9}'}}, "sampling: grammar: .* read from a file"),
    ({"system": "x" * 4_000_001}, "system: 4000001 characters"),
    ({"messages": [QUESTION | {"content": "x" * 4_000_001}, ANSWER]}, r"messages\[0\]\.content: 4000001 characters"),
    ({"messages": [QUESTION, ANSWER] * 2049}, "messages: 4098, but at most 4096"),
    ({"max_tokens": 10**30}, "max_tokens: 1000"),
    ({"max_tokens": 1e30}, "max_tokens: 1e"),
    ({"max_tokens": 1 << 31}, "max_tokens: 2147483648"),
    ({"max_tokens": -2}, "max_tokens: -2"),
    ({"max_tokens": True}, "max_tokens: True"),
    ({"model": {"architecture": 3}}, "chat: model"),
]


@pytest.mark.parametrize(("changes", "words"), DAMAGE)
def test_damaged_files(new: Any, changes: dict[str, Any], words: str) -> None:
    chat = new(TO_WORDS)
    say(chat, QUESTIONS[0])
    before = chat.to_dict()
    with pytest.raises(FormatError, match=words) as caught:
        chat.load(before | changes)
    assert len(str(caught.value)) < 400
    assert chat.to_dict() | {"created": before["created"]} == before  # when it is written, which is now
    missing = {name: value for name, value in before.items() if name not in changes}
    if missing != before:
        with pytest.raises(FormatError, match=r"missing|not a saved chat|version None"):
            chat.load(missing)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff", b'{"format": "steermoe-chat", "format": "x"}', b"[" * 100_000, b"NaN"],
)
def test_files_that_are_none(new: Any, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"chat\.json: "):
        new().load(path)


def test_what_could_not_be_read_is_not_written(new: Any, tmp_path: Path) -> None:
    chat = new()
    chat.sampling = Sampling(grammar='root ::= a\na ::= "x"')
    with pytest.raises(UsageError, match="cannot be written: sampling: grammar: "):
        chat.save(tmp_path / "chat.json")
    assert not (tmp_path / "chat.json").exists()


@pytest.mark.parametrize("path", [".", "/dev/zero", "missing.json"])
def test_paths_that_are_no_files(new: Any, path: str) -> None:
    with pytest.raises(FormatError):
        new().load(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["model", "created", "tool", "system", "messages", "steering", "steering_on", "sampling", "max_tokens"]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_damage_is_a_format_error(new: Any, changes: dict[str, Any]) -> None:
    chat = new(TO_WORDS)
    try:
        chat.load(json.loads(json.dumps(chat.to_dict() | changes)))
    except FormatError:
        assert chat.steered
    chat.close()
