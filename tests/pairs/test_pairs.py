"""Pairs files, and where a target lies in a rendered prompt."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import PairsError
from steermoe_local.pairs.pairs import (
    Message,
    Pair,
    last_exact_run,
    load_pairs,
    locate_target,
    pairs_digest,
    save_pairs,
    target_tokens,
    tokens_in_span,
)
from tests.support.paths import ROOT

ASK = Message("user", "Count to three")


def chat(reply: str) -> tuple[Message, ...]:
    return (ASK, Message("assistant", reply))


def line(**changes: Any) -> dict[str, Any]:
    pair = Pair("a", chat("1, 2, 3"), chat("one, two, three"), "1, 2, 3", "one, two, three")
    return pair.to_dict() | changes


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    return path


def test_round_trip(tmp_path: Path) -> None:
    pairs = [
        Pair("a", chat("1, 2, 3"), chat("one, two"), "1, 2, 3", "one, two"),
        Pair("ü", "text\u2028 only", "other text", "\u2028", "text"),
    ]
    save_pairs(pairs, tmp_path / "p.jsonl")
    assert load_pairs(tmp_path / "p.jsonl") == pairs
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


def test_reference_names_bom_blank_lines_and_default_ids(tmp_path: Path) -> None:
    messages = [message.to_dict() for message in chat("yes")]
    data = {
        "messages_0": messages,
        "messages_1": messages,
        "messages_0_target": "yes",
        "messages_1_target": "es",
    }
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(data).encode() + b"\r\n\n")
    (pair,) = load_pairs(path)
    assert pair == Pair("line-2", chat("yes"), chat("yes"), "yes", "es")


def test_shipped_pairs_load() -> None:
    folder = ROOT / "steermoe_local" / "data"
    for path in folder.glob("*.pairs.jsonl"):
        assert load_pairs(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": "red"}, "colour: unknown field; remove it (known: id, positive, negative, "),
        ({"messages_0": []}, "messages_0: "),
        ({"positive_target": ""}, "positive_target: "),
        ({"negative_target": "four"}, "negative_target: 'four' does not occur in negative"),
        ({"positive_target": 3}, "positive_target: "),
        ({"positive": []}, "positive: "),
        ({"positive": 3}, "positive: "),
        ({"positive": "1, 2, 3"}, "one is text, one is messages"),
        ({"positive": ["1, 2, 3"]}, "positive[0]: "),
        ({"positive": [{"role": "user"}]}, "positive[0]: "),
        ({"positive": [{"role": "user", "content": ["x"]}]}, "positive[0].content: "),
        ({"positive": [{"role": "", "content": "x"}]}, "positive[0].role: "),
        ({"id": 7}, "id: "),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "p.jsonl", line(id="z"), line(**changes))
    with pytest.raises(PairsError) as caught:
        load_pairs(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no pairs"),
        (b"\n \n", "no pairs"),
        (b"{", ":1: not JSON"),
        (b"[]", ":1: not a JSON object"),
        (b"\xff\xfe", ":1: not UTF-8"),
        (b'{"id": "a", "id": "b"}', "'id' stands twice"),
        (b'{"id": NaN}', "NaN is not a JSON number"),
        (b'{"id": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, ":1: not JSON"),
        (b"{}", ":1: positive: missing"),
    ],
)
def test_damaged_files(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    with pytest.raises(PairsError) as caught:
        load_pairs(path)
    assert words in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match=r"no\.jsonl: cannot be read"):
        load_pairs(tmp_path / "no.jsonl")
    with pytest.raises(PairsError, match="cannot be read"):
        load_pairs(tmp_path)


def test_duplicate_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", line(), line())
    with pytest.raises(PairsError, match=r":2: id: 'a' is already the id of line 1"):
        load_pairs(path)


def test_digest_is_of_the_content_in_order() -> None:
    one = Pair("a", "x 1", "x one", "1", "one")
    two = Pair("b", "x 2", "x two", "2", "two")
    renamed = Pair("c", "x 1", "x one", "1", "one")
    assert pairs_digest([one, two]) == pairs_digest([renamed, two])
    assert pairs_digest([one, two]) != pairs_digest([two, one])
    expected = '{"negative":"x one","negative_target":"one","positive":"x 1","positive_target":"1"}\n'
    assert pairs_digest([one]) == hashlib.sha256(expected.encode()).hexdigest()


def chatml(messages: tuple[Message, ...]) -> str:
    return "".join(f"<|im_start|>{m.role}\n{m.content.strip()}<|im_end|>\n" for m in messages)


def found(rendered: str, *arguments: Any) -> tuple[int, str]:
    start, end = locate_target(rendered, *arguments)
    data = rendered.encode()
    return start, data[start:end].decode()


def test_locate_in_bytes() -> None:
    side = (Message("user", "zähle 1"), Message("assistant", "ä 1 ä 1"))
    rendered = chatml(side)
    start, text = found(rendered, side, "1")
    assert text == "1"
    assert start == rendered.encode().rindex(b"1")
    assert locate_target(rendered.encode(), side, "1") == (start, start + 1)


def test_target_in_an_earlier_message_stays_there() -> None:
    side = (Message("user", "say user or assistant"), Message("assistant", "no"))
    rendered = chatml(side)
    assert locate_target(rendered, side, "assistant")[0] == rendered.index("assistant")


def test_special_tokens_hold_no_target() -> None:
    side = (Message("user", "where?"), Message("assistant", "end"))
    rendered = chatml(side)
    start, _ = locate_target(rendered, side, "end", special=["<|im_end|>", "<|im_start|>"])
    assert start == rendered.index("\nend") + 1


def test_generation_prompt_and_content_that_is_a_suffix() -> None:
    side = (Message("user", "call my assistant"),)
    rendered = chatml(side) + "<|im_start|>assistant\n"
    assert locate_target(rendered, side, "assistant")[0] == rendered.index("assistant")


def test_rewritten_content_falls_back_to_the_last_occurrence() -> None:
    side = (Message("assistant", "<think>7</think> so it is 7"),)
    assert locate_target("A: 7 so, it is 7!", side, "7") == (15, 16)


def test_target_that_the_template_removed() -> None:
    side = (Message("assistant", " 7 "),)
    with pytest.raises(PairsError, match="not in the rendered prompt; the chat template"):
        locate_target("A:7", side, " 7 ")
    with pytest.raises(PairsError, match="not in the rendered"):
        locate_target("abc", "abc", "")


def test_text_side_uses_the_last_occurrence() -> None:
    assert locate_target("1 2 1 2", "1 2 1 2", "1 2") == (4, 7)


@pytest.mark.parametrize(
    ("pieces", "target", "chosen"),
    [
        ([b"ab", b"cd", b"ef"], b"cd", [1]),
        ([b"ab", b" cd", b"ef"], b"cd", [1]),  # the blank belongs to the first target token
        ([b"ab", b" ", b"cd", b"ef"], b"cd", [2]),  # a blank of its own is outside
        ([b"ab", b"cde", b"f"], b"cd", [1]),  # merged across the end
        ([b"", b"cd", b"", b"e", b""], b"cde", [1, 3]),  # special tokens have no bytes
        ([b"x\xc3", b"\xa4y"], "ä".encode(), [0, 1]),  # halves of one character
    ],
)
def test_tokens_in_span(pieces: list[bytes], target: bytes, chosen: list[int]) -> None:
    start = b"".join(pieces).rindex(target)
    assert tokens_in_span(pieces, start, start + len(target)) == chosen


@given(
    st.lists(st.binary(max_size=3), max_size=12),
    st.integers(0, 20),
    st.integers(1, 20),
)
def test_tokens_in_span_against_bytes(pieces: list[bytes], start: int, length: int) -> None:
    owner = [i for i, piece in enumerate(pieces) for _ in piece]
    assert tokens_in_span(pieces, start, start + length) == sorted(set(owner[start : start + length]))


def test_last_exact_run() -> None:
    assert last_exact_run([1, 2, 1, 2, 3], [1, 2]) == range(2, 4)
    assert last_exact_run([1, 1, 1], [1, 1]) == range(1, 3)
    assert last_exact_run([1, 2], [3]) is None
    assert last_exact_run([1, 2], []) is None
    assert last_exact_run([1], [1, 2]) is None


@given(st.lists(st.sampled_from(["a", "b", " c"]), min_size=1, max_size=10), st.data())
def test_bytes_and_exact_run_agree(pieces: list[str], data: Any) -> None:
    """With one token per piece of text, both rules find the same last span."""
    size = data.draw(st.integers(1, len(pieces)))
    at = data.draw(st.integers(0, len(pieces) - size))
    ids = [ord(piece[-1]) for piece in pieces]
    target = "".join(pieces[at : at + size])
    raw = [piece.encode() for piece in pieces]
    start, end = locate_target("".join(pieces), "".join(pieces), target)
    run = last_exact_run(ids, ids[at : at + size])
    assert run is not None
    assert tokens_in_span(raw, start, end) == list(run)


def test_target_tokens_follow_a_run_on_the_span() -> None:
    pieces, ids = [b"x", b" ", b"1", b"5"], [9, 3, 1, 5]
    assert target_tokens(pieces, 2, 4) == [2, 3]
    # A tokenizer that puts a blank token before every text: the run has one token more.
    assert target_tokens(pieces, 2, 4, ids, [3, 1, 5]) == [1, 2, 3]
    assert target_tokens(pieces, 2, 4, ids, [15]) == [2, 3]
    # A run elsewhere (the last occurrence is merged) does not move the span.
    assert target_tokens([b"15", b"x15"], 3, 5, [7, 8], [7]) == [1]


def test_imports_no_numpy() -> None:
    # A bare package instead of the real one, whose __init__ brings in all the modules.
    code = (
        "import sys, types; package = types.ModuleType('steermoe_local'); "
        "package.__path__ = ['steermoe_local']; sys.modules['steermoe_local'] = package; "
        "import steermoe_local.pairs.pairs; sys.exit('numpy' in sys.modules)"
    )
    root = str(ROOT)
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
