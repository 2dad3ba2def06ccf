"""Task files from data: a round trip, selection, hostile files, and anything at all."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steermoe_local.errors import FormatError, SteerMoEError, UsageError
from steermoe_local.evaluation.datasets.builders import (
    ADAPTERS,
    BuildOptions,
    Tally,
    dataset_rows,
    select,
    task_head,
    task_items,
    write_task,
)
from steermoe_local.evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
from steermoe_local.evaluation.measuring.task_check import check_task
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.evaluation.tasks.tasks import load_task
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.pairs.prompts import PromptItem
from tests.pairs.test_pair_builders import write_lines, write_parquet
from tests.support.dataset_samples import (
    COUNTERFACTUAL,
    SAMPLES,
    from_file,
    made,
    rows_of,
    write_csv,
    write_json,
)


@pytest.fixture(scope="module")
def llama(tiny_path: Path) -> Iterator[SteeredLlama]:
    model = SteeredLlama(tiny_path, n_ctx=64)
    yield model
    model.close()


#
# from the file to the answers
#


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_round_trip(name: str, tmp_path: Path, llama: SteeredLlama) -> None:
    source, out = write_json(tmp_path / "data.json", SAMPLES[name]), tmp_path / "task.jsonl"
    tally = Tally()
    items = list(select(task_items(name, dataset_rows(name, [source]), tally), tally, limit=3))
    assert write_task(items, out, task_head(name), tally) == tally.items == 3
    task = load_task(out)
    adapter = ADAPTERS[name]
    assert task.name == name
    assert [item.content for item in task.items] == [item.content for item in items]
    assert [item.extra for item in task.items] == [item.extra for item in items]
    assert (task.positive, task.negative) == (adapter.positive, adapter.negative)
    found = check_task(task)
    assert found.problems == ()
    scorer = make_scorer(task.scorer, task.options)
    with Evaluator(
        llama, task, scorer, settings=EvaluatorSettings(n_parallel=4, context={"n_threads": 1})
    ) as evaluator:
        measured = evaluator.measure([None])[0]
    assert len(measured.values) == 3
    assert evaluator.n_computed == 3


def test_every_adapter_has_a_sample() -> None:
    assert set(SAMPLES) == set(ADAPTERS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_same_data_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl"
    texts = set()
    for _ in range(2):
        write_task(select(made(name, rows_of(name)), Tally(), sample=2, seed=3), out, task_head(name))
        texts.add(out.read_bytes())
    assert len(texts) == 1


#
# choosing and writing
#


def plain(n: int) -> list[PromptItem]:
    return [PromptItem(f"p{i}", f"say {i}") for i in range(n)]


def test_select() -> None:
    items = plain(200)
    assert list(select(items, Tally(), skip=2, limit=3)) == items[2:5]
    drawn = list(select(items, Tally(), sample=20, seed=3))
    assert drawn == list(select(iter(items), Tally(), sample=20, seed=3))
    assert drawn != list(select(items, Tally(), sample=20, seed=4))
    indices = [items.index(item) for item in drawn]
    assert indices == sorted(set(indices))
    assert len(indices) == 20
    assert max(indices) > 150 > 50 > min(indices)
    assert list(select(items, Tally(), sample=500)) == items
    with pytest.raises(UsageError, match="limit"):
        list(select(items, Tally(), limit=1, sample=1))


def test_the_same_content_once_and_ids_of_their_own() -> None:
    tally = Tally()
    items = [
        PromptItem("a", "x"),
        PromptItem("a", "y"),
        PromptItem("a-2", "z"),
        PromptItem("b", "x"),
        PromptItem("a", "w"),
    ]
    found = list(select(items, tally))
    assert [item.content for item in found] == ["x", "y", "z", "w"]
    assert len({item.id for item in found}) == 4
    assert [item.id for item in found][:2] == ["a", "a-2"]
    assert tally.skipped == {"the same as an earlier item": 1}
    assert tally.items == 4


def test_nothing_to_write_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl"
    out.write_text("before")
    tally = Tally()
    items = task_items("cf-triviaqa", [{"question_text": ""}] * 2, tally)
    with pytest.raises(FormatError, match=r"t\.jsonl: .*2 left out: no document"):
        write_task(items, out, task_head("cf-triviaqa"), tally)
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "no"))):
        write_task(plain(1), tmp_path / "no" / "t.jsonl", {})


#
# files
#


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_formats(tmp_path: Path, pack: Any) -> None:
    wanted = [(item.id, item.content, item.extra) for item in made("faitheval-counterfactual", COUNTERFACTUAL)]
    files = [
        write_json(tmp_path / "a.json", COUNTERFACTUAL),
        write_lines(tmp_path / "a.jsonl", COUNTERFACTUAL),
        write_csv(tmp_path / "a.csv", COUNTERFACTUAL),
        write_csv(tmp_path / "a.tsv", COUNTERFACTUAL, "\t"),
    ]
    for path in files:
        path.write_bytes(pack(b"\xef\xbb\xbf" + path.read_bytes()))
        found = from_file("faitheval-counterfactual", path)
        assert [(item.id, item.content, item.extra) for item in found] == wanted, path
    assert len(from_file("faitheval-counterfactual", *files)) == 4 * len(wanted)


@pytest.mark.parametrize("name", ["faitheval-counterfactual", "cf-triviaqa", "mquake", "mctest", "strongreject"])
def test_parquet(name: str, tmp_path: Path) -> None:
    rows = json.loads(json.dumps(SAMPLES[name]).replace('"properties": {}, ', "").replace('"triples": []', '"x": 1'))
    path = write_parquet(tmp_path / "t.parquet", rows)
    assert [item.content for item in from_file(name, path)] == [item.content for item in made(name, SAMPLES[name])]
    with pytest.raises(FormatError, match=r"t\.parquet: no column "):
        from_file("faitheval-unanswerable", path) if name != "faitheval-counterfactual" else from_file("mquake", path)


@pytest.mark.parametrize("hops", ["single", "multi"])
@pytest.mark.parametrize("name", ["cf-triviaqa", "mquake", "mctest"])
def test_objects_in_the_cells_of_a_table(name: str, hops: str, tmp_path: Path) -> None:
    options = {"hops": hops} if name == "mquake" else {}
    rows = dataset_rows(name, [write_csv(tmp_path / "t.csv", SAMPLES[name])])
    found = list(task_items(name, rows, Tally(), BuildOptions(**options)))
    assert found == made(name, SAMPLES[name], **options)


HOSTILE = {
    "empty": b"",
    "blank": b" \n\n \n",
    "byte order mark alone": b"\xef\xbb\xbf\n",
    "latin 1": "context,question\né,x\n".encode("latin-1"),
    "UTF-16": "context,question\na,b\n".encode("utf-16"),
    "other columns": b'{"text": "x"}\n',
    "other table": b"a,b\n1,2\n",
    "array of numbers": b"[1, 2]",
    "array of texts": b'["a", "b"]',
    "deep": b"[" * 100_000,
    "cut JSON": b'[{"context": "a", "question": ',
    "a line without end": b"x" * (2 << 20),
    "binary": b"\x00\x01\x02" * 100,
    "zstd": b"\x28\xb5\x2f\xfd\x00\x00",
    "cut gzip": gzip.compress(b'{"context": "a", "question": "b"}\n' * 1000)[:-20],
    "parquet": b"PAR1" + b"\0" * 40,
    "huge cell": b'context,question\n"' + b"x" * 200_000 + b'",b\n',
    "quote without end": b'context,question\n"a\n',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(HOSTILE[kind])
    name, tally = "faitheval-unanswerable", Tally()
    items = task_items(name, dataset_rows(name, [path]), tally)
    with pytest.raises(FormatError) as caught:
        write_task(items, tmp_path / "out.jsonl", task_head(name), tally)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "kind", sorted(set(HOSTILE) - {"other table", "array of texts", "quote without end", "huge cell"})
)
def test_hostile_lists(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(FormatError, match=str(path)):
        from_file("prompts", path)


def test_a_list_of_texts_with_something_else_in_it(tmp_path: Path) -> None:
    path = write_json(tmp_path / "l.json", ["Fold a crane", 3.5, None, {"prompt": "x"}, ["y"], "Fold a boat", ""])
    tally = Tally()
    items = list(task_items("tdc2023", dataset_rows("tdc2023", [path]), tally))
    assert [item.content for item in items] == ["Fold a crane", "Fold a boat"]
    assert tally.skipped == {"no prompt": 5}


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FormatError, match=re.escape(f"{path}: cannot be read")):
            from_file("prompts", path)


def test_many_columns_are_not_all_listed(tmp_path: Path) -> None:
    path = write_json(tmp_path / "w.json", [{f"column {n} {'x' * 500}": 1 for n in range(1000)}])
    with pytest.raises(FormatError, match="'requested_rewrite'") as caught:
        from_file("mquake", path)
    assert len(str(caught.value)) < 2000


#
# anything at all
#

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["A", "B", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def bent_rows(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A good row with anything as some of its values."""
    row = json.loads(json.dumps(draw(st.sampled_from(rows_of(name)))))
    values: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
        for key in keys:
            values.append((value, key))
            walk(value[key])

    walk(row)
    for index in draw(st.sets(st.integers(0, len(values) - 1), max_size=3)):
        holder, key = values[index]
        holder[key] = draw(JSON)
    return dict(row)


@pytest.mark.parametrize("name", ADAPTERS)
@settings(max_examples=40)
@given(data=st.data())
def test_bent_rows_give_good_items_or_none(name: str, tmp_path: Path, data: st.DataObject) -> None:
    rows = [data.draw(bent_rows(name)) for _ in range(2)]
    tally = Tally()
    items = list(select(task_items(name, rows, tally), tally))
    assert tally.rows == 2
    assert len(items) == tally.items
    assert all(len(reason) <= 120 for reason in tally.skipped)
    if items:
        out = tmp_path / "t.jsonl"
        write_task(items, out, task_head(name))
        task = load_task(out)
        assert [(i.id, i.content, i.extra) for i in task.items] == [(i.id, i.content, i.extra) for i in items]
        assert check_task(task).problems == ()


@settings(max_examples=60)
@example(data=b"\x1c", name="advbench")
@example(data=b"\xc2\x85\n", name="prompts")
@given(data=st.binary(max_size=200), name=st.sampled_from(sorted(ADAPTERS)))
def test_any_bytes_are_rows_or_one_error(data: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(data)
    with contextlib.suppress(SteerMoEError):
        from_file(name, path)
