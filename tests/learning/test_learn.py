"""What `learn` ends in: planted behaviours work, random weights and shuffled pairs do not."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from steermoe_local.errors import PairsError, UsageError
from steermoe_local.evaluation.tasks.judge import Judge
from steermoe_local.evaluation.tasks.tasks import Score, load_task
from steermoe_local.learning.judging import Confirmed
from steermoe_local.learning.material import of_behaviour, prompt_of
from steermoe_local.learning.options import Builtin, GivenPairs, JudgeOptions, LearnOptions, LikeUnlike
from steermoe_local.learning.result import LearnResult
from steermoe_local.learning.source import open_source
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.model_files.model_info import model_info
from steermoe_local.models.embedded import behaviour, embedded_model
from steermoe_local.pairs.pairs import Pair, load_pairs, save_pairs
from steermoe_local.pairs.prompts import PromptItem
from steermoe_local.steering.bias_file import read_bias
from tests.learning.conftest import OPENINGS, small
from tests.support.gguf_copy import copy_model

PLANTED = behaviour("digits-words")


def assert_steers_the_planted(folder: Path) -> None:
    """The recommended choice promotes experts of the planted positive side alone, and suppresses those of the other."""
    expert_map = ExpertMap.load(folder / "map.json")
    assert expert_map.recommended is not None
    bias = read_bias(folder / "bias.gguf")
    signs = bias.signs
    for sign, planted in ((1, PLANTED.planted_positive), (-1, PLANTED.planted_negative)):
        steered = {(int(layer), int(expert)) for layer, expert in np.argwhere(signs == sign)}
        assert steered <= planted
    assert int(np.abs(signs).sum()) > 0
    assert bias.n_active == expert_map.recommended.choice.get("activate", 0)
    assert bias.n_inactive == expert_map.recommended.choice.get("deactivate", 0)


def test_two_instructions(learnt: LearnResult) -> None:
    assert learnt.outcome == "works", learnt.verdict
    assert learnt.verdict.startswith("works: held out ")
    assert " digits; random experts " in learnt.verdict
    assert_steers_the_planted(learnt.folder)


def test_the_files(learnt: LearnResult) -> None:
    names = {path.name for path in learnt.folder.iterdir()}
    expected = {"map.json", "pairs.jsonl", "task.jsonl", "bias.gguf", "report.md", "report.html", "README.md"}
    assert expected | {"learn.json", "work"} <= names
    data = json.loads((learnt.folder / "learn.json").read_text("utf-8"))
    assert data["outcome"] == "works"
    assert data["choice"] == learnt.choice
    assert data["confirmed"]["gain"]["low"] > 0
    assert data["confirmed"]["n_random"] >= 5
    report = (learnt.folder / "report.md").read_text("utf-8").splitlines()
    assert report[0] == "# numbers"
    assert report[2].startswith("**works: held out ")
    page = (learnt.folder / "report.html").read_text("utf-8")
    assert page.index("works: held out") < page.index("<table>")


def test_what_is_held_out_is_not_learnt_from(learnt: LearnResult) -> None:
    pairs = load_pairs(learnt.folder / "pairs.jsonl")
    task = load_task(learnt.folder / "task.jsonl")
    lines = (learnt.folder / "work" / "tune.jsonl").read_text("utf-8").splitlines()
    chosen_on = {json.loads(line)["item"] for line in lines if '"item"' in line}
    learnt_from = {pair.positive[0].content for pair in pairs}
    held = {item.messages()[-1].content for item in task.items}
    assert len(held) == len(task.items) >= 10
    assert not held & learnt_from
    assert not chosen_on & {str(item.id) for item in task.items}
    assert chosen_on
    assert not chosen_on & {pair.id for pair in pairs}


def test_instructions_are_left_out_of_the_pairs(learnt: LearnResult) -> None:
    text = (learnt.folder / "pairs.jsonl").read_text("utf-8")
    assert "Use digits." not in text
    assert "system" not in text
    assert all(pair.positive_target != pair.negative_target for pair in load_pairs(learnt.folder / "pairs.jsonl"))


def test_the_recommended_figures(learnt: LearnResult) -> None:
    found = ExpertMap.load(learnt.folder / "map.json").recommended
    assert found is not None
    assert learnt.confirmed is not None
    assert found.unsteered == learnt.confirmed.unsteered.value
    assert found.steered == learnt.confirmed.steered.value
    assert found.n_items == len(load_task(learnt.folder / "task.jsonl").items)


def test_pairs(tmp_path: Path) -> None:
    result = small(tmp_path, GivenPairs(PLANTED.pairs))
    assert result.outcome == "works", result.verdict
    assert_steers_the_planted(result.folder)


def test_a_behaviour_that_ships(tmp_path: Path) -> None:
    result = small(tmp_path, Builtin("digits-words"), name="digits-words", positive="", negative="")
    assert result.outcome == "works", result.verdict
    assert " digits; " in result.verdict
    assert load_task(result.folder / "task.jsonl").scorer == "sides"
    assert result.confirmed is not None
    assert result.confirmed.by_margin is not None
    unsteered, steered = result.confirmed.by_margin
    assert steered.low > unsteered.value
    assert Confirmed.from_dict(json.loads(json.dumps(result.confirmed.to_dict()))) == result.confirmed
    learnt = {prompt_of(pair) for pair in load_pairs(result.folder / "pairs.jsonl")}
    assert learnt
    source = open_source(Builtin("digits-words"), LearnOptions(), model_info(embedded_model()).require_moe())
    assert source.task is not None
    material = of_behaviour(source.task, list(source.pairs), 0.4, (99, 99, 99))
    assert material.margin is not None
    apart = {f"{message.role}: {message.content}" for item in material.margin.items for message in item.messages()}
    assert not apart & {text for prompt in learnt for text in prompt.splitlines()}
    assert_steers_the_planted(result.folder)


def test_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It scores generated answers, and sees no reference answers; its address is not in the task file."""

    def score(_: Judge, item: PromptItem, text: str) -> Score:
        assert not item.extra
        return Score(float(text[:1].isdigit()), "judged")

    monkeypatch.setattr(Judge, "score", score)
    judge = JudgeOptions("http://localhost:1/v1", "some-judge", "Are the numbers digits?")
    result = small(tmp_path, GivenPairs(PLANTED.pairs), judge=judge)
    assert result.outcome == "works", result.verdict
    task = (result.folder / "task.jsonl").read_text("utf-8")
    assert '"scorer": "judge"' in task
    assert "localhost" not in task
    assert load_task(result.folder / "task.jsonl").options["criterion"] == "Are the numbers digits?"


