"""Plans in a chat: what /steer takes for rules, what is said of them, and what a chat under a plan can do."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from steermoe_local import ExpertMap, SteeringPlan, UsageError, open_plan
from steermoe_local.cli.chat.commands import completions
from steermoe_local.cli.chat.maps import MapFinder
from steermoe_local.cli.chat.reports import describe
from steermoe_local.cli.chat.session import Session
from steermoe_local.maps.recommended import with_recommended
from steermoe_local.steering.plan import AnySteering
from steermoe_local.steering.steering import Steering
from tests.support.builders import table_map
from tests.support.chat_program import COUNT, TINY, WORDS_ANSWER, Start, fresh, piped, saved
from tests.support.paths import ROOT

MAPS = ROOT / "expert_maps" / "tiny"
DIGITS, MEMORY = MAPS / "digits-words.json", MAPS / "document-memory.json"
IDENTITY = ExpertMap.load(DIGITS).identity


@pytest.fixture
def finder(tmp_path: Path) -> MapFinder:
    """A folder with two maps, one of another model, and plans that name them."""
    with_recommended(ExpertMap.load(MEMORY), None).save(tmp_path / "mine.json")
    table_map([[0.5, -0.5]]).save(tmp_path / "foreign.json")
    rules = {"rules": ["thinking: none", "answer: mine +1 -1"]}
    (tmp_path / "careful.plan.json").write_text(json.dumps(rules))
    (tmp_path / "toml.plan.toml").write_text('rules = ["answer[0:4]: digits-words"]\n')
    (tmp_path / "mine.plan.json").write_text(json.dumps(rules))
    (tmp_path / "foreign-plan.plan.json").write_text(json.dumps({"rules": ["answer: foreign +1"]}))
    (tmp_path / "broken.plan.json").write_text("{")
    return MapFinder([tmp_path], IDENTITY, Path("tiny"))


def texts(steering: AnySteering) -> list[str]:
    assert isinstance(steering, SteeringPlan)
    return steering.texts


#
# what is meant
#


@pytest.mark.parametrize(
    ("typed", "rules"),
    [
        ("answer: digits-words +8 -8", ["answer: digits-words +8 -8"]),
        ("answer digits-words +8 -8", ["answer: digits-words +8 -8"]),
        ("answer[0:32] every 2 mine +1", ["answer[0:32] every 2: mine +1"]),
        ("thinking none ; answer: digits-words", ["thinking: none", "answer: digits-words"]),
        ('answer after "a; b" mine -2; prompt[-1:]: digits-words;', ['answer after "a; b": mine -2', None]),
        ("answer when mine < 0.1 over prompt mine +1", ["answer when mine < 0.1 over prompt: mine +1"]),
        ("careful", ["thinking: none", "answer: mine +1 -1"]),
        ("toml", ["answer[0:4]: digits-words"]),
    ],
)
def test_rules_and_plans_are_told_from_names(typed: str, rules: list[str | None], finder: MapFinder) -> None:
    steering, warnings = finder.open(typed)
    assert [wanted or text for wanted, text in zip(rules, texts(steering), strict=True)] == texts(steering)
    assert warnings == []


def test_a_rule_of_all_tokens_is_a_steering(finder: MapFinder) -> None:
    """Its numbers can be changed as those of a map that was named."""
    for typed in ("digits-words +8 -3", "all: digits-words +8 -3", "all digits-words +8 -3"):
        steering, _ = finder.open(typed)
        assert isinstance(steering, Steering)
        assert (steering.activate, steering.deactivate) == (8, 3)
    reversed_, _ = finder.open("digits-words reverse layers=1-2")
    assert isinstance(reversed_, Steering)
    assert (reversed_.reverse, reversed_.layers, reversed_.activate) == (True, "1-2", 2)


def test_names_come_before_rules(finder: MapFinder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map comes before a plan of its folder; a file before everything, whatever it is called."""
    mine, _ = finder.open("mine")
    assert isinstance(mine, Steering)
    assert mine.path == tmp_path / "mine.json"
    assert list(finder.names()) == ["digits-words", "document-memory", "careful", "mine", "toml"]
    monkeypatch.chdir(tmp_path)
    for name in ("answer: x.json", "answer none"):
        shutil.copy(DIGITS, name)
        named, _ = finder.open(name)
        assert isinstance(named, Steering)
    shutil.copy(DIGITS, "answer.json")
    assert isinstance(finder.open("answer.json")[0], Steering)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("answer", "answer: no such file"),
        ("answer:", "rule 1"),
        ("answer +8", "rule 1"),
        ("anser: digits-words", "rule 1"),
        ("thinking none; answer: xyzzy +1", "rule 2: xyzzy: no such file"),
        ("answer mine", "mine +N -M"),
        ("answer[3:1] mine +1", "answer[3:1]"),
        ("foreign +1 -1", "made for"),
        ("broken", "broken.plan.json"),
        ("careful +1", "steering plan"),
        ("maps/my file.json", "no such file"),
        ("C:\\maps\\x.json", "no such file"),
        ("xyzzy", "no such file"),
        ("none", "/steer off"),
    ],
)
def test_what_is_neither(typed: str, words: str, finder: MapFinder) -> None:
    with pytest.raises(Exception, match=re.escape(words)) as caught:
        finder.open(typed)
    assert type(caught.value).__module__ == "steermoe_local.errors"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a" * 3_000_000, "ab " * 1_000_000, "'" * 3_000_001, "answer" + " x" * 1_000_000])
