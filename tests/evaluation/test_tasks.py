"""Task files: what a head may say, that lines keep their numbers, and that a bad file is named in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import FormatError, SteerMoEError, UsageError
from steermoe_local.evaluation.tasks import tasks
from steermoe_local.evaluation.tasks.tasks import Score, Task, load_task
from steermoe_local.pairs.prompts import PromptItem

HEAD = {"name": "capitals", "scorer": "contains", "max_tokens": 16, "options": {"words": False}, "stop": ["\n"]}
ITEMS = '{"id": 1, "prompt": "Capital of France?", "answer": "Paris"}\n{"prompt": "Of Spain?", "answer": "Madrid"}\n'


def write(folder: Path, text: str | bytes, name: str = "t.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def with_head(items: str = ITEMS, **fields: Any) -> str:
    return json.dumps({"task": {"scorer": "contains"} | fields}) + "\n" + items


def refusal(path: Path, kind: type[SteerMoEError] = FormatError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load_task(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_head_and_its_items(tmp_path: Path) -> None:
    more = {"system": "Be brief.", "raw": True, "positive": "right", "negative": "wrong", "license": "MIT"}
    path = write(tmp_path, with_head(**HEAD, **more))
    task = load_task(path)
    assert (task.name, task.scorer, task.options, task.max_tokens) == ("capitals", "contains", {"words": False}, 16)
    assert (task.stop, task.system, task.raw) == (("\n",), "Be brief.", True)
    assert (task.positive, task.negative, task.license, task.source) == ("right", "wrong", "MIT", str(path))
    assert [(item.id, item.line, item.extra["answer"]) for item in task.items] == [
        (1, 2, "Paris"),
        ("line-3", 3, "Madrid"),
    ]


@pytest.mark.parametrize("before", ["", "\n", "\r\n  \n", "\ufeff", "\ufeff\n\n", "  "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_keep_their_numbers(tmp_path: Path, before: str, end: str) -> None:
    head, one, two, _ = with_head().split("\n")
    text = end.join([before + head, "", one, two])
    first = 1 + before.count("\n")
    assert [item.line for item in load_task(write(tmp_path, text)).items] == [first + 2, first + 3]
    path = write(tmp_path, text + end + '{"prompt": 3}')
    assert refusal(path).startswith(f"{path}:{first + 4}: prompt: not a text")
    path = write(tmp_path, before + '{"task": {"scorer": 3}}' + end + one)
    assert refusal(path).startswith(f"{path}:{first}: task.scorer: not a text")
    path = write(tmp_path, end.join([before + head, one, one]))
    assert f":{first + 2}: id: 1 is already" in refusal(path)
    assert f"line {first + 1}" in refusal(path)


def test_without_a_head(tmp_path: Path) -> None:
    path = write(tmp_path, ITEMS)
    assert "give --scorer NAME" in refusal(path, UsageError)
    task = load_task(path, scorer="exact", options={"ignore_case": True}, max_tokens=3)
    assert (task.name, task.scorer, task.options, task.max_tokens) == ("t", "exact", {"ignore_case": True}, 3)
    assert [item.line for item in task.items] == [1, 2]


def test_what_is_given_stands_for_the_head(tmp_path: Path) -> None:
    path = write(tmp_path, with_head(options={"words": False, "other": "x"}))
    assert load_task(path, scorer="exact").options == {}  # options of another scorer would be unknown to it
    assert load_task(path, options={"other": "y"}).options == {"words": False, "other": "y"}
    assert load_task(path, max_tokens=5).max_tokens == 5


@pytest.mark.parametrize(
    ("head", "field"),
    [
        ([], "task"),
        ("x", "task"),
        (None, "task"),
        ({"scorers": "exact"}, "task.scorers"),
        ({"scorer": 1}, "task.scorer"),
        ({"scorer": ""}, "task.scorer"),
        ({"name": " "}, "task.name"),
        ({"options": []}, "task.options"),
        ({"max_tokens": True}, "task.max_tokens"),
        ({"max_tokens": 2.0}, "task.max_tokens"),
        ({"max_tokens": "2"}, "task.max_tokens"),
        ({"max_tokens": 0}, "task.max_tokens"),
        ({"stop": "x"}, "task.stop"),
        ({"stop": [""]}, "task.stop"),
        ({"stop": [3]}, "task.stop"),
        ({"raw": 1}, "task.raw"),
        ({"scorer": "judge", "options": {"base_url": "http://127.0.0.1"}}, "task.options.base_url"),
    ],
)
def test_heads_that_are_refused(tmp_path: Path, head: Any, field: str) -> None:
    path = write(tmp_path, json.dumps({"task": head}) + "\n" + ITEMS)
    assert refusal(path, scorer="exact").startswith(f"{path}:1: {field}: ")


def test_the_message_of_a_head_that_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, with_head(max_tokens=0))
    assert refusal(path).startswith(f"{path}:1: task.max_tokens: not a whole number")


def test_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = with_head("")
    for text in (head, head.strip(), head + "\n \n"):
        assert "no items" in refusal(write(tmp_path, text))
    assert "no prompts" in refusal(write(tmp_path, ""))
    assert ":2: not UTF-8" in refusal(write(tmp_path, head.encode() + b'{"prompt": "\xff"}'))
    assert ":1: not UTF-8" in refusal(write(tmp_path, b'{"task": "\xff"}'))
    assert "beside task" in refusal(write(tmp_path, '{"task": {}, "version": 1}\n' + ITEMS))
    assert ":2: neither prompt " in refusal(write(tmp_path, head + head))  # one head, in front
    assert ":3: neither prompt " in refusal(write(tmp_path, head + ITEMS.splitlines()[0] + "\n" + head))
    assert ":1: not JSON" in refusal(write(tmp_path, '{"task": {"scorer": "exact",}}\n' + ITEMS))
    assert ":1: not JSON" in refusal(write(tmp_path, '{"task": {"options": {"x": 1e999}}}\n' + ITEMS))
    assert ":1: not JSON" in refusal(write(tmp_path, '{"task": {}, "task": {}}\n' + ITEMS))
    assert ":1: not JSON" in refusal(write(tmp_path, '{"task": ' + "[" * 100_000))
    assert "cannot be read" in refusal(tmp_path / "nothing.jsonl")
    assert "cannot be read" in refusal(tmp_path)
    monkeypatch.setattr(tasks, "_MAX_BYTES", 50)
    assert "larger than" in refusal(write(tmp_path, with_head()))


def test_a_head_of_many_megabytes_is_no_head(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"task": {"name": "x" * (2 << 20)}}) + "\n" + ITEMS)
    assert refusal(path).startswith(f"{path}:1: ")


def test_a_text_file(tmp_path: Path) -> None:
    """A prompt a line; the file's name says so, whatever the first character is."""
    task = load_task(write(tmp_path, "{How} do I whisk?\n\nHow do I fry?\n", "p.txt"), scorer="refusal")
    assert [(item.content, item.line) for item in task.items] == [("{How} do I whisk?", 1), ("How do I fry?", 3)]
    task = load_task(write(tmp_path, '{"task": {"scorer": "refusal"}}\nHow do I fry?\n', "p.txt"))
    assert [(item.content, item.line) for item in task.items] == [("How do I fry?", 2)]