def swapped(pair: Pair) -> Pair:
    return Pair(pair.id, pair.negative, pair.positive, pair.negative_target, pair.positive_target)


@pytest.mark.parametrize("seed", [1, 2])
def test_shuffled_pairs_do_not_work(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    pairs = [swapped(pair) if draw.random() < 0.5 else pair for pair in load_pairs(PLANTED.pairs)]
    save_pairs(pairs, tmp_path / "shuffled.jsonl")
    result = small(tmp_path, GivenPairs(tmp_path / "shuffled.jsonl"))
    assert_did_not_work(result)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_weights_do_not_work(tmp_path: Path, seed: int) -> None:
    (model,) = copy_model(embedded_model(), tmp_path / "random.gguf", random=seed)
    assert_did_not_work(small(tmp_path, GivenPairs(PLANTED.pairs), model=model))
    questions = tmp_path / "questions.jsonl"
    lines = [json.dumps({"id": pair.id, "prompt": pair.positive[0].content}) for pair in load_pairs(PLANTED.pairs)]
    questions.write_text("\n".join(lines), encoding="utf-8")
    instructed = LikeUnlike("Use digits.", "Use words.", questions)
    assert_did_not_work(small(tmp_path, instructed, model=model, name="instructed"))


def assert_did_not_work(result: LearnResult) -> None:
    assert result.outcome == "did not work", result.verdict
    assert result.verdict.startswith("did not work: ")
    assert result.advice
    assert result.choice is None
    assert json.loads((result.folder / "learn.json").read_text("utf-8"))["outcome"] == "did not work"
    assert not (result.folder / "bias.gguf").exists()
    if result.step != "answers":
        assert ExpertMap.load(result.folder / "map.json").recommended is None
    assert result.verdict.split(": ", 1)[1][:20] in (result.folder / "report.html").read_text("utf-8")


def test_nothing_to_gain(tmp_path: Path) -> None:
    """The embedded model answers from the document unsteered: the cure is to learn the other side."""
    result = small(tmp_path, Builtin("document-memory"), name="document")
    assert_did_not_work(result)
    assert "swap" in result.advice


#
# wrong input
#


def test_a_few_pairs_are_examples(tmp_path: Path) -> None:
    """Nothing of them could be held out, so they show the model how to answer questions that ship."""
    pairs = load_pairs(PLANTED.pairs)[:3]
    save_pairs(pairs, tmp_path / "few.jsonl")
    source = open_source(GivenPairs(tmp_path / "few.jsonl"), LearnOptions(), model_info(embedded_model()).require_moe())
    assert source.instructions is not None
    for text, targets in zip(
        source.instructions.values(),
        ([pair.positive_target for pair in pairs], [pair.negative_target for pair in pairs]),
        strict=True,
    ):
        assert [line.removeprefix("Answer: ") for line in text.splitlines() if line.startswith("Answer: ")] == targets
    result = small(tmp_path, GivenPairs(tmp_path / "few.jsonl"))
    assert result.works, result.verdict
    assert "3 examples" in result.facts["contrast"]["words"]


def test_pairs_that_are_too_few(tmp_path: Path) -> None:
    """Texts without a chat are no examples to answer by; nothing is left of a run that could not begin."""
    pairs = [Pair(str(n), f"{n} is {n}", f"{n} is x{n}", str(n), f"x{n}") for n in range(12)]
    save_pairs(pairs, tmp_path / "few.jsonl")
    with pytest.raises(PairsError, match=r"12 pairs are too few: .* Give about 60"):
        small(tmp_path, GivenPairs(tmp_path / "few.jsonl"))
    assert not (tmp_path / "numbers").exists()


def test_pairs_without_a_margin(tmp_path: Path) -> None:
    """Sides with different prompts can be learnt from, but there is nothing to hold out."""
    pairs = [
        Pair(str(number), (pair.positive[0], *pair.positive), pair.negative, pair.positive_target, pair.negative_target)
        for number, pair in enumerate(load_pairs(PLANTED.pairs))
    ]
    save_pairs(pairs, tmp_path / "prompts.jsonl")
    with pytest.raises(PairsError, match="0 held out"):
        small(tmp_path, GivenPairs(tmp_path / "prompts.jsonl"))


def test_instructions_that_are_ignored(tmp_path: Path) -> None:
    """Both answers are the same: too few pairs, and the verdict says why."""
    result = small(tmp_path, LikeUnlike("Use digits.", "Answer with digits."))
    assert_did_not_work(result)
    assert result.step == "answers"
    assert "both answers are the same" in result.verdict


def test_folders_that_are_taken(learnt: LearnResult, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"learnt already.*--restart"):
        small(learnt.folder.parent, OPENINGS)
    with pytest.raises(UsageError, match=r"learnt already.*--restart"):
        small(learnt.folder.parent, OPENINGS, resume=True)
    (model,) = copy_model(embedded_model(), tmp_path / "random.gguf", random=1)
    with pytest.raises(UsageError, match=r"for another model.*another name"):
        small(learnt.folder.parent, GivenPairs(PLANTED.pairs), model=model)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "map.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="not learnt here"):
        small(tmp_path, OPENINGS, name="own")


def test_names(tmp_path: Path) -> None:
    for name in ("Big", "../up", "", "none", "x" * 65):
        with pytest.raises(UsageError):
            small(tmp_path, OPENINGS, name=name)
    assert not list(tmp_path.iterdir())


def test_instructions() -> None:
    for like, unlike in (("", "x"), ("x", " x "), ("x", "  ")):
        with pytest.raises(UsageError, match=r"--like, --unlike"):
            LikeUnlike(like, unlike)


def test_a_behaviour_of_another_model(tmp_path: Path) -> None:
    (model,) = copy_model(embedded_model(), tmp_path / "random.gguf", random=1)
    with pytest.raises(UsageError, match="embedded model alone"):
        small(tmp_path, Builtin("digits-words"), model=model)
    with pytest.raises(UsageError, match="no behaviour that ships"):
        small(tmp_path, Builtin("digit-words"))
