"""Files of prompts: what they may look like, and that a bad line is named before anything is computed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import FormatError
from steermoe_local.pairs.pairs import Message
from steermoe_local.pairs.prompts import PromptItem, load_prompts, prompts_digest, read_prompts

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
SCALAR = (
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": TEXT})
EXTRA = st.dictionaries(TEXT.filter(lambda key: key not in ("id", "prompt", "messages", "system")), SCALAR, max_size=2)
LINE = st.builds(
    lambda said, optional, extra: extra | said | optional,
    st.fixed_dictionaries({"prompt": TEXT}) | st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=1)}),
    st.fixed_dictionaries({}, optional={"id": TEXT | st.integers(0, 2**70), "system": TEXT}),
    EXTRA,
)


def read(text: str, **kwargs: Any) -> list[PromptItem]:
    return read_prompts(io.BytesIO(text.encode("utf-8")), "p.jsonl", **kwargs)


def refusal(text: str, **kwargs: Any) -> str:
    with pytest.raises(FormatError) as caught:
        read(text, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(st.lists(LINE, min_size=1, unique_by=lambda line: str(line.get("id", id(line)))), st.booleans())
def test_json_lines_are_read_as_they_were_written(lines: list[dict[str, Any]], ascii_only: bool) -> None:
    lines = [line for line in lines if not str(line.get("id", "")).startswith("line-")] or [{"prompt": "x"}]
    blank = "\n \n"  # blank lines count as lines and are no prompts
    items = read("".join(json.dumps(line, ensure_ascii=ascii_only) + blank for line in lines))
    assert len(items) == len(lines)
    for index, (item, line) in enumerate(zip(items, lines, strict=True)):
        assert item.line == 1 + 2 * index
        assert item.id == line.get("id", f"line-{item.line}")
        assert item.system == line.get("system", "")
        if "prompt" in line:
            assert item.content == line["prompt"]
        else:
            assert [message.to_dict() for message in item.content] == line["messages"]
        assert item.extra == {k: v for k, v in line.items() if k not in ("id", "prompt", "messages", "system")}


@given(st.binary(max_size=200), st.sampled_from([None, True, False]))
def test_any_bytes_are_prompts_or_one_error(data: bytes, as_json: bool | None) -> None:
    message, items = "p:", []
    try:
        items = read_prompts(io.BytesIO(data), "p", as_json)
    except FormatError as error:
        message = str(error)
    assert message.startswith("p:")
    assert "\n" not in message
    assert len({str(item.id) for item in items}) == len(items)
    assert items or len(message) > 10


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])).filter(str.strip), min_size=1))
def test_lines_of_text_are_prompts(lines: list[str]) -> None:
    items = read("".join(f"{line}\r\n\n" for line in lines), as_json=False)
    assert [item.content for item in items] == [
        line.removeprefix("\ufeff") if not n else line for n, line in enumerate(lines)
    ]
    assert [item.id for item in items] == [f"line-{1 + 2 * n}" for n in range(len(lines))]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"promt": "x"}', "neither prompt nor messages"),
        ('{"prompt": "x", "messages": []}', "both prompt and messages"),
        ('{"prompt": ""}', "prompt: "),
        ('{"prompt": 3}', "prompt: "),
        ('{"prompt": null}', "prompt: "),
        ('{"messages": []}', "messages: "),
        ('{"messages": "x"}', "messages: "),
        ('{"messages": [{"role": "user"}]}', "messages[0]: "),
        ('{"messages": [{"role": "user", "content": "x", "name": "n"}]}', "messages[0]: "),
        ('{"messages": [{"role": "", "content": "x"}]}', "messages[0].role: "),
        ('{"messages": [{"role": "user", "content": [1]}]}', "messages[0].content: "),
        ('{"prompt": "x", "system": 1}', "system: "),
        ('{"messages": [{"role": "system", "content": "a"}], "system": "b"}', "system: "),
        ('{"prompt": "x", "id": true}', "id: True"),
        ('{"prompt": "x", "id": ""}', "id: ''"),
        ('{"prompt": "x", "id": 1.5}', "id: 1.5"),
        ('{"prompt": "x", "id": "a"}', "already the id of line 1"),
        ('{"prompt": "x", "prompt": "y"}', "stands twice"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ('{"prompt": "x", "weight": 1e999}', "not JSON"),
        ('{"prompt": "x", "weight": NaN}', "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(line: str, words: str) -> None:
    message = refusal(f'{{"prompt": "good", "id": "a"}}\n\n{line}\n{{"prompt": "good"}}\n')
    assert message.startswith("p.jsonl:3: ")
    assert words in message


def test_what_is_no_file_of_prompts(tmp_path: Path) -> None:
    assert "no prompts" in refusal("\n \n")
    with pytest.raises(FormatError, match=r"none\.txt: cannot"):
        load_prompts(tmp_path / "none.txt")
    with pytest.raises(FormatError, match="cannot be read"):
        load_prompts(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"ok\ncaf\xe9\n")
    with pytest.raises(FormatError, match=r"latin\.txt:2: not UTF-8"):
        load_prompts(tmp_path / "latin.txt")


def test_the_kind_by_name_or_first_character(tmp_path: Path) -> None:
    line = '{"prompt": "x"}\n'
    for name, text, content in (
        ("a.jsonl", line, "x"),
        ("a.txt", line, line.strip()),
        ("a", line, "x"),
        ("b", "{", None),
    ):
        (tmp_path / name).write_text(text)
        if content is None:
            with pytest.raises(FormatError, match="not JSON"):
                load_prompts(tmp_path / name)
        else:
            assert load_prompts(tmp_path / name)[0].content == content
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert load_prompts(tmp_path / "bom.jsonl")[0].content == "x"


def test_a_line_may_not_be_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steermoe_local.pairs.prompts._MAX_LINE", 1 << 20)
    assert "p.jsonl:2: a line of more" in refusal("x\n" + "y" * (1 << 20) + "y\n", as_json=False)
    assert len(read("y" * ((1 << 20) - 1) + "\n", as_json=False)) == 1


def test_whose_system_message_is_taken() -> None:
    own, line, none = read(
        '{"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "x"}]}\n'
        '{"prompt": "x", "system": "line"}\n{"prompt": "x"}\n'
    )
    assert own.messages("flag") == (Message("system", "own"), Message("user", "x"))
    assert line.messages("flag") == (Message("system", "line"), Message("user", "x"))
    assert none.messages("flag") == (Message("system", "flag"), Message("user", "x"))
    assert none.messages() == (Message("user", "x"),)


def test_the_digest_is_over_the_prompts() -> None:
    one = read('{"prompt": "x", "id": 1}\n{"id": 2, "messages": [{"role": "user", "content": "y"}], "answer": 5}\n')
    same = read(
        '\n{"id": 1,   "prompt": "x"}\n\n{"answer": 5, "messages": [{"content": "y", "role": "user"}], "id": 2}'
    )
    assert prompts_digest(one) == prompts_digest(same)
    for text in ('{"prompt": "z", "id": 1}', '{"prompt": "x", "id": 3}', '{"prompt": "x", "id": 1, "system": "s"}'):
        assert prompts_digest(read(text)) != prompts_digest(one[:1])
    assert prompts_digest(one[::-1]) != prompts_digest(one)
