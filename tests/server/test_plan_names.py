"""Plans under a name: registered, listed, kept in the maps folder, and what becomes of one whose maps change."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steermoe_local import ExpertMap, model_info, open_plan, write_bias
from steermoe_local.errors import ChoiceError, FormatError, UsageError
from steermoe_local.server import SteeringRegistry
from steermoe_local.server.api_errors import ApiError
from steermoe_local.server.registered import biases_of, n_bytes
from steermoe_local.server.registry import _CACHED
from steermoe_local.server.schemas import GivenPlan, RegisterRequest
from steermoe_local.steering.bias_plan import BiasPlan
from steermoe_local.steering.plan import SteeringPlan
from steermoe_local.steering.plan_file import read_plan_file
from steermoe_local.steering.plan_text import parse_rules
from tests.support.running_server import TINY, Running, running
from tests.support.steered_server import WORDS, bias_of, post, text_of

IDENTITY = model_info(TINY).identity
RULES = ["prompt: digits-words +2 -2 reverse", "answer: document-memory +1 -1"]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(parallel=2) as found:
        yield found


def opened(folder: Path | None = None, *, writable: bool = True, warnings: int = 0) -> SteeringRegistry:
    found = SteeringRegistry(folder=folder, writable=writable and folder is not None)
    told = found.open(IDENTITY)
    assert len(told) == warnings, told
    return found


def register(registry: SteeringRegistry, name: str = "plan", **fields: Any) -> dict[str, Any]:
    return registry.register(RegisterRequest.model_validate({"name": name} | fields)).to_dict()


def given(*rules: str) -> GivenPlan:
    return GivenPlan(tuple(parse_rules(rules)))


def map_of(digits: ExpertMap, **fields: Any) -> dict[str, Any]:
    return dict(json.loads(replace(digits, **fields).to_json()))


#
# in memory
#


def test_a_plan_is_registered_listed_used_and_deleted(server: Running) -> None:
    response = post(server, name="two-voices", rules=RULES)
    assert response.status_code == 201, response.text
    entry = response.json()
    assert (entry["kind"], entry["source"], entry["usable_by_name"]) == ("plan", "request", True)
    assert entry["rules"] == RULES
    assert entry == server.client.get("/v1/steering/two-voices").json()
    assert entry in server.client.get("/v1/steering").json()["data"]
    assert {"id": "tiny:two-voices", "steering": "two-voices"}.items() <= next(
        model for model in server.client.get("/v1/models").json()["data"] if model["id"] == "tiny:two-voices"
    ).items()
    by_name = server.chat(steering="two-voices").json()
    by_model = server.chat(model="tiny:two-voices").json()
    by_rules = server.chat(steering=RULES).json()
    assert by_name["steering"]["name"] == by_model["steering"]["name"] == "two-voices"
    for field in ("rules", "plan_sha256", "bias_sha256", "n_steered", "side", "mode"):
        assert by_name["steering"][field] == by_model["steering"][field] == by_rules["steering"][field]
    assert by_name["steering"]["plan_sha256"] == entry["plan_sha256"]
    assert post(server, name="two-voices", rules=RULES).json()["error"]["code"] == "name_taken"
    replaced = post(server, name="two-voices", rules=["answer: none", RULES[0]], replace=True).json()
    assert replaced["rules"] == ["answer: none", RULES[0]]
    for body in ({"map": "two-voices"}, {"map": "two-voices", "activate": 1}):
        refused = server.chat(steering=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "steering")
    for path in ("/v1/steering/two-voices/map", "/v1/steering/two-voices/map?activate=1"):
        assert server.client.get(path).status_code == 400
    assert post(server, name="other", map="two-voices").status_code == 400
    assert server.client.delete("/v1/steering/two-voices").status_code == 204
    assert server.chat(steering="two-voices").status_code == 404


def test_rules_have_all_that_they_choose() -> None:
    """What is left out is as registered, and is told."""
    registry = opened()
    register(registry, "words", map="digits-words", activate=3, deactivate=1, reverse=True)
    texts = ["answer: words", "all: words -4 layers=1-3 mode=capped cap=inf", "prompt: none"]
    told = register(registry, rules=texts)["rules"]
    assert told == ["answer: words +3 -1 reverse", "all: words +3 -4 reverse layers=1-3 cap=inf", "prompt: none"]
    assert register(registry, "again", rules=told)["rules"] == told
    asked = registry.resolve(given(*texts))
    assert asked.info is not None
    assert asked.info["rules"] == told
    assert asked.label not in {entry.name for entry in registry.entries()}


def test_one_plan_has_one_digest() -> None:
    """With the numbers that a name stands for, as the server has them, and without, as the command line has them."""
    rules = ["answer[0:3]: digits-words reverse", "answer when digits-words < 1 over prompt: document-memory +1 -1"]
    registry = opened()
    asked = registry.resolve(given(*rules))
    assert asked.info is not None
    assert asked.info["rules"][0] == "answer[0:3]: digits-words +2 -4 reverse"
    for plan in (open_plan(rules), open_plan(asked.info["rules"])):
        assert plan.sha256 == asked.info["plan_sha256"]
        registry.add_plan(replace(plan, name="start"))
        assert registry.entry("start").to_dict()["plan_sha256"] == plan.sha256


@pytest.mark.parametrize(
    ("rules", "code", "words"),
    [
        (["answer: digits-words", "answer: nothing +1 -1"], "steering_not_found", "rule 2: steering 'nothing'"),
        (["answer when nothing < 1 over prompt: none"], "steering_not_found", "rule 1: steering 'nothing'"),
        (["answer: plan"], "invalid_value", "rule 1: plan: a plan"),
        (["answer when own-bias < 1 over prompt: none"], "invalid_value", "rule 1: when own-bias"),
        (["answer: own-bias +1 -1"], "invalid_value", "rule 1: own-bias: a bias file"),
        (["answer: bare"], "invalid_value", "rule 1: bare: the map recommends no numbers of experts; "),
        (["answer: digits-words +0 -0"], "invalid_value", "rule 1: digits-words: no experts, so nothing steers there"),
        (["answer: bare +0"], "invalid_value", "rule 1: bare: no experts, so nothing steers there"),
        (["answer: 'maps/x.json' +1 -1"], "invalid_value", "rule 1: 'maps/x.json' is no name"),
        (["answer: digits-words +1000001"], "invalid_value", "rule 1: activate: "),
        (["answer: digits-words scale=1001"], "invalid_value", "rule 1: scale: "),
        (["answer: digits-words mode=medium"], "invalid_value", "rule 1: mode: "),
        (["all: none", "answer: digits-words layers=7"], "impossible_choice", "rule 2: layers: "),
        (["answer: digits-words preset=faithful +1"], "invalid_value", "rule 1: preset"),
        (["answer: digits-words rank=weight"], "invalid_value", "rule 1: rank weight"),
        (["answer when digits-words by effect < 1 over prompt: none"], None, "rule 1: "),
    ],
)
def test_what_a_rule_cannot_name(rules: list[str], code: str | None, words: str, digits: ExpertMap) -> None:
    registry = opened()
    register(registry, rules=["answer: none"])
    register(registry, "bare", map=map_of(digits))
    register(registry, "own-bias", bias=encoded_bias())
    for param, ask in (
        ("rules", lambda: register(registry, "new", rules=rules)),
        ("steering", lambda: registry.resolve(given(*rules))),
    ):
        with pytest.raises(ApiError) as caught:
            ask()
        assert (caught.value.status, caught.value.param) == (400, param)
        assert str(caught.value).startswith(f"{param}: {words}")
        assert code in (None, caught.value.code)
    assert "new" not in {entry.name for entry in registry.entries()}


def encoded_bias() -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_bias(bias_of(WORDS), Path(folder) / "b.gguf")
        return base64.b64encode((Path(folder) / "b.gguf").read_bytes()).decode()


@pytest.mark.parametrize(
    "fields", [{"activate": 1}, {"mode": "soft"}, {"map": "digits-words"}, {"bias": ""}, {"preset": "faithful"}]
)
def test_rules_stand_alone(fields: dict[str, Any], server: Running) -> None:
    response = post(server, name="x", rules=RULES, **fields)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")


def test_a_plan_keeps_what_it_was_made_of(digits: ExpertMap) -> None:
    registry = opened()
    register(registry, "mine", map=map_of(digits), activate=2, deactivate=2)
    register(registry, rules=["answer: mine", "prompt: mine reverse"])
    register(registry, "bias", bias=encoded_bias())
    register(registry, "of-bias", rules=["answer: bias"])
    before = {name: registry.resolve(name).info for name in ("plan", "of-bias")}
    register(registry, "mine", map="document-memory", activate=1, replace=True)
    register(registry, "bias", map="document-memory", activate=1, replace=True)
    assert {name: registry.resolve(name).info for name in before} == before
    for name in ("mine", "bias"):
        registry.remove(name)
    assert {name: registry.resolve(name).info for name in before} == before
    with pytest.raises(ApiError, match="'mine' is not registered"):
        registry.resolve(given("answer: mine"))


def test_the_biases_that_are_kept_ready_are_bounded() -> None:
    registry = opened()
    for number in range(12):
        rules = [f"answer[{i}:{i + 1}]: digits-words +{1 + i} -{1 + number}" for i in range(15)]
        bias = registry.resolve(given(*rules)).bias
        assert isinstance(bias, BiasPlan)
        assert len(bias.biases) == 15
        found = registry.ready(given(*rules))
        assert found is not None
        assert found.bias is bias
        assert registry._n_built == sum(len(biases_of(kept)) for kept in registry._built.values())
        assert registry._n_built <= _CACHED
    for number in range(300):
        registry.resolve(given(f"answer[{number}:]: none"))
    assert len(registry._built) <= _CACHED


def test_the_tables_of_plans_count(digits: ExpertMap) -> None:
    registry = opened()
    register(registry, "mine", map=map_of(digits), activate=1)
    sizes = []
    for rules in (["answer: mine"], ["answer: mine", "prompt: mine +2"], ["answer when mine < 1 over prompt: none"]):
        register(registry, rules=rules, replace=True)
        sizes.append(n_bytes(registry.entry("plan").steering))
    table = n_bytes(registry.entry("mine").steering)
    assert all(table < size < table + 200 for size in sizes)
    register(registry, rules=["answer: mine", "prompt: document-memory"], replace=True)
    assert n_bytes(registry.entry("plan").steering) > 2 * table - 200


#
# in the folder
#


def test_a_plan_is_kept_and_comes_back(digits: ExpertMap, tmp_path: Path) -> None:
    registry = opened(tmp_path)
    register(registry, "mine", map=map_of(digits), activate=2, deactivate=2)
    register(registry, "words", map="mine", reverse=True, activate=3)
    texts = [
        "thinking: none",
        "answer[0:4] every 2: words",
        "answer when mine < 0.1 over last 4: mine cap=2 mode=capped",
    ]
    entry = register(registry, rules=texts)
    applied = registry.resolve("plan")
    registry.close()
    path = tmp_path / "plan.plan.json"
    read = read_plan_file(path)
    assert read.made_of == {"words": digits.sha256, "mine": digits.sha256}
    again = opened(tmp_path)
    assert again.entry("plan").to_dict() == entry | {"source": "folder"}
    assert again.resolve("plan").info == applied.info
    assert applied.bias is not None
    assert again.resolve("plan").bias.key == applied.bias.key  # type: ignore[union-attr]
    # the name of a choice that has other numbers now: the plan has its own
    register(again, "words", map="mine", activate=1, replace=True)
    assert again.resolve("plan").info == applied.info
    again.close()
    third = opened(tmp_path)
    assert third.resolve("plan").info == applied.info
    third.remove("plan")
    assert not path.exists()
    third.close()


@pytest.mark.parametrize("change", ["another map", "deleted", "a bias", "a plan"])
def test_a_plan_of_what_is_not_there_any_more(digits: ExpertMap, tmp_path: Path, change: str) -> None:
    """It steers until the end of the server, as a choice does, and is left out at the next start."""
    registry = opened(tmp_path)
    register(registry, "mine", map=map_of(digits), activate=2, deactivate=2)
    register(registry, rules=["answer: digits-words", "prompt: mine"])
    before = registry.resolve("plan").info
    if change == "deleted":
        registry.remove("mine")
    elif change == "another map":
        register(registry, "mine", map=map_of(digits, behaviour="other"), activate=2, deactivate=2, replace=True)
    elif change == "a bias":
        register(registry, "mine", bias=encoded_bias(), replace=True)
    else:
        register(registry, "mine", rules=["answer: none"], replace=True)
    assert registry.resolve("plan").info == before
    registry.close()
    again = SteeringRegistry(folder=tmp_path, writable=True)
    (warning,) = again.open(IDENTITY)
    assert warning.startswith(f"left out: {tmp_path / 'plan.plan.json'}: rule 2: ")
    assert "mine" in warning
    assert "plan" not in {entry.name for entry in again.entries()}
    # the file stays, and the name cannot be taken from whoever put it there
    assert (tmp_path / "plan.plan.json").exists()
    with pytest.raises(ApiError, match="stands in the maps folder"):
        register(again, rules=["answer: none"])
    again.close()


def test_files_that_people_write(digits: ExpertMap, tmp_path: Path) -> None:
    digits.save(tmp_path / "mine.json")
    (tmp_path / "mine.choice.json").write_text('{"activate": 4, "deactivate": 1}')
    write_bias(bias_of(WORDS), tmp_path / "bias.gguf")
    (tmp_path / "One.plan.toml").write_text(
        'rules = ["thinking: none", {phase = "answer", tokens = [0, 8], map = "mine"}]\n'
    )
    (tmp_path / "two.plan.json").write_text('{"rules": ["answer: bias", {"phase": "prompt", "map": "digits-words"}]}')
    wrong = {
        "missing.plan.toml": ('rules = ["answer: none", "answer: missing +1"]', "rule 2: "),
        "zz.plan.json": ('{"rules": ["answer: two"]}', "rule 1: two: a plan"),
        "path.plan.json": ('{"rules": ["answer: ./mine.json"]}', "rule 1: './mine.json' is no name"),
        "bad.plan.json": ('{"rules": [{"phase": "anser", "map": "mine"}]}', "rule 1: "),
        "empty.plan.toml": ("", "has no rules"),
        "no.plan.json": ("[", "not JSON"),
        "many.plan.json": (json.dumps({"rules": ["answer: none"] * 65}), "1 to 64"),
        "mine.plan.json": ('{"rules": ["answer: none"]}', "the name 'mine' is taken"),
        "two.plan.toml": ('rules = ["answer: none"]', "the name 'two' is taken"),
        "none.plan.json": ('{"rules": ["answer: none"]}', "the name 'none' is taken"),
        "digest.plan.json": ('{"rules": ["answer: none"], "made_of": {"mine": "x"}}', "made_of"),
    }
    for name, (text, _) in wrong.items():
        (tmp_path / name).write_text(text)
    registry = SteeringRegistry(folder=tmp_path, writable=True)
    warnings = registry.open(IDENTITY)
    assert len(warnings) == len(wrong), warnings
    for name, (_, words) in wrong.items():
        (told,) = (warning for warning in warnings if str(tmp_path / name) in warning)
        assert words in told
        assert "\n" not in told
    assert registry.entry("one").to_dict()["rules"] == ["thinking: none", "answer[0:8]: mine +4 -1"]
    assert registry.entry("two").to_dict()["rules"] == ["answer: bias", "prompt: digits-words +2 -4"]
    # a file of another spelling is its owner's; the other was read under its own name, as maps are
    with pytest.raises(ApiError) as caught:
        registry.remove("one")
    assert caught.value.status == 403
    with pytest.raises(ApiError) as caught:
        register(registry, "two", rules=["answer: none"], replace=True)
    assert caught.value.status == 409  # two.plan.toml stands there
    (tmp_path / "two.plan.toml").unlink()
    register(registry, "two", map="digits-words", activate=1, replace=True)
    assert not (tmp_path / "two.plan.json").exists()
    registry.close()


def test_a_plan_in_toml_is_replaced_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "mine.plan.toml"
    for change in ("replace", "delete"):
        path.write_text('rules = ["answer: digits-words"]')
        registry = opened(tmp_path)
        if change == "replace":
            register(registry, "mine", rules=["answer: none"], replace=True)
            assert [found.name for found in tmp_path.glob("m*")] == ["mine.plan.json"]
        registry.remove("mine")
        assert [found.name for found in tmp_path.glob("[!.]*")] == []
        registry.close()


@pytest.mark.parametrize("name", ["x.plan", "x.choice"])
def test_names_whose_map_would_be_a_plans_file(name: str, digits: ExpertMap, tmp_path: Path) -> None:
    registry = opened(tmp_path)
    for fields in ({"map": map_of(digits), "activate": 1}, {"rules": ["answer: none"]}):
        with pytest.raises(ApiError, match="no name for a file"):
            register(registry, name, **fields)
    registry.close()


#
# of the command line
#


def test_files_and_plans_of_the_command_line(digits: ExpertMap, tmp_path: Path) -> None:
    registry = opened()
    (tmp_path / "Start Plan.plan.toml").write_text('rules = ["answer: digits-words"]')
    name, warnings = registry.add_file(tmp_path / "Start Plan.plan.toml")
    assert (name, warnings) == ("start-plan", [])
    entry = registry.entry(name)
    assert (entry.source, entry.kind) == ("command line", "plan")
    plan = entry.steering
    assert isinstance(plan, SteeringPlan)
    assert registry.add_plan(replace(plan, name="mine")) == []
    assert registry.entry("mine").to_dict()["rules"] == ["answer: digits-words +2 -4"]
    for bad in ("Not a name", "none", "../x"):
        with pytest.raises(UsageError):
            registry.add_plan(replace(plan, name=bad))
    with pytest.raises(ChoiceError, match="rule 1: "):
        registry.add_plan(open_plan(["answer: digits-words layers=77"]))
    (tmp_path / "bad.plan.json").write_text('{"rules": ["answer: nothing"]}')
    with pytest.raises(UsageError, match=r"bad\.plan\.json: rule 1: "):
        registry.add_file(tmp_path / "bad.plan.json")
    (tmp_path / "bad.plan.json").write_text("{")
    with pytest.raises(FormatError):
        registry.add_file(tmp_path / "bad.plan.json")
    with pytest.raises(ApiError):
        registry.choose(name, {"activate": 1})


def test_no_client_sees_a_path(digits: ExpertMap, tmp_path: Path) -> None:
    folder = tmp_path / "secret"
    folder.mkdir()
    digits.save(folder / "My Map.json")
    write_bias(bias_of(WORDS), folder / "own.gguf")
    rules = [
        f"answer when '{folder / 'My Map.json'}' < 1 over prompt: tiny/digits-words",
        f"prompt: '{folder / 'My Map.json'}' +2 -0",
        f"all: '{folder / 'own.gguf'}'",
    ]
    plan = open_plan(rules, name="start")
    with running(parallel=1) as server:
        assert server.registry.add_plan(plan) == []
        told = server.chat(steering="start").json()["steering"]
        listed = server.client.get("/v1/steering").text
    expected = ["answer when my-map < 1 over prompt: digits-words +2 -4", "prompt: my-map +2", "all: own"]
    assert told["rules"] == expected
    assert told["plan_sha256"] == plan.sha256
    assert "my-map +2" in listed
    assert "secret" not in listed


def test_a_plans_file_of_the_command_line_names_its_neighbours(digits: ExpertMap, tmp_path: Path) -> None:
    other, maps = tmp_path / "other", tmp_path / "maps"
    for folder in (other, maps):
        folder.mkdir()
    digits.save(other / "near.json")
    digits.save(maps / "held.json")
    write_bias(bias_of(WORDS), maps / "ready.gguf")
    (maps / "few.choice.json").write_text('{"map": "held", "activate": 1}')
    registry = opened(maps, writable=False)
    path = other / "zz.plan.json"
    path.write_text(
        json.dumps({"rules": ["answer: near +2", "thinking: digits-words", "prompt: held +1", "all: ready"]})
    )
    assert registry.add_file(path) == ("zz", [])
    told = registry.entry("zz").to_dict()["rules"]
    assert told == ["answer: near +2", "thinking: digits-words +2 -4", "prompt: held +1", "all: ready"]
    for rule in ("answer: held", "answer: few", "answer: gone +1"):
        path.write_text(json.dumps({"rules": [rule]}))
        with pytest.raises(UsageError, match=r"zz\.plan\.json: rule 1: "):
            registry.add_file(path)
    (maps / "kept.plan.json").write_text('{"rules": ["answer: few"]}')
    registry.add_file(maps / "kept.plan.json")
    assert registry.entry("kept").to_dict()["rules"] == ["answer: few +1"], "in the maps folder as it is registered"


def test_a_plan_by_default() -> None:
    with running(steering="two", parallel=1, load=lambda load: load) as server:
        assert server.registry.default == "two"
        register(server.registry, "two", rules=RULES)
        told = server.chat().json()["steering"]
        assert (told["name"], told["rules"]) == ("two", RULES)
        assert server.chat(steering=None).json()["steering"] is None
        assert server.client.get("/v1/models").json()["data"][0]["steering"] == "two"
        assert server.client.delete("/v1/steering/two").status_code == 409
        assert post(server, name="two", rules=["answer: none"], replace=True).status_code == 409
        assert text_of(server.chat(steering="digits-words")) == "4"
