"""Steering plans: names looked up, what is built for a model, and their form in a saved chat."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, ChoiceError, ExpertMap, FormatError, ModelMismatchError, UsageError, write_bias
from steermoe_local.identity import ModelIdentity
from steermoe_local.steering.bias_plan import BiasPlan
from steermoe_local.steering.plan import PlanRule, SteeringPlan
from steermoe_local.steering.plan_objects import rules_from
from steermoe_local.steering.plan_text import parse_rule
from steermoe_local.steering.steering import Steering
from tests.support.builders import HEX
from tests.support.paths import ROOT
from tests.support.scored_maps import save_scored

MAPS = ROOT / "expert_maps" / "tiny"
DIGITS, MEMORY = ExpertMap.load(MAPS / "digits-words.json"), ExpertMap.load(MAPS / "document-memory.json")
IDENTITY = DIGITS.identity
OLMOE = ModelIdentity("olmoe", 16, 64, 8, HEX)


class Folder:
    """Maps and bias files by the names of their files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steering(self, name: str, choice: Mapping[str, Any]) -> Steering:
        path = self.folder / f"{name}.json"
        if path.exists():
            opened = Steering.open(map_file=path, name=name)
        elif (self.folder / f"{name}.gguf").exists():
            opened = Steering.open(bias=self.folder / f"{name}.gguf", name=name)
        else:
            raise UsageError(f"{name}: no such map")
        return opened.with_choice(choice)[0]

    def expert_map(self, name: str) -> tuple[ExpertMap, Path]:
        path = self.folder / f"{name}.json"
        if not path.exists():
            raise UsageError(f"{name}: no such map")
        return ExpertMap.load(path), path

    def plan(self, *rules: Any, **fields: Any) -> SteeringPlan:
        return SteeringPlan.open(rules, self.steering, self.expert_map, **fields)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    shutil.copy(MAPS / "digits-words.json", tmp_path / "digits.json")
    shutil.copy(MAPS / "digits-words.json", tmp_path / "digits2.json")
    shutil.copy(MAPS / "document-memory.json", tmp_path / "memory.json")
    save_scored(tmp_path / "scored.json")
    bias = Steering.open(map_file=MAPS / "digits-words.json", deactivate=4).build()
    assert bias is not None
    write_bias(bias, tmp_path / "ready.gguf")
    return Folder(tmp_path)


def plan_of(built: object) -> BiasPlan:
    assert isinstance(built, BiasPlan)
    return built


def test_rules_of_any_form(folder: Folder) -> None:
    texts = ["thinking: none", "answer[0:32]: digits +2 -3", "answer: ready"]
    objects = [{"phase": "thinking", "map": None}, {"phase": "answer", "tokens": [0, 32], "map": "digits"}]
    objects[1] |= {"activate": 2, "deactivate": 3}
    one = folder.plan(*texts, name="mine")
    other = folder.plan(*objects, parse_rule(texts[2]))
    assert one.texts == other.texts == texts
    assert (one.name, other.name, one.path) == ("mine", "plan", None)
    assert one.sha256 == other.sha256
    built = plan_of(one.build())
    assert built.key == plan_of(other.build()).key
    first, digits, ready = built.rules
    assert first.bias is None
    expected = Steering.open(map_file=MAPS / "digits-words.json", activate=2, deactivate=3).build()
    assert digits.bias is not None
    assert expected is not None
    assert digits.bias.key == expected.key
    assert ready.bias is not None
    assert one.to_json() == {"rules": [*objects, {"phase": "answer", "map": "ready"}]}
    assert [rule.text for rule in one.rules] == texts
    assert rules_from(one.to_json()["rules"]) == [rule.spec for rule in one.rules]


