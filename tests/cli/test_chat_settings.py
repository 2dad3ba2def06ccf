"""Commands of a chat that change how answers are sampled, further names of commands, and the short reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from steermoe_local.cli import main
from steermoe_local.cli.chat.commands import ALIASES, COMMANDS
from steermoe_local.cli.chat.settings import setting_names
from steermoe_local.cli.options.sampling import sampling_parameters

ASKED = "Which number comes after three?"


def chat(*lines: str, flags: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """What a chat in pipes answers, and what it notes."""
    result = CliRunner().invoke(main, ["chat", "tiny", *flags], input="\n".join(lines))
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr.splitlines()


def test_sampling_is_set_and_shown() -> None:
    _, notes = chat(
        "/temp", "/temp 0.5", "/seed 7", "/set top_k 20", "/set n-predict 3", "/set parameter min-p 0", "/set"
    )
    assert notes[:6] == ["temp: 0.8", "temp: 0.5", "seed: 7", "top-k: 20", "predict: 3", "min-p: 0"]
    shown = dict(note.split(": ") for note in notes[6:])
    assert len(shown) == len(sampling_parameters())
    assert {"temp": "0.5", "seed": "7", "top-k": "20", "predict": "3", "min-p": "0"}.items() <= shown.items()


def test_what_is_set_holds_from_the_next_answer_on(tmp_path: Path) -> None:
    def answers(*commands: str) -> list[str]:
        file = tmp_path / "chat.json"
        chat(*commands, ASKED, f"/save {file}")
        return [m["content"] for m in json.loads(file.read_text())["messages"] if m["role"] == "assistant"]

    assert answers("/temp 0") == ["4"]
    assert answers("/temp 0", "/set max-tokens 0") != ["4"]
    hot = ("/temp 40", "/set top-k 0", "/set top-p 1", "/set min-p 0", "/set max-tokens 6")
    assert answers(*hot, "/seed 1") == answers(*hot, "/seed 1") != answers(*hot, "/seed 2")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/temp hot", "error: temp hot: 'hot' is not a valid float"),
        ("/temp -1", "error: temp -1: -1.0 is not in the range x>=0; give a value like 0.8"),
        ("/seed x", "error: seed x: 'x' is not a valid integer"),
        ("/set tmp 1", "error: /set tmp: no such setting; did you mean temp?"),
        ("/set zzz 1", "error: /set zzz: no such setting; there are "),
        ("/set top-k", "top-k: 40"),
        ("/set system Be brief.", "system prompt: Be brief."),
        ("/exi", "did you mean /exit?"),
        ("/experts some", "error: /experts some: give all for every layer, or nothing"),
    ],
)
def test_one_line_for_each_command(line: str, words: str) -> None:
    _, notes = chat(line)
    assert len(notes) == 1
    assert words in notes[0]


def test_names_of_settings_are_those_of_the_options() -> None:
    assert {"temp", "temperature", "seed", "predict", "n-predict", "max-tokens", "top-k", "min-p"} <= set(
        setting_names()
    )


@pytest.mark.parametrize("leave", ["/quit", "/exit", "/bye"])
def test_further_names_leave(leave: str) -> None:
    assert chat(leave, "/nothing") == ("", [])


def test_further_names_of_commands() -> None:
    assert set(ALIASES.values()) <= set(COMMANDS)
    assert not set(ALIASES) & set(COMMANDS)
    assert chat("/clear") == chat("/reset")
    shown = chat("/?")
    assert shown == chat("/help")
    assert "/exit" in shown[0]
    assert "/clear" in shown[0]


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()][1:]  # without the answer


def test_reports_are_short_and_whole_on_request() -> None:
    def report(command: str) -> Any:
        return rows(chat(ASKED, command, flags=("--map", "digits-words", "--temp", "0"))[0])

    for command, whole in (("/experts", "/experts all"), ("/why", "/why full")):
        short, long = report(command), report(whole)
        assert len(short) <= 8
        assert f"{whole} shows every layer" in short[-1]
        assert short[0] == long[0]
        assert not any("layer  " in line for line in short)
        assert any(line.split()[:1] == ["layer"] for line in long)
    assert report("/experts full") == report("/experts all")
    assert any("100%" in line for line in report("/experts"))
