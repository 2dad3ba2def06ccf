"""The file that answers are kept in: whatever interrupts a run, what is there can be gone on from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import BusyError, FormatError, StorageError, UsageError
from steermoe_local.generation import answer_file
from steermoe_local.generation.answer_file import AnswerFile, json_line

SETTINGS: dict[str, Any] = {"model": {"name": "m", "size": 3}, "seed": None, "stop": ("a",), "temperature": 0.8}
RECORDS: list[dict[str, Any]] = [{"id": n if n % 2 else f"q{n}", "text": "é\u2028\n" * n, "n": n} for n in range(5)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().decode("utf-8").split("\n")[:-1]]


def test_the_output_has_the_order_of_the_prompts(tmp_path: Path) -> None:
    answers = AnswerFile(tmp_path / "out.jsonl")
    assert not answers.exists()
    answers.start(SETTINGS)
    for record in reversed(RECORDS):
        answers.add(record)
    assert not (tmp_path / "out.jsonl").exists()
    answers.finish(record["id"] for record in RECORDS)
    assert lines(tmp_path / "out.jsonl") == RECORDS
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def answered(folder: Path, n: int) -> AnswerFile:
    """The file of a run that ended after its first `n` answers."""
    answers = AnswerFile(folder / "out.jsonl")
    answers.start(SETTINGS)
    for record in RECORDS[:n]:
        answers.add(record)
    answers.close()
    return answers


@given(st.data())
def test_a_file_that_was_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A killed process leaves a beginning of the file: its whole lines are kept, or there is nothing to go on from."""
    folder = tmp_path_factory.mktemp("cut")
    answers = answered(folder, 3)
    whole = answers.path.read_bytes()
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    answers.path.write_bytes(cut)
    again = AnswerFile(folder / "out.jsonl")
    if b"\n" not in cut:
        with pytest.raises(FormatError, match="--restart"):
            again.resume(SETTINGS)
        return
    done = again.resume(SETTINGS)
    again.add({"id": "interrupted again"})
    again.close()
    again = AnswerFile(folder / "out.jsonl")
    assert again.resume(SETTINGS) == done | {"interrupted again"}
    assert done == {str(record["id"]) for record in RECORDS[: cut.count(b"\n") - 1]}
    for record in RECORDS:
        if str(record["id"]) not in done:
            again.add(record)
    again.finish(record["id"] for record in RECORDS)
    assert lines(folder / "out.jsonl") == RECORDS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.5}, "temperature 0.8, now it is 0.5"),
        ({"model": {"name": "m", "size": 4}}, "with model {"),
        ({"new": 1}, "new null, now it is 1"),
        ({"stop": ()}, 'stop ["a"], now it is []'),
        ({"seed": 1}, "seed null, now it is 1"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    answers = AnswerFile(tmp_path / "out.jsonl")
    answers.start(SETTINGS)
    answers.add(RECORDS[0])
    answers.close()
    before = answers.path.read_bytes()
    with pytest.raises(UsageError) as caught:
        AnswerFile(tmp_path / "out.jsonl").resume(SETTINGS | change)
    assert words in str(caught.value)
    assert "--restart" in str(caught.value)
    assert answers.path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"{}\n",
        b"[1]\n",
        b"\xff\n",
        b'{"format": "steermoe-partial-answers", "version": 1}\n',
        b'{"format": "steermoe-partial-answers", "version": 2, "settings": {}}\n',
        b'{"format": "steermoe-partial-answers", "version": 1, "settings": {}}\nnonsense\n',
        b'{"format": "steermoe-partial-answers", "version": 1, "settings": {}}\n[]\n',
        b'{"format": "steermoe-partial-answers", "version": 1, "settings": {}}\n{"text": "x"}\n',
    ],
)
def test_what_is_no_partial_file(tmp_path: Path, content: bytes) -> None:
    answers = AnswerFile(tmp_path / "out.jsonl")
    answers.path.write_bytes(content)
    with pytest.raises(FormatError, match="--restart"):
        answers.resume({})