def test_facts(folder: Folder) -> None:
    one = folder.plan("answer: digits +2", "prompt: digits2 -1", "thinking: none")
    assert one.expert_map is not None, "two files of one map are one map"
    assert one.expert_map.sha256 == DIGITS.sha256
    assert (one.mode, one.side, one.identity) == ("hard", DIGITS.positive, IDENTITY)
    two = folder.plan("answer: digits +2", "prompt: memory -1 cap=2")
    assert (two.expert_map, two.mode, two.side) == (None, "mixed", "")
    bias = folder.plan("answer: digits +2", "prompt: ready")
    assert bias.expert_map is None
    nothing = folder.plan("all: none")
    assert (nothing.expert_map, nothing.mode, nothing.side, nothing.identity) == (None, "", "", None)
    assert nothing.build() is None
    assert folder.plan("ready", "answer: digits +1").build() is not None
    assert isinstance(folder.plan("ready", "answer: digits +1").build(), BiasFile)
    short = folder.plan("thinking: none", "answer: scored +900 rank=effect")
    assert "900 asked for" in short.shortfall
    assert short.shortfall.startswith("rule 2: ")
    assert folder.plan("answer: digits +2").shortfall == ""


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (["thinking: none", "answer: nobody +1"], "rule 2: nobody: no such map"),
        (["answer: digits +1", "answer when nobody < 1 over prompt: digits"], "rule 2: nobody"),
        (["answer: digits +1", "answer when digits by effect < 1 over prompt: digits +2"], "rule 2: "),
        (["answer: digits", "answer: ready +2"], "rule 2: ready: a bias file"),
        (["answer: digits +1", "answer digits"], "rule 2 'answer digits'"),
        (["answer: digits +1", {"map": "digits", "every": 0}], "rule 2: every 0"),
        (["digits +1 scale=2 cap=3"], "rule 1: "),
        ([], "1 to 64 rules, not 0"),
        (["digits +1"] * 65, "65"),
        ([parse_rule("digits +1")] * 65, "65"),
    ],
)
def test_bad_rules_are_named(folder: Folder, rules: list[Any], words: str) -> None:
    with pytest.raises(UsageError, match="rule") as refused:
        folder.plan(*rules)
    assert words in str(refused.value)


def test_what_a_model_cannot_carry_out_names_the_rule(folder: Folder) -> None:
    with pytest.raises(ChoiceError, match=r"^rule 2: layers: there is no layer 77"):
        folder.plan("prompt: none", "answer: digits +1 layers=77").build()
    with pytest.raises(UsageError, match=r"^rule 1: layers"):
        folder.plan("answer: digits +1 layers=x").build()
    with pytest.raises(FormatError, match=r"^rule 2: "):
        folder.plan("answer: digits +1", "prompt: digits +1 scale=1e9").build()


def test_another_model(folder: Folder) -> None:
    plan = folder.plan("thinking: none", "answer when memory > 0 over prompt: digits +1")
    assert plan.check(IDENTITY, "m.gguf") == []
    with pytest.raises(ModelMismatchError, match=r"m\.gguf"):
        plan.check(OLMOE, "m.gguf")
    forced = plan.check(OLMOE.__class__(**{**IDENTITY.to_dict(), "router_sha256": HEX}), "m.gguf", force=True)
    assert len(forced) == 2, "of the map that steers, and of the one that is looked at"
    other = replace(MEMORY, identity=replace(IDENTITY, router_sha256=HEX))
    looks = SteeringPlan("x", (PlanRule(plan.rules[1].spec, plan.rules[1].steering, other),))
    with pytest.raises(ModelMismatchError, match="rule 1: when memory"):
        looks.check(IDENTITY, "m.gguf")


def test_conditions_are_looked_up(folder: Folder) -> None:
    plan = folder.plan(
        "answer when memory > 0 over prompt: digits +1", "answer when scored by effect < 1 over last 3: digits +2"
    )
    built = plan_of(plan.build())
    first, second = (rule.lean for rule in built.rules)
    assert first is not None
    assert np.array_equal(first.scores[:-1], MEMORY.rd[:-1])
    assert second is not None
    assert second.digest != first.digest
    assert plan.needs_routing
    assert built.needs_routing


def test_the_digest_is_of_what_steers(folder: Folder) -> None:
    """A name says nothing: the numbers that it stands for, and the contents of its files, are part of the digest."""
    rules = ["answer when memory > 0 over prompt: digits", "thinking: ready"]

    def digest(numbers: Mapping[str, Any]) -> str:
        def steering(name: str, choice: Mapping[str, Any]) -> Steering:
            return folder.steering(name, choice) if name == "ready" else folder.steering(name, numbers)

        return SteeringPlan.open(rules, steering, folder.expert_map).sha256

    first = digest({"activate": 2})
    assert digest({"activate": 2}) == first
    digests = {
        first,
        digest({"activate": 3}),
        digest({"activate": 2, "cap": 1.0}),
        digest({"activate": 2, "rank": "logit"}),
    }
    shutil.copy(folder.folder / "scored.json", folder.folder / "memory.json")
    digests.add(digest({"activate": 2}))
    shutil.copy(folder.folder / "scored.json", folder.folder / "digits.json")
    digests.add(digest({"activate": 2}))
    assert len(digests) == 6


def test_the_digest_is_not_of_how_it_is_written(folder: Folder) -> None:
    def digest(where: str, map_file: str = "digits", scale: Any = 3, **fields: Any) -> str:
        rule = {"phase": "answer", "map": map_file, "activate": 2, "deactivate": 0, "scale": scale}
        return folder.plan(f"{where}: none", rule | fields).sha256

    where = "answer when scored < 1 over prompt"
    shutil.copy(folder.folder / "scored.json", folder.folder / "scored2.json")
    first = digest(where)
    assert first == digest("answer when scored2 < 1 over prompt"), "the name of a map"
    assert first == digest(where, "digits2")
    assert first == digest(where, scale=3.0, reverse=False, mode="soft")
    others = [digest("answer when scored by effect < 1 over prompt"), digest("answer when memory < 1 over prompt")]
    others += [digest("answer when scored > 1 over prompt"), digest("answer when entropy < 1"), digest(where, scale=4)]
    assert len({first, *others}) == 6


