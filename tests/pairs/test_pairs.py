"""Pairs files, and the rule of the paper's code for targets."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.errors import PairsError
from steermoe_local.pairs.pairs import (
    Message,
    Pair,
    last_exact_run,
    load_pairs,
    pairs_digest,
    save_pairs,
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
    with pytest.raises(PairsError, match=r"no\.jsonl: cannot"):
        load_pairs(tmp_path / "no.jsonl")
    with pytest.raises(PairsError, match="cannot be read"):
        load_pairs(tmp_path)


def test_duplicate_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", line(), line())
    with pytest.raises(PairsError, match=r":2: id: 'a' is already"):
        load_pairs(path)


def test_digest_is_of_the_content_in_order() -> None:
    one = Pair("a", "x 1", "x one", "1", "one")
    two = Pair("b", "x 2", "x two", "2", "two")
    renamed = Pair("c", "x 1", "x one", "1", "one")
    assert pairs_digest([one, two]) == pairs_digest([renamed, two])
    assert pairs_digest([one, two]) != pairs_digest([two, one])
    expected = '{"negative":"x one","negative_target":"one","positive":"x 1","positive_target":"1"}\n'
    assert pairs_digest([one]) == hashlib.sha256(expected.encode()).hexdigest()


def test_pairs_with_a_margin() -> None:
    assert Pair("a", chat("1, 2"), chat("one, two"), "1, 2", "one, two").margin_problem() is None
    # behind the target, the sides may differ; the targets are the last occurrences
    assert Pair("a", chat("So: 1. Good."), chat("So: one."), "1", "one").margin_problem() is None
    assert Pair("a", "Q? a a", "Q? a b", "a", "b").margin_problem() is None
    assert Pair("a", (*chat("1"), ASK), (*chat("one"), Message("user", "Go on")), "1", "one").margin_problem() is None
    for name in ("digits-words", "document-memory", "refuse-comply"):
        shipped = load_pairs(ROOT / "steermoe_local" / "data" / f"{name}.pairs.jsonl")
        assert not [pair.id for pair in shipped if pair.margin_problem()]


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        # the paper's faithfulness pairs
        (
            Pair("a", (Message("user", "Document: x. Question: y?"),), (Message("user", "Question: y?"),), "y?", "y?"),
            "--choices",
        ),
        (Pair("a", chat("1"), (Message("user", "Count"), Message("assistant", "one")), "1", "one"), "same prompt"),
        (Pair("a", chat("So: 1"), chat("It is one"), "1", "one"), "same prompt"),
        (
            Pair("a", chat("1"), (Message("system", ASK.content), Message("assistant", "one")), "1", "one"),
            "same prompt",
        ),
        (Pair("a", chat("1"), chat("1"), "1", "1"), "that differ"),
        (Pair("a", "1", "one", "1", "one"), "in front"),
        (Pair("a", (Message("user", "1 is it"),), (Message("user", "one"),), "1", "one"), "in front"),
    ],
)
def test_pairs_without_a_margin_say_why(pair: Pair, words: str) -> None:
    problem = pair.margin_problem()
    assert problem is not None
    assert words in problem
    assert "\n" not in problem


def test_last_exact_run() -> None:
    assert last_exact_run([1, 2, 1, 2, 3], [1, 2]) == range(2, 4)
    assert last_exact_run([1, 1, 1], [1, 1]) == range(1, 3)
    assert last_exact_run([1, 2], [3]) is None
    assert last_exact_run([1, 2], []) is None
    assert last_exact_run([1], [1, 2]) is None


def test_last_exact_run_takes_time_as_the_tokens() -> None:
    ids, wanted = [1, 2] * 200_000, [1, 1] + [2, 1] * 100_000
    start = time.process_time()
    assert last_exact_run(ids, wanted) is None
    assert last_exact_run(ids, wanted[1:]) == range(199_998, 399_999)
    assert time.process_time() - start < 5  # 0.1 s; a comparison at each place takes minutes


def test_imports_no_numpy() -> None:
    # A bare package instead of the real one, whose __init__ brings in all the modules.
    code = (
        "import sys, types; package = types.ModuleType('steermoe_local'); "
        "package.__path__ = ['steermoe_local']; sys.modules['steermoe_local'] = package; "
        "import steermoe_local.pairs.pairs; sys.exit('numpy' in sys.modules)"
    )
    root = str(ROOT)
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