def test_a_power_cut(tmp_path: Path) -> None:
    """The file had grown, but what stands in its last part did not come to the disk: zeros instead."""
    answers = answered(tmp_path, 4)
    whole = answers.path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    for torn in (whole[: ends[2]] + bytes(400), whole[: ends[2]] + bytes(30) + b"\n" + whole[ends[3] :]):
        answers.path.write_bytes(torn)
        with AnswerFile(tmp_path / "out.jsonl") as again:
            assert again.resume(SETTINGS) == {str(record["id"]) for record in RECORDS[:2]}
            again.add(RECORDS[4])
        assert answers.path.read_bytes() == whole[: ends[2]] + json_line(RECORDS[4]).encode()


@pytest.mark.parametrize("room", [0, 1, 10])
def test_no_room_for_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """What was written of it is taken back: another answer, of a thread that comes later, stands behind whole lines."""
    resource = pytest.importorskip("resource")
    with AnswerFile(tmp_path / "out.jsonl") as answers:
        answers.start(SETTINGS)
        answers.add(RECORDS[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (answers.path.stat().st_size + room, hard))
            with pytest.raises(StorageError, match="--resume"):
                answers.add(RECORDS[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        answers.add(RECORDS[2])
    with AnswerFile(tmp_path / "out.jsonl") as again:
        assert again.resume(SETTINGS) == {str(RECORDS[0]["id"]), str(RECORDS[2]["id"])}
        again.add(RECORDS[1])
        again.finish(record["id"] for record in RECORDS[:3])
    assert lines(tmp_path / "out.jsonl") == RECORDS[:3]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_an_interrupt_behind_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that stands in the file and not in the table must not mix with the next one."""

    def interrupted(_: AnswerFile) -> None:
        raise KeyboardInterrupt

    with AnswerFile(tmp_path / "out.jsonl") as answers:
        answers.start(SETTINGS)
        with monkeypatch.context() as patch:
            patch.setattr(answer_file, "_FLUSH_EVERY", -1.0)
            patch.setattr(AnswerFile, "_flush", interrupted)
            with pytest.raises(KeyboardInterrupt):
                answers.add(RECORDS[4])
        answers.add(RECORDS[0])
    with AnswerFile(tmp_path / "out.jsonl") as again:
        assert again.resume(SETTINGS) == {str(RECORDS[0]["id"])}


def test_only_one_at_a_time(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "out.jsonl") as answers:
        answers.start(SETTINGS)
        answers.add(RECORDS[0])
        before = answers.path.read_bytes()
        other = AnswerFile(tmp_path / "out.jsonl")
        for begin in (other.start, other.resume):
            with pytest.raises(BusyError):
                begin(SETTINGS)
        assert answers.path.read_bytes() == before
    with other:
        assert other.resume(SETTINGS) == {str(RECORDS[0]["id"])}


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "no"))):
        AnswerFile(tmp_path / "no" / "out.jsonl")
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path}: ")):
        AnswerFile(tmp_path)


def test_a_new_start_forgets_the_old_one(tmp_path: Path) -> None:
    answers = AnswerFile(tmp_path / "out.jsonl")
    answers.start(SETTINGS)
    answers.add(RECORDS[0])
    answers.start(SETTINGS)
    answers.add(RECORDS[1])
    answers.close()
    with AnswerFile(tmp_path / "out.jsonl") as again:
        assert again.resume(SETTINGS) == {str(RECORDS[1]["id"])}


def test_without_an_answer_nothing_stays(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "out.jsonl") as answers:
        answers.start(SETTINGS)
        assert answers.exists()
    assert not answers.exists()
    with AnswerFile(tmp_path / "out.jsonl") as answers:
        answers.start(SETTINGS)
        answers.add(RECORDS[0])
    assert answers.exists()
    with pytest.raises(UsageError), AnswerFile(tmp_path / "out.jsonl") as again:
        again.resume(SETTINGS | {"seed": 1})
    assert answers.exists(), "a refused resume took the answers away"