def saved(plan: SteeringPlan) -> Any:
    return json.loads(json.dumps(plan.to_dict()))


def test_saved_and_opened(folder: Folder) -> None:
    plan = folder.plan(
        "thinking: none",
        "answer[0:8] when memory > 0.5 over prompt: digits +2 -3 layers=1-4",
        "answer after 'x:': digits +0 -4 reverse mode=capped cap=inf",
        "prompt: ready",
        name="mine",
        path=folder.folder / "mine.plan.json",
    )
    data = saved(plan)
    assert (data["name"], data["plan_sha256"]) == ("mine", plan.sha256)
    again = SteeringPlan.from_dict(data)
    assert (again.name, again.path, again.texts) == (plan.name, plan.path, plan.texts)
    assert again.sha256 == plan.sha256
    assert plan_of(again.build()).key == plan_of(plan.build()).key
    assert saved(again) == data


def test_saved_files_that_changed(folder: Folder) -> None:
    data = saved(folder.plan("thinking: none", "answer when memory > 0.5 over prompt: digits +2"))
    (folder.folder / "memory.json").unlink()
    with pytest.raises(FormatError, match=r"^chat\.rules\[2\]\.looks_at\.map: .*memory\.json: no such file"):
        SteeringPlan.from_dict(data, "chat")
    shutil.copy(folder.folder / "digits.json", folder.folder / "memory.json")
    with pytest.raises(FormatError, match=r"looks_at\.map: .*memory\.json: not the file"):
        SteeringPlan.from_dict(data, "chat")
    shutil.copy(MAPS / "document-memory.json", folder.folder / "digits.json")
    with pytest.raises(FormatError, match=r"^chat\.rules\[2\]\.steering\.map: .*digits\.json: not the file"):
        SteeringPlan.from_dict(data, "chat")
    (folder.folder / "digits.json").unlink()
    with pytest.raises(FormatError, match=r"steering\.map: .*digits\.json: no such file"):
        SteeringPlan.from_dict(data, "chat")


def changed(data: Any, *path: Any, to: Any) -> Any:
    data = json.loads(json.dumps(data))
    inner = data
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = to
    return data


def test_saved_plans_that_were_edited(folder: Folder) -> None:
    data = saved(folder.plan("thinking: none", "answer when memory > 0.5 over prompt: digits +2"))
    second = data["rules"][1]
    for bad, words in (
        (None, "not a plan"),
        ([], "not a plan"),
        (changed(data, "name", to=5), "not a plan"),
        (changed(data, "rules", to=[]), "not a plan"),
        (changed(data, "rules", to=data["rules"] * 33), "64"),
        (changed(data, "rules", 0, to="thinking: none"), "rules[1]: not a rule"),
        (changed(data, "rules", 0, "text", to=None), "rules[1]: not a rule"),
        (changed(data, "rules", 1, "text", to="answer x\x1b"), "rules[2]: rule 2 'answer x\\x1b'"),
        (changed(data, "rules", 0, "steering", to=second["steering"]), "rules[1].steering: not of this rule"),
        (changed(data, "rules", 0, "looks_at", to=second["looks_at"]), "rules[1].looks_at: not of this rule"),
        (changed(data, "rules", 1, "steering", to=None), "rules[2].steering: missing"),
        (changed(data, "rules", 1, "looks_at", to=None), "rules[2].looks_at: missing"),
        (changed(data, "rules", 1, "looks_at", "map", to="a\0b"), "rules[2].looks_at: "),
        (changed(data, "rules", 1, "looks_at", "map_sha256", to="x"), "rules[2].looks_at: "),
        (changed(data, "rules", 1, "steering", "activate", to=-2), "rules[2].steering.activate"),
    ):
        with pytest.raises(FormatError) as refused:
            SteeringPlan.from_dict(bad, "chat")
        assert str(refused.value).startswith("chat")
        assert words in str(refused.value)


def test_a_plan_without_files_cannot_be_saved_for_later() -> None:
    opened = SteeringPlan.open(
        ["answer when f > 0 over prompt: x"],
        lambda name, choice: Steering(name, expert_map=DIGITS, activate=2),
        lambda name: (DIGITS, None),
    )
    with pytest.raises(FormatError, match="did not come from a file"):
        SteeringPlan.from_dict(saved(opened))
