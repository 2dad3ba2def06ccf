"""--steer and --plan of the commands that steer: rules, files, names, and what is nearer than what."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import ExpertMap, FormatError, SteeringPlan, UsageError, open_plan, read_bias
from steermoe_local.cli import main
from steermoe_local.cli.options import settings
from steermoe_local.cli.options.steering import SteeringFlags
from steermoe_local.evaluation.measuring.plans import plan_name
from steermoe_local.maps.recommended import with_recommended
from steermoe_local.steering.plan_rules import RuleSpec, Where
from steermoe_local.steering.plan_text import format_rule, parse_rule, parse_where, split_rules
from tests.cli.test_run_options import DIGITS, steer_by
from tests.support.plans import places, specs

SHIPPED = "answer: digits-words"


def opened(*flags: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, str]]:
    result = steer_by(*flags, **kwargs)
    assert result.exit_code == 0, result.output
    steering, source = json.loads(result.stdout)
    return steering, source


def refused(status: int, *flags: Any, **kwargs: Any) -> str:
    result = steer_by(*flags, **kwargs)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert "unexpected" not in result.stderr
    return result.stderr


#
# rules
#


def test_rules_in_their_order(bias: Path) -> None:
    """A rule may name a shipped map, with numbers of its own or those that it recommends, a file, or a bias file."""
    flags = ("--steer", "thinking: none", "--steer", "answer[0:32]: digits-words +3 -0 layers=1-2")
    steering, source = opened(*flags, "--steer", f'answer: "{DIGITS}" reverse', "--steer", f"prompt[-1:]: {bias}")
    rules = steering["rules"]
    assert [rule["phase"] for rule in rules] == ["thinking", "answer", "answer", "prompt"]
    assert rules[0]["steering"] is None
    chosen = [{key: rule["steering"][key] for key in ("activate", "deactivate", "reverse")} for rule in rules[1:3]]
    assert chosen[0] == {"activate": 3, "deactivate": 0, "reverse": False}
    assert chosen[1] == {"activate": 2, "deactivate": 4, "reverse": True}, "what the map recommends"
    assert rules[1]["steering"]["layers"] == "1-2"
    assert rules[3]["steering"]["bias"] == str(bias)
    assert (steering["name"], steering["plan"]) == ("plan", None)
    assert source["steer"].split("; ")[0] == "thinking: none"


def test_semicolons_separate_rules(tmp_path: Path) -> None:
    """On the command line and in the configuration as in a chat; rules are numbered through."""
    steering, source = opened("--steer", 'thinking: none; answer after ";": digits-words;', "--steer", "prompt: none")
    assert [rule["phase"] for rule in steering["rules"]] == ["thinking", "answer", "prompt"]
    assert source["steer"] == 'thinking: none; answer after ";": digits-words; prompt: none'
    message = refused(2, "--steer", "thinking: none; prompt: none", "--steer", "all: none; anser: x")
    assert "rule 4 'anser: x'" in message
    (tmp_path / "config.toml").write_text('steer = "thinking: none; answer: digits-words"\n')
    steering, _ = opened(env={"STEERMOE_CONFIG": str(tmp_path / "config.toml")})
    assert [rule["phase"] for rule in steering["rules"]] == ["thinking", "answer"]


def test_a_soft_rule_has_a_strength() -> None:
    """That of --mode soft; in texts and objects."""
    by_option, _ = opened("--map", "digits-words", "--mode", "soft")
    for rule in ("digits-words mode=soft", "digits-words weights=log-odds", "digits-words mode=soft scale=3"):
        steering, _ = opened("--steer", f"answer: {rule}")
        strength = 3 if "scale" in rule else by_option["scale"]
        assert steering["rules"][0]["steering"]["scale"] == strength
    plan = open_plan([{"phase": "answer", "map": "digits-words", "mode": "soft"}])
    assert plan.steerings[0].scale == by_option["scale"]
    assert open_plan(plan.texts).sha256 == plan.sha256


def test_a_map_is_read_once_for_all_its_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    load = ExpertMap.load
    monkeypatch.setattr(ExpertMap, "load", lambda path: read.append(path) or load(path))
    plan = open_plan([f"answer[{n}:{n + 1}]: digits-words +{n + 1}" for n in range(8)])
    assert len(read) == 1
    assert plan.expert_map is plan.steerings[0].expert_map


@pytest.mark.parametrize(
    ("rules", "status", "words"),
    [
        (["answer formal +8"], 2, ["rule 1", "answer formal +8", "colon"]),
        (["thinking: none", "anser: digits-words"], 2, ["rule 2", "'anser'", "thinking, answer"]),
        (["answer[8:2]: digits-words"], 2, ["rule 1", "answer[8:2]"]),
        (["answer: digits-words +8 -x"], 2, ["rule 1", "'-x'"]),
        (["answer: digits-words mode=firm"], 2, ["rule 1", "firm"]),
        (["answer: digits-words weights=x"], 2, ["rule 1", "weights", "'x'", "log-odds"]),
        (["answer: none", "all: digits-words rank=effect"], 2, ["rule 2", "rank effect"]),
        (["answer: digits-words preset=faithful"], 2, ["rule 1", "+N and -N"]),
        (["answer when entropy >= 2: digits-words"], 2, ["rule 1", ">=", "write < or >"]),
        (["answer when entropy <=2: digits-words"], 2, ["rule 1", "<=", "write < or >"]),
        (["answer when confidence > 2: digits-words"], 2, ["rule 1", "'confidence'", "entropy and margin", "over"]),
        (["answer: digits-words +0 -0"], 2, ["rule 1", "digits-words", "+N"]),
        (["answer: digits-words preset=safe +8"], 2, ["rule 1", "preset safe", "activate"]),
        (["prompt: none", "answer: digit-words"], 2, ["rule 2", "digit-words", "digits-words, document-memory"]),
        (["answer: missing.json +1"], 1, ["rule 1", "missing.json"]),
        (["answer: BIAS +1"], 2, ["rule 1", "words", "bias file"]),
        (["answer when BIAS < 0 over prompt: digits-words"], 2, ["rule 1", "bias file", "expert map"]),
        (["answer when digits-words by effect < 0 over prompt: digits-words"], 2, ["rule 1", "effect"]),
        ([f"answer: {'x' * 300} +1"], 2, ["rule 1", "x" * 300]),
        (["answer: 'a b' +1"], 2, ["rule 1", "a b"]),
        ([""], 2, ["rule 1", "name of a map"]),
        (["prompt: none"] * 65, 2, ["64 rules", "65"]),
    ],
)
def test_bad_rules_are_named(rules: list[str], status: int, words: list[str], bias: Path) -> None:
    flags = [flag for rule in rules for flag in ("--steer", rule.replace("BIAS", str(bias)))]
    message = refused(status, *flags)
    assert all(word in message for word in words), message


def test_a_map_of_a_users_own_needs_numbers(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    with_recommended(ExpertMap.load(DIGITS), None).save(own)
    message = refused(2, "--steer", f"answer: {own}")
    assert "rule 1" in message
    assert f"{own} +N -M" in message
    steering, _ = opened("--steer", f"answer: {own} -5")
    assert (steering["rules"][0]["steering"]["activate"], steering["rules"][0]["steering"]["deactivate"]) == (0, 5)


def test_the_maps_have_to_be_the_models(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.json"
    text = DIGITS.read_text("utf-8").replace(ExpertMap.load(DIGITS).identity.router_sha256, "1" * 64)
    foreign.write_text(text, "utf-8")
    for rule in (f"answer: {foreign} +1", f"answer when {foreign} < 0.1 over prompt: digits-words"):
        assert "made for olmoe" in refused(1, "--steer", rule)
        forced = steer_by("--steer", rule, "--force")
        assert forced.exit_code == 0
        assert "made for olmoe" in forced.stderr


#
# files
#


def test_a_file_of_rules(tmp_path: Path) -> None:
    """JSON and TOML; names are looked for beside the file first, whatever the current folder is."""
    (tmp_path / "own.json").write_bytes(DIGITS.read_bytes())
    rules = ["thinking: none", {"phase": "answer", "tokens": [0, 8], "map": "own", "deactivate": 2}]
    made = tmp_path / "careful.plan.json"
    made.write_text(json.dumps({"rules": rules}))
    toml = tmp_path / "careful.plan.toml"
    toml.write_text('rules = ["thinking: none", {phase = "answer", tokens = [0, 8], map = "own", deactivate = 2}]\n')
    both = [opened("--plan", path) for path in (made, toml)]
    assert both[0][1] == {"plan": str(made)}
    assert [steering["name"] for steering, _ in both] == ["careful", "careful"]
    assert both[0][0]["rules"] == both[1][0]["rules"]
    assert both[0][0]["rules"][1]["steering"]["map"] == str(tmp_path / "own.json")
    assert plan_name(Path("a/careful.plan.toml")) == "careful"
    assert plan_name(Path("rules.json")) == "rules"


def test_a_plans_own_file_reads_back(tmp_path: Path) -> None:
    plan = open_plan(["answer[0:8] after 'x; y' every 2: digits-words +1 -2 mode=capped cap=inf", "thinking: none"])
    path = tmp_path / "again.plan.json"
    path.write_text(json.dumps(plan.to_json()))
    assert open_plan(path).texts == plan.texts
    assert open_plan(path).sha256 == plan.sha256


def test_a_file_that_a_server_wrote(tmp_path: Path, bias: Path) -> None:
    """It holds what its names stood for, and is refused when they stand for something else."""
    (tmp_path / "own.json").write_bytes(DIGITS.read_bytes())
    (tmp_path / "words.gguf").write_bytes(bias.read_bytes())
    path = tmp_path / "kept.plan.json"
    made_of = {"own": ExpertMap.load(DIGITS).sha256, "words": read_bias(bias).key}
    rules = ["answer: own +1 -1", "prompt: words"]
    path.write_text(json.dumps({"rules": rules, "made_of": made_of}))
    assert opened("--plan", path)[0]["name"] == "kept"
    for name in made_of:
        path.write_text(json.dumps({"rules": rules, "made_of": made_of | {name: "0" * 64}}))
        message = refused(1, "--plan", path)
        assert f"{name} is not what the plan was made of" in message


HOSTILE: dict[str, str | bytes] = {
    "empty": "",
    "a number": "1",
    "a list": '["answer: digits-words"]',
    "no rules": '{"rules": []}',
    "other fields": '{"rules": ["answer: digits-words"], "name": "x"}',
    "deep": '{"rules": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a deep rule": '{"rules": [{"phase": "answer", "map": "digits-words", "when": '
    + '{"when": ' * 900
    + "1"
    + "}" * 902,
    "huge number": '{"rules": [{"phase": "answer", "tokens": [0, 1' + "0" * 400 + '], "map": "digits-words"}]}',
    "not a number": '{"rules": [{"phase": "answer", "map": "digits-words", "strength": NaN}]}',
    "endless": '{"rules": [{"phase": "answer", "map": "digits-words", "scale": 1e999}]}',
    "half a pair": '{"rules": [{"phase": "answer", "after": "\\ud800", "map": "digits-words"}]}',
    "a name with half a pair": '{"rules": [{"phase": "answer", "map": "\\ud800"}]}',
    "a name with NUL": '{"rules": [{"phase": "answer", "map": "a\\u0000b"}]}',
    "a text with NUL": '{"rules": ["answer: \'a\\u0000b\'"]}',
    "a rule of another type": '{"rules": [7]}',
    "a field of another type": '{"rules": [{"phase": "answer", "map": ["digits-words"]}]}',
    "an escape": '{"rules": ["\\u001b[2Janswer: digits-words"]}',
    "not UTF-8": b'{"rules": ["\xff"]}',
    "too large": '{"rules": ["' + " " * 300_000 + '"]}',
    "a long rule": '{"rules": ["answer: ' + "x" * 5000 + '"]}',
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_hostile_files(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad.plan.{suffix}"
    text = HOSTILE[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(1, "--plan", path)
    assert str(path) in message or "rule 1" in message
    assert len(message) < 4000
    assert "\x1b" not in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe.plan.json"
    os.mkfifo(path)
    assert str(path) in refused(1, "--plan", path)
    assert str(tmp_path) in refused(1, "--plan", tmp_path)
    for name in (path, tmp_path, "/dev/zero"):
        message = refused(1, "--steer", f"answer: {name} +1")
        assert "rule 1" in message
        assert str(name) in message


def test_a_plan_where_another_file_belongs(tmp_path: Path, bias: Path) -> None:
    path = tmp_path / "careful.plan.json"
    path.write_text(json.dumps({"rules": ["answer: digits-words"]}))
    toml = tmp_path / "careful.plan.toml"
    toml.write_text('# brief\nrules = ["answer: digits-words"]\n')
    for plan in (path, toml):
        assert "this is a steering plan" in refused(1, "--map", plan, "--activate", 1)
        assert "this is a steering plan" in refused(1, "--bias", plan)
    assert "this is an expert map" in refused(1, "--plan", DIGITS)
    assert "this is a bias file" in refused(1, "--plan", bias)
    assert "steering plan" in refused(1, "--steer", f"answer: {path} +1"), "a plan holds no plans"


#
# what is nearer
#


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steer", SHIPPED, "--map", "digits-words"], "--map and --steer both steer"),
        (["--steer", SHIPPED, "--bias", "b.gguf"], "--bias and --steer both steer"),
        (["--plan", "p.json", "--map", "digits-words"], "--map and --plan both steer"),
        (["--plan", "p.json", "--steer", SHIPPED], "--plan and --steer both steer"),
        (["--steer", SHIPPED, "--activate", "3"], "--activate: each rule of a plan"),
        (["--plan", "p.json", "--cap", "3"], "--cap: each rule of a plan"),
        (["--steer", SHIPPED, "--reverse"], "--reverse: each rule of a plan"),
    ],
)
def test_what_makes_no_sense_together(flags: list[str], words: str) -> None:
    assert words in refused(2, *flags)


def test_the_environment_and_the_configuration(tmp_path: Path, bias: Path) -> None:
    config = tmp_path / "config.toml"
    configured = {"STEERMOE_CONFIG": str(config)}
    config.write_text('steer = ["thinking: none", "answer: digits-words reverse"]\n')
    steering, source = opened(env=configured)
    assert [rule["text"] for rule in steering["rules"]] == ["thinking: none", "answer: digits-words reverse"]
    assert source == {"steer": "thinking: none; answer: digits-words reverse"}
    # semicolons separate the rules of a variable, but not inside of quotes
    rules = 'answer after ";": digits-words ; thinking: none'
    for name in ("STEERMOE_STEER", "STEERMOE_STEER_STEER"):
        steering, _ = opened(env={name: rules})
        assert [rule["phase"] for rule in steering["rules"]] == ["answer", "thinking"]
        assert steering["rules"][0]["after"] == ";"
    # what is said wins, whatever stands elsewhere, also if that is wrong
    config.write_text('steer = ["anser: x"]\nplan = "missing.json"\n')
    assert opened("--map", "digits-words", env=configured)[1] == {"map": "digits-words"}
    assert opened("--steer", SHIPPED, env={"STEERMOE_BIAS": str(bias)})[1] == {"steer": SHIPPED}
    assert opened(env=configured | {"STEERMOE_BIAS": str(bias)})[1] == {"bias": str(bias)}
    assert "--steer: rule 1 'anser: x'" in (message := refused(2, env=configured))
    assert str(config) in message
    message = refused(2, env={"STEERMOE_STEER": "thinking: none; anser: x"})
    assert "rule 2 'anser: x'" in message
    assert "STEERMOE_STEER" in message
    config.write_text('plan = "missing.json"\n')
    assert "missing.json" in refused(1, env=configured)
    assert opened("--steer", SHIPPED, env=configured)[1] == {"steer": SHIPPED}
    # of the same place the map comes first, as it does before a bias file
    config.write_text(f'map = "digits-words"\nsteer = ["{SHIPPED}"]\n')
    assert opened(env=configured)[1] == {"map": "digits-words"}
    assert opened("--activate", 1, env=configured)[1] == {"map": "digits-words"}


def test_config_shows_and_sets_rules(tmp_path: Path) -> None:
    env = {"STEERMOE_CONFIG": str(tmp_path / "config.toml")}

    def config(*words: str, **more: str) -> Result:
        done = CliRunner().invoke(main, ["config", *words], env=env | more)
        assert done.exit_code == 0, done.output
        return done

    config("set", "steer", '["thinking: none", "answer: digits-words"]')
    config("set", "chat.steer", "answer: digits-words +1")
    config("set", "plan", "my.plan.json")
    shown = json.loads(config("show", "--json", "run").stdout)["settings"]
    by_name = {setting["option"]: setting for setting in shown}
    assert by_name["steer"]["value"] == ["thinking: none", "answer: digits-words"]
    assert (by_name["plan"]["value"], by_name["plan"]["source"]) == ("my.plan.json", "file")
    assert "answer: digits-words +1" in config("show", "chat").stdout
    shown = json.loads(config("show", "--json", "run", STEERMOE_STEER="answer: a; thinking: none").stdout)["settings"]
    assert next(s["value"] for s in shown if s["option"] == "steer") == ["answer: a", "thinking: none"]
    assert "steer" in config("show", "run", "--steer", "answer: x").stdout
    # `attribute` has another --steer, which the key of all commands is not for
    shown = json.loads(config("show", "--json", "attribute").stdout)["settings"]
    assert next(s["value"] for s in shown if s["option"] == "steer") == "answer"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("run.steer", "anser: x", "run.steer: rule 1 'anser: x'"),
        ("steer", '["thinking: none; prompt: none", "anser: x"]', "steer: rule 3 'anser: x'"),
        ("sweep.where", "answr", "sweep.where: where 'answr'"),
    ],
)
def test_config_refuses_rules_that_are_none(key: str, value: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    done = CliRunner().invoke(main, ["config", "set", key, value], env={"STEERMOE_CONFIG": str(path)})
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert not path.exists()


def test_who_has_the_options() -> None:
    """Commands that choose experts themselves can say where alone, and those that make maps or biases have neither."""
    has = {
        name: {" ".join(path) for path, command in settings.commands(main) if name in settings.options(command)}
        for name in ("steer", "plan", "where")
    }
    assert has["plan"] == has["steer"] - {"attribute"}
    assert has["plan"] == {"run", "chat", "serve", "eval", "experiment", "sweep", "trace", "transfer", "tune"}
    assert has["where"] == {"sweep", "tune", "audit"}


@pytest.mark.parametrize("where", ["answr", "answer[4:2]", "answer: digits-words", "", "prompt when entropy > 1"])
def test_a_place_that_is_none(where: str, tmp_path: Path) -> None:
    words = ["sweep", "-m", "tiny", "--map", "digits-words", "--activate", "1", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*words, "--where", where])
    assert done.exit_code == 2, done.output
    assert "'--where'" in done.stderr
    assert not (tmp_path / "out").exists()


#
# without the command line
#


def test_flags_name_one_map() -> None:
    def named(*rules: str) -> str | None:
        return SteeringFlags(steer=rules, given=frozenset({"steer"})).map_name

    assert named("answer: digits-words", "thinking: none") == "digits-words"
    assert named("answer: digits-words +1", "prompt: digits-words +2") == "digits-words"
    assert named("answer: digits-words", "prompt: document-memory") is None
    assert SteeringFlags(map_file="digits-words").map_name == "digits-words"


def test_the_python_interface(tmp_path: Path) -> None:
    plan = open_plan(["answer: digits-words"], name="mine")
    assert isinstance(plan, SteeringPlan)
    assert (plan.name, plan.path) == ("mine", None)
    with pytest.raises(FormatError, match="missing"):
        open_plan(tmp_path / "missing.plan.json")
    rules = ["thinking: none", {"phase": "answer", "map": "digits-words", "activate": 1}]
    assert open_plan({"rules": rules}).texts == open_plan(rules).texts
    assert open_plan(open_plan(rules).to_json()).sha256 == open_plan(rules).sha256
    for wrong in ({"rules": []}, {"rules": "answer: none"}, {}, {"phase": "answer", "map": None}, {"rules": 5}):
        with pytest.raises(UsageError):
            open_plan(wrong)
    with pytest.raises(UsageError, match=r"answer: digits-words: no such file; give rules as a list"):
        open_plan("answer: digits-words")
    odd = tmp_path / "a: b.json"
    odd.write_text('{"rules": ["answer: none"]}')
    assert open_plan(str(odd)).texts == ["answer: none"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\"';"), min_size=1), max_size=5))
def test_lines_are_split_at_semicolons(parts: list[str]) -> None:
    assert split_rules(";".join(parts)) == [part.strip() for part in parts if part.strip()]


@given(st.lists(specs(), min_size=1, max_size=4))
def test_rules_of_one_line_are_told_apart(rules: list[RuleSpec]) -> None:
    """Whatever names and texts have in them: as the rules are written, semicolons between them separate them."""
    texts = [format_rule(rule) for rule in rules]
    assert split_rules("; ".join(texts)) == texts


@given(places())
def test_a_place_alone_reads_as_that_of_a_rule(where: Where) -> None:
    text = format_rule(RuleSpec(where, None))
    assert parse_where(text.rpartition(":")[0]) == where
    assert parse_rule(text.rpartition(":")[0] + " none", colon=False) == RuleSpec(where, None)


@given(st.text(st.sampled_from("ab;\"'\\ "), max_size=30))
def test_what_is_quoted_stays_together(text: str) -> None:
    """Nothing gets lost but semicolons outside of quotes, and blanks around them."""
    parts = split_rules(text)
    joined = "".join(parts).replace(" ", "")
    kept = text.replace(" ", "")
    assert joined.replace(";", "") == kept.replace(";", "")
    assert split_rules(json.dumps(text)) == [json.dumps(text)]