@given(st.binary(max_size=300), st.sampled_from(["x.jsonl", "x.txt", "x"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    path = write(tmp_path_factory.mktemp("bytes"), data, name)
    problem = ""
    try:
        load_task(path, scorer="refusal")
    except SteerMoEError as error:
        problem = str(error)
    assert "\n" not in problem


def item(name: str = "a", **extra: Any) -> PromptItem:
    return PromptItem(name, "x", extra=extra)


def test_what_a_task_is() -> None:
    for fields, words in (
        ({"items": ()}, "no items"),
        ({"items": (item("1"), PromptItem(1, "y"))}, "'1'"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"max_tokens": 2.5}, "max_tokens: 2.5"),
        ({"stop": ("",)}, "stop"),
    ):
        with pytest.raises(UsageError, match=words):
            Task(**({"name": "t", "items": (item(),), "scorer": "exact"} | fields))


def test_first() -> None:
    task = Task("t", (item("a"), item("b")), "exact")
    assert [one.id for one in task.first(1).items] == ["a"]
    assert task.first(None) is task
    assert task.first(2) is task
    for n in (0, -1):
        with pytest.raises(UsageError):
            task.first(n)


def test_the_digest_is_of_what_answers_depend_on(tmp_path: Path) -> None:
    """Name, words, source and layout of the file do not count; an item without an id has its line for one."""
    items = ITEMS.replace('{"prompt"', '{"id": 2, "prompt"')
    words = {"name": "other", "positive": "p", "negative": "n", "license": "l"}
    task = load_task(write(tmp_path, with_head(items, **HEAD)))
    same = load_task(write(tmp_path, "\n" + with_head(items, **HEAD | words), "u.jsonl"))
    assert task.sha256 == same.sha256
    for change in (
        {"scorer": "exact"},
        {"options": {"words": True}},
        {"max_tokens": 17},
        {"stop": ["x"]},
        {"system": "x"},
        {"raw": True},
    ):
        assert load_task(write(tmp_path, with_head(items, **HEAD | change))).sha256 != task.sha256
    changed = items.replace("Madrid", "madrid")
    assert load_task(write(tmp_path, with_head(changed, **HEAD))).sha256 != task.sha256


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_score_is_from_0_to_1(value: float) -> None:
    with pytest.raises(UsageError):
        Score(value, "x")
