"""The parts of `steermoe chat` that need no model: text on a screen, lines that are typed, names of maps."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from rich.cells import cell_len
from rich.console import Console

from steermoe_local import ExpertMap, UsageError
from steermoe_local._util.visible import harmless
from steermoe_local.cli.chat.lines import is_unfinished, joined
from steermoe_local.cli.chat.maps import MapFinder
from steermoe_local.cli.chat.printer import Printer
from steermoe_local.cli.chat.prompt import CommandCompleter, open_history
from steermoe_local.cli.chat.reports import describe, experts_report, why_report
from steermoe_local.cli.chat.screen import PlainScreen, TerminalScreen, speed
from steermoe_local.cli.chat.terminal_state import one_interrupt
from steermoe_local.cli.chat.text import WordWrap
from steermoe_local.cli.streams import TextConsole
from steermoe_local.generation.answer_routing import answer_routing, why
from steermoe_local.generation.chat import Part
from steermoe_local.generation.engine import FinishEvent
from steermoe_local.maps.recommended import with_recommended
from steermoe_local.steering.steering import Steering
from tests.support.builders import identity, table_map
from tests.support.paths import ROOT
from tests.support.random_effects import effects

MAPS = ROOT / "expert_maps" / "tiny"
DONE = FinishEvent("stop", 12, 8, 5, 0.01, 0.5, 1, None, n_rows=6)


#
# text
#


@given(st.text(), st.integers(1, 30), st.integers(1, 7))
def test_wrapping_changes_blanks_only(text: str, width: int, size: int) -> None:
    text = text.replace("\t", " ")
    wrap = WordWrap(lambda: width)
    pieces = [wrap.feed(text[i : i + size]) for i in range(0, len(text), size)]
    out = "".join(pieces) + wrap.end()
    assert "".join(out.split()) == "".join(text.split())
    assert out.count("\n") >= text.count("\n")
    whole = WordWrap(lambda: width)
    assert out == whole.feed(text) + whole.end(), "it does not matter how the text comes"


@given(st.lists(st.text("abcxyz", min_size=1, max_size=9), min_size=1), st.integers(9, 40))
def test_lines_are_as_full_as_they_can_be(words: list[str], width: int) -> None:
    wrap = WordWrap(lambda: width)
    lines = (wrap.feed(" ".join(words)) + wrap.end()).split("\n")
    assert [word for line in lines for word in line.split()] == words
    assert all(cell_len(line) <= width for line in lines)
    for line, after in itertools.pairwise(lines):
        assert len(line) + 1 + len(after.split()[0]) > width, "a word that would have fitted"


def test_code_is_not_wrapped() -> None:
    code = "```py\nthis line of code is longer than ten\n```\n"
    wrap = WordWrap(lambda: 10)
    assert wrap.feed(code) == code
    assert wrap.feed("some words behind it") + wrap.end() == "some words\nbehind it"


def test_wide_characters_break_anywhere() -> None:
    wrap = WordWrap(lambda: 5)
    assert wrap.feed("漢字漢字") + wrap.end() == "漢字\n漢字"


@pytest.mark.parametrize("text", ["aa 👨‍👩‍👧‍👦👨‍👩‍👧‍👦 b", "שלום\u200f!", "👨\u200d b"])
def test_signs_stay_together_in_an_answer_that_comes_in_pieces(text: str) -> None:
    """Nor is a line broken in the middle of a family."""
    for width in (3, 5, 40):
        out = io.StringIO()
        printer = Printer(TextConsole(file=out, force_terminal=True, width=width, color_system=None), True)
        for character in text:
            printer.add("answer", character)
        printer.end()
        parts = out.getvalue().replace("\n", " ").split()
        assert "".join(parts) == text.replace(" ", "")
        assert out.getvalue().count("👨‍👩‍👧‍👦") == text.count("👨‍👩‍👧‍👦")


def test_a_model_cannot_command_the_terminal() -> None:
    assert harmless("a\x1b[31mb\x07c\x9b1md\re\r\nf\tg\x00") == "a?[31mb?c?1md?e\nf\tg?"
    assert harmless("\u202eabc") == "?abc"
    assert harmless("schön 漢字 👍🏽\n") == "schön 漢字 👍🏽\n"


#
# answers
#


def terminal_screen(columns: int = 100, rows: int = 20, **kwargs: Any) -> tuple[TerminalScreen, Callable[[], str]]:
    """A screen, and what a terminal shows of it."""
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, width=columns, height=rows, highlight=False, color_system="standard"
    )
    screen = TerminalScreen(console=console, **kwargs)

    def shown() -> str:
        seen = pyte.HistoryScreen(columns, rows, history=1000)
        pyte.Stream(seen).feed(out.getvalue().replace("\n", "\r\n"))
        above = ["".join(line[x].data for x in range(columns)) for line in seen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *seen.display]).rstrip("\n")

    return screen, shown


def stream(*items: Any) -> Generator[Any]:
    yield from items


def test_reasoning_stands_before_the_answer() -> None:
    parts = (
        Part("reasoning", "\nLet me "),
        Part("reasoning", "see.\n"),
        Part("answer", "\n\nFo"),
        Part("answer", "ur."),
    )
    screen, shown = terminal_screen()
    assert screen.answer(stream(*parts, DONE)) is DONE
    assert shown() == "Let me see.\n\nFour."
    screen, shown = terminal_screen(show_reasoning=False)
    screen.answer(stream(*parts, DONE))
    assert shown() == "Four."


def test_answers_cannot_command_the_terminal() -> None:
    evil = Part("answer", "a\x1b]0;title\x07\x1b[2Jb")
    screen, shown = terminal_screen()
    screen.answer(stream(evil, DONE))
    screen.compare(stream(("unsteered", evil), ("steered", evil)))
    screen.note("n\x1b[2Jn\nerror: forged")
    screen.note("two\nlines", lines=True)
    screen.error("e\x1b[2Je\nsteering: forged")
    assert shown().count("a?]0;title??[2Jb") == 3
    assert "n\u241b[2Jn\u240aerror: forged" in shown()
    assert "two\nlines\n" in shown()
    assert "error: e\u241b[2Je\u240asteering: forged" in shown()


def test_plain_answers(capsys: pytest.CaptureFixture[str]) -> None:
    parts = (Part("reasoning", "Hm.\n"), Part("answer", "\nFo"), Part("answer", "ur."))
    assert PlainScreen().answer(stream(*parts, DONE)) is DONE
    assert PlainScreen(show_reasoning=True).answer(stream(*parts)) is None
    sides = (("steered", Part("answer", "b")), ("unsteered", Part("answer", "a")), ("unsteered", DONE))
    assert PlainScreen().compare(stream(*sides)) == {"unsteered": DONE}
    captured = capsys.readouterr()
    assert captured.out == "Four.\nHm.\n\n\nFour.\nunsteered:\na\nsteered:\nb\n"
    PlainScreen().note("a note")
    PlainScreen().error("a mistake")
    assert capsys.readouterr().err == "a note\nerror: a mistake\n"


@given(
    st.lists(st.tuples(st.sampled_from(["unsteered", "steered"]), st.text("ab cd\n", max_size=12)), max_size=40),
    st.integers(80, 100),
    st.integers(4, 12),
)
def test_columns_show_both_answers_whole(items: list[tuple[Any, str]], columns: int, rows: int) -> None:
    """However the pieces of the two answers come, and however small the screen is, nothing is lost or repeated."""
    screen, shown = terminal_screen(columns, rows)
    ends = screen.compare(stream(*((s, Part("answer", t)) for s, t in items), ("unsteered", DONE), ("steered", DONE)))
    assert ends == {"unsteered": DONE, "steered": DONE}
    out = [line.split("│") for line in shown().splitlines()]
    assert [part.strip() for part in out[0]] == ["unsteered", "steered"]
    for index, side in enumerate(("unsteered", "steered")):
        text = "".join(t for s, t in items if s == side)
        assert "".join("".join(row[index] for row in out[1:] if len(row) > index).split()) == "".join(text.split())


def test_columns_of_reasoning_and_an_interrupt() -> None:
    def interrupted() -> Generator[Any]:
        yield "unsteered", Part("reasoning", "Hm. ")
        yield "steered", Part("answer", "one two")
        yield "unsteered", Part("answer", "three")
        raise KeyboardInterrupt

    screen, shown = terminal_screen(80)
    assert screen.compare(interrupted()) == {}
    rows = [[part.strip() for part in row.split("│")] for row in shown().splitlines()]
    assert rows == [["unsteered", "steered"], ["Hm.", "one two"], ["", ""], ["three", ""]]


def test_speed() -> None:
    assert speed(DONE) == "12 prompt tokens (8 kept), 400.0 t/s; 5 tokens, 10.0 t/s"
    assert speed(FinishEvent("stop", 1, 0, 0, 0.0, 0.0, 1, None)) == "1 prompt token; 0 tokens"


#
# steering in words
#


def test_describe() -> None:
    steering = Steering.open(map_file=MAPS / "digits-words.json", activate=4, deactivate=4)
    assert describe(None) == "off; no map or bias file is chosen"
    built = steering.build()
    assert built is not None
    counts = f"{built.n_active} experts promoted, {built.n_inactive} suppressed"
    assert describe(steering) == f"digits-words: {counts}, towards digits, hard rule, all layers"
    changed = steering.changed(scale=1.5, layers="1-2", reverse=True)
    assert "towards words, soft rule, strength 1.5, layers 1-2" in describe(changed)
    assert describe(steering, on=False).startswith("off; /steer on goes back to digits-words")
    assert "/activate N promotes" in describe(steering.changed(activate=0, deactivate=0))


def test_reports_of_an_answer() -> None:
    expert_map = table_map([[0.5, -0.5, 0.25, -0.25]], k=2)
    counts = np.array([[3, 1, 2, 2]])
    signs = np.array([[1, -1, 0, 0]], np.int8)
    console = Console(file=io.StringIO(), width=60, record=True)
    steering = Steering("name", expert_map=expert_map, activate=1, deactivate=1)
    console.print(*experts_report(answer_routing(counts, 2, signs, expert_map), steering), sep="\n")
    console.print(*why_report(why(np.array([[1, 3, 2, 2]]), counts, 2, signs)), sep="\n")
    text = " ".join(console.export_text().split())
    assert "The last answer: 4 tokens, each through 2 experts in 1 layer." in text
    assert "Promoted experts (+) took 38% of the routing, suppressed ones (-) 12%." in text
    assert "0 +0: 75% +0.50 -1: 25% -0.50 2: 50% +0.25 3: 50% -0.25" in text
    assert "steering changed 2 of 8 choices of an expert (25%)" in text
    assert "Promoted: 1 expert, 12.5% of the choices unsteered, 37.5% steered: 2 forced in." in text
    assert "Suppressed: 1 expert, 37.5% of the choices unsteered, 12.5% steered: 2 suppressed." in text
    assert "0 1 > 3 3 > 1 2" in text


def test_experts_are_reported_with_their_effects() -> None:
    rows = {"layer": 0, "expert": 0, "action": "promote", "effect": 0.25}, {
        "layer": 0, "expert": 2, "action": "promote", "effect": -0.5,
    }, {"layer": 0, "expert": 2, "action": "suppress", "effect": 0.125}  # fmt: skip
    expert_map = table_map([[0.5, -0.5, 0.25, -0.25]], k=2, effects=effects(*rows))
    console = Console(file=io.StringIO(), width=120, record=True)
    routing = answer_routing(np.array([[3, 1, 2, 2]]), 2, np.array([[1, -1, 0, 0]], np.int8), expert_map)
    console.print(*experts_report(routing, Steering("name", expert_map=expert_map, activate=1, deactivate=1)), sep="\n")
    text = " ".join(console.export_text().split())
    assert "share of the tokens, RD (effect of promoting / suppressing it, nats a token)" in text
    assert "0 +0: 75% +0.50 (+0.25/?) -1: 25% -0.50 2: 50% +0.25 (-0.50/+0.12) 3: 50% -0.25" in text
    assert [(use.promote, use.suppress) for use in routing.layers[0].experts] == [
        (0.25, None), (-0.5, 0.125), (None, None), (None, None),
    ]  # fmt: skip


def test_a_maps_sides_stay_in_their_line() -> None:
    expert_map = replace(table_map([[0.5, -0.5, 0.25, -0.25]], k=2), positive="p\nerror: forged\u200b")
    signs = np.array([[1, -1, 0, 0]], np.int8)
    console = Console(file=io.StringIO(), width=300, record=True)
    routing = replace(answer_routing(np.array([[3, 1, 2, 2]]), 2, signs, expert_map), position=0.5)
    console.print(*experts_report(routing, Steering("name", expert_map=expert_map, activate=1, deactivate=1)), sep="\n")
    text = console.export_text()
    assert "p\u240aerror: forged\ufffd" in text, text


def test_maps_are_found_by_name_and_offered_if_they_fit(tmp_path: Path) -> None:
    tiny = ExpertMap.load(MAPS / "digits-words.json").identity
    with_recommended(ExpertMap.load(MAPS / "document-memory.json"), None).save(tmp_path / "mine.json")
    shutil.copy(MAPS / "document-memory.json", tmp_path / "told.json")
    (tmp_path / "broken.json").write_text("{")
    table_map([[0.5, -0.5]]).save(tmp_path / "foreign.json")
    (tmp_path / "notes.txt").write_text("no map")
    finder = MapFinder([tmp_path], tiny, Path("tiny"))
    assert list(finder.names()) == ["digits-words", "document-memory", "mine", "told"]

    def opened(*wanted: Any) -> Steering:
        steering, warnings = finder.open(*wanted)
        assert isinstance(steering, Steering)
        assert warnings == []
        return steering

    shipped = opened("digits-words")
    assert (shipped.activate, shipped.deactivate) == (2, 4), "the choice that it recommends"
    told = opened("told")
    assert (told.activate, told.deactivate) == (4, 4)
    mine = opened("mine")
    assert (mine.activate, mine.deactivate) == (0, 0)
    kept = opened("mine", shipped.changed(activate=7, layers="1-3", scale=2.0))
    assert (kept.activate, kept.deactivate, kept.layers, kept.scale) == (7, 4, "1-3", 2.0)
    assert opened(str(tmp_path / "mine.json")).path == tmp_path / "mine.json"
    with pytest.raises(UsageError, match="mean mine"):
        finder.open("mines")
    with pytest.raises(UsageError, match="give the path"):
        finder.open("xyzzy")
    assert MapFinder([], identity(), Path("other")).names() == {}


#
# what is typed
#


@pytest.mark.parametrize(
    ("text", "unfinished", "message"),
    [
        ("hello", False, "hello"),
        ("hello\\", True, None),
        ("hello\\\nthere", False, "hello\nthere"),
        ('"""', True, None),
        ('"""one', True, None),
        ('"""one\ntwo\\', True, None),
        ('"""one\ntwo"""', False, "one\ntwo"),
        ('"""\none\n\ntwo\n"""', False, "one\n\ntwo"),
        ('""""""', False, ""),
        ('a """ b', False, 'a """ b'),
        ("  padded  ", False, "padded"),
    ],
)
def test_messages_of_several_lines(text: str, unfinished: bool, message: str | None) -> None:
    assert is_unfinished(text) is unfinished
    if message is not None:
        assert joined(text) == message


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chat.json").touch()
    words = {"steer": ["on", "off", "digits-words"], "reset": [], "save": None}
    completer = CommandCompleter(dict.fromkeys(words, "what it does"), lambda name, typed: words.get(name))

    def offered(text: str) -> list[str]:
        completions = completer.get_completions(Document(text), CompleteEvent())
        return [text[: len(text) + c.start_position] + c.text for c in completions]

    assert offered("/s") == ["/steer", "/save"]
    assert offered("/steer o") == ["/steer on", "/steer off"]
    assert offered("/steer on") == []
    assert offered("/save ch") == ["/save chat.json"]
    assert offered("hello /s") == []
    assert offered("//s") == []
    assert offered("/reset ch") == []


def test_a_history_that_cannot_be_kept(tmp_path: Path) -> None:
    warnings: list[str] = []
    (tmp_path / "file").touch()
    assert isinstance(open_history(tmp_path / "file" / "x", warnings.append), InMemoryHistory)
    assert "no history" in warnings[0]
    kept = open_history(tmp_path / "state" / "history", warnings.append)
    kept.append_string("one\udc80")
    (tmp_path / "state" / "history").unlink()
    (tmp_path / "state").rmdir()
    kept.append_string("two")  # the folder is gone: no reason to end the chat
    assert len(warnings) == 1


def test_only_the_first_ctrl_c_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    cleaned: list[bool] = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            cleaned.append(True)

    with pytest.raises(KeyboardInterrupt), one_interrupt():
        work()
    assert cleaned
    assert signal.getsignal(signal.SIGINT) is before
