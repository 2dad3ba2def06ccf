"""Tasks and guards that ship."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.errors import FormatError, ModelError, UsageError
from steermoe_local.evaluation.tasks.builtin import builtin_names, builtin_task, default_guards, is_embedded, open_task
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.identity import ModelIdentity
from steermoe_local.model_files.model_info import model_info
from steermoe_local.models.embedded import behaviours, data_folder, score_reply
from tests.support.paths import ROOT


@pytest.mark.parametrize("name", builtin_names())
def test_every_item_can_be_scored(name: str) -> None:
    task = builtin_task(name)
    scorer = make_scorer(task.scorer, task.options)
    assert len(task.items) >= 60
    assert (task.name, task.source, task.license) == (name, f"builtin:{name}", "MIT")
    assert task.positive
    assert task.negative
    for item in task.items:
        scorer.check(item)


@pytest.mark.parametrize("name", [behaviour.name for behaviour in behaviours()])
def test_sides(name: str) -> None:
    task = builtin_task(f"builtin:{name}")
    scorer = make_scorer(task.scorer, task.options)
    for item in task.items[:20]:
        positive, negative = item.extra["positive"], item.extra["negative"]
        assert scorer.score(item, f" {positive}\n").value == 1
        assert scorer.score(item, negative).label == "negative"
        assert scorer.score(item, "??").label == score_reply(name, "??", positive, negative)[0] == "ill-formed"
    well_formed = {"digits-words": "1, 2", "refuse-comply": "Sorry, never.", "document-memory": None}[name]
    if well_formed:
        assert scorer.score(task.items[0], well_formed).label == "positive"


def test_names() -> None:
    names = "did you mean digits.* digits-words, document-memory, refuse-comply, neutral, benign"
    with pytest.raises(UsageError, match=f"'digitz'.*{names}"):
        builtin_task("digitz")
    with pytest.raises(UsageError, match=r"'\.\./benign'"):
        open_task("builtin:../benign")


def test_open_task(tmp_path: Path) -> None:
    assert open_task("builtin:digits-words").sha256 == builtin_task("digits-words").sha256
    changed = open_task("builtin:digits-words", scorer="digits-or-words", max_tokens=5)
    assert (changed.scorer, changed.options, changed.max_tokens) == ("digits-or-words", {}, 5)
    assert open_task("builtin:neutral", options={"normalize": "squad"}).options == {"normalize": "squad"}
    path = tmp_path / "p.txt"
    path.write_text("Hello?\n")
    assert open_task(path, scorer="refusal").items[0].content == "Hello?"
    with pytest.raises(FormatError):
        open_task(tmp_path / "nothing.jsonl")
    with pytest.raises(UsageError, match=r"digits-words: .*builtin:digits-words"):
        open_task("digits-words")


#
# guards
#


def test_guards_of_the_embedded_model(tiny_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "renamed.gguf"
    copy.write_bytes(tiny_path.read_bytes())
    for model in ("tiny", tiny_path, copy, model_info(tiny_path).identity):
        assert is_embedded(model)
        (task, scorer), text = default_guards(model)
        assert (task.name, task.scorer, task.positive) == ("neutral", "refusal", "refused")
        assert scorer.score(task.items[0], "Sorry, this stays secret.").value == 1
        assert scorer.score(task.items[0], task.items[0].extra["answer"]).value == 0
        assert len(text.passages) == len(task.items) == 160
        assert all(prompt is not None for prompt, _ in text.passages)


def test_guards_of_other_models(tiny_path: Path) -> None:
    identity = model_info(tiny_path).identity
    assert identity is not None
    other = ModelIdentity.from_dict(identity.to_dict() | {"router_sha256": "1" * 64})
    for model in (None, other):
        assert not is_embedded(model)
        (task, scorer), text = default_guards(model)
        assert (task.name, task.source) == ("benign", "builtin:benign")
        assert scorer.score(task.items[0], "I can't help with that.").value == 1
        assert [prompt for prompt, _ in text.passages] == [None]


def test_a_model_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"nothing")
    with pytest.raises((ModelError, FormatError)):
        default_guards(path)


def test_the_benign_prompts() -> None:
    items = builtin_task("benign").items
    kinds = [item.extra["kind"] for item in items]
    assert kinds.count("plain") == kinds.count("alarming") == 30
    assert len({str(item.content) for item in items}) == 60


def test_the_prose() -> None:
    text = (data_folder() / "neutral.txt").read_text("utf-8")
    assert 600 <= len(text.split()) <= 900
    assert text.isascii()
    assert len(text.split("\n\n")) >= 6


def test_the_data_is_installed() -> None:
    """The wheel takes the package's folder with all in it; nothing there is left out by name."""
    folder = resources.files("steermoe_local").joinpath("data")
    for name in ("refusals.labelled.jsonl", "benign.jsonl", "neutral.txt"):
        assert folder.joinpath(name).is_file()
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    excluded: list[Any] = re.findall(r"^wheel\.exclude = \[(.*)\]", settings, re.MULTILINE)
    assert excluded == ['"**/__pycache__"']


def test_the_page_s_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "tasks.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out.strip() == block.strip().rpartition("# ")[2]


def test_the_page_s_task_file(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tasks.md").read_text("utf-8")
    path = tmp_path / "capitals.jsonl"
    path.write_text(re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0])
    task = open_task(path)
    scorer = make_scorer(task.scorer, task.options)
    assert [scorer.score(item, "It is Madrid.").value for item in task.items] == [0, 1]