def test_a_line_without_end_takes_its_length(text: str, finder: MapFinder) -> None:
    """CPU time: ten seconds are many times what is needed; the square of the length would take hours."""
    started = time.process_time()
    finder._is_rules(text)
    assert time.process_time() - started < 10


def test_a_map_after_a_plan_has_no_numbers_of_before(finder: MapFinder) -> None:
    plan, _ = finder.open("answer: digits-words +8 -8")
    mine, _ = finder.open("mine", plan)
    assert isinstance(mine, Steering)
    assert (mine.activate, mine.deactivate) == (0, 0)


#
# what is said and offered
#


def test_describe_a_plan() -> None:
    plan = open_plan(["thinking: none", "answer[0:8]: digits-words"])
    assert describe(plan) == "a plan of 2 rules: thinking: none; answer[0:8]: digits-words"
    assert describe(plan, on=False) == f"off; /steer on goes back to {describe(plan)}"
    assert "steers nothing" in describe(open_plan(["thinking: none"]))
    long = describe(open_plan(["answer[0:8]: digits-words +1"] * 30))
    assert len(long) < 250
    assert long.endswith("...")


class Offered(SimpleNamespace):
    """As much of a session as completion looks at."""


def test_completion_of_places_and_names(finder: MapFinder) -> None:
    session = cast("Session", Offered(maps=finder, loaded=SimpleNamespace(facts=SimpleNamespace(is_moe=True))))

    def offered(typed: str) -> list[str]:
        return [word for word in completions(session, "steer", typed) or () if word.startswith(typed)]

    assert offered("o") == ["on", "off"]
    assert offered("thi") == ["thinking: "]
    assert offered("d") == ["digits-words", "document-memory"]
    assert offered("answer: di") == ["answer: digits-words"]
    assert "answer: none" in offered("answer: ")
    assert "answer: on" not in offered("answer: ")
    assert offered("thinking: none; ans") == ["thinking: none; answer: "]
    assert offered("thinking: none; answer[0:8]: car") == ["thinking: none; answer[0:8]: careful"]
    session.loaded.facts.is_moe = False  # type: ignore[misc]
    assert offered("") == ["on", "off"]


#
# the program
#


def test_a_chat_under_a_plan(start: Start, tmp_path: Path) -> None:
    terminal = start(*TINY, "--maps", MAPS, columns=110)
    terminal.prompt()

    def command(line: str, *expected: str) -> str:
        shown = " ".join(terminal.say(line).split())
        for words in expected:
            assert words in shown, shown
        return shown

    command("/steer answer digits-words reverse", "steering: a plan of 1 rule: answer: digits-words reverse")
    command("/steer thinking none; answer digits-words reverse", "a plan of 2 rules")
    command("/steer", "rule 1: thinking: none", "rule 2: answer: digits-words reverse", "plans for")
    assert WORDS_ANSWER in terminal.say(COUNT)

    # what changes one choice is no matter of a plan
    for line in ("/strength 2", "/cap 2", "/activate 3", "/deactivate 3", "/reverse", "/layers 1-2", "/rank rd"):
        command(line, "error: a plan steers", "/steer answer: NAME +8 -8")
    command("/weights log-odds", "error: a plan steers")

    command("/experts", "The last answer:")
    command("/why", "steering changed", "suppressed")
    command("/compare on", "compare: on")
    assert re.search(r"unsteered\s+│ steered", command("Count from three to nine."))
    command("/compare off")
    command("/steer off", "steering: off; /steer on goes back to a plan of 2 rules")
    command("/steer on", "a plan of 2 rules")

    data = saved(terminal, tmp_path / "chat.json")
    assert [rule["text"] for rule in data["steering"]["rules"]] == [
        "thinking: none",
        "answer: digits-words reverse",
    ]
    command("/steer digits-words", "steering: digits-words: 2 experts promoted")
    command(f"/load {tmp_path / 'chat.json'}", "steering: a plan of 2 rules")
    command("/model tiny", "steering: a plan of 2 rules")
    command("/reset")
    assert WORDS_ANSWER in terminal.say(COUNT)
    command("/steer answer: nothing +1", "error: rule 1: nothing: no such file")
    command("/steer", "a plan of 2 rules")
    terminal.child.send("/quit\r")
    assert terminal.end() == 0


def test_switching_the_answers_steering_recomputes_no_prompt(start: Start) -> None:
    """What is said is how many tokens were computed under another steering: the answer's, and none of the prompt's."""
    terminal = start(*TINY, "--system-prompt", "Use digits. " * 20, "--steer", "answer: digits-words", columns=200)
    terminal.prompt()
    terminal.say(COUNT)
    shown = " ".join(terminal.say("/steer off").split())
    found = re.search(r"; (\d+) tokens of the chat so far are recomputed", shown)
    assert found, shown
    assert int(found[1]) < 40 < len("Use digits. " * 20) / 4, "the answer is shorter than the prompt"
    terminal.say("And from one to six.")
    kept = re.search(r"\((\d+) kept\)", terminal.say("/speed"))
    assert kept, "the prompt is still in memory"
    assert int(kept[1]) > 60


def test_a_plan_from_the_start_without_a_terminal(tmp_path: Path) -> None:
    """stdout has the answers alone; they are those of a fresh run under the plan."""
    rules = ("--steer", "thinking: none", "--steer", "answer: digits-words reverse")
    done = piped(*TINY, *rules, stdin=f"{COUNT}\n/steer thinking none\n{COUNT}\n")
    assert done.returncode == 0, done.stderr
    first = done.stdout.decode().splitlines()[0]
    assert first == fresh([{"role": "user", "content": COUNT}], *rules, folder=tmp_path)
    assert WORDS_ANSWER in first
    assert b"steering: a plan of 1 rule (steers nothing): thinking: none" in done.stderr


def test_names_of_the_maps_folders_in_rules_of_the_start(tmp_path: Path) -> None:
    shutil.copy(DIGITS, tmp_path / "own.json")
    done = piped(*TINY, "--maps", tmp_path, "--steer", "answer: own +2 -2", stdin="/steer\n")
    assert done.returncode == 0, done.stderr
    assert b"rule 1: answer: own +2 -2" in done.stderr
    done = piped(*TINY, "--maps", tmp_path, "--steer", "answer: owm +2 -2", stdin="")
    assert done.returncode == 2
    assert b"did you mean own?" in done.stderr


def test_session_choice_needs_one_steering() -> None:
    session = cast("Any", Session).__new__(Session)
    session.chat = SimpleNamespace(steering=open_plan(["answer: digits-words"]))
    with pytest.raises(UsageError, match="a plan steers"):
        _ = session.choice
