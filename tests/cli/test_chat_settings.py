"""Commands of a chat that change how answers are sampled, further names of commands, and the short reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from steermoe_local import ExpertMap
from steermoe_local.cli import main
from steermoe_local.cli.chat.commands import ALIASES, COMMANDS
from steermoe_local.cli.chat.settings import setting_names
from steermoe_local.cli.options.sampling import sampling_parameters
from steermoe_local.maps.recommended import Recommended, with_recommended
from steermoe_local.models.shipped_maps import map_path

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


def test_fitted_values_in_a_chat(tmp_path: Path) -> None:
    own, file = tmp_path / "own.json", tmp_path / "chat.json"
    bare = ExpertMap.load(map_path("digits-words"))
    with_recommended(bare, Recommended({}, values=((0, 1, 2.0), (2, 3, -1.0)))).save(own)
    _, notes = chat(
        f"/steer {own}", "/strength 2", "/reverse", "/rank log-odds", "/strength hard", "/layers 1", f"/save {file}",
        "/activate 2", "/steer document-memory", flags=("--temp", "0"),
    )  # fmt: skip
    assert (
        "1 expert promoted, 1 suppressed, towards digits, fitted values of 2 experts, soft rule, strength 1" in notes[0]
    )
    assert "strength 2" in notes[1]
    assert "towards words, fitted values of 2 experts" in notes[2]
    assert all(note.startswith("error: ") and "give numbers of experts" in note for note in notes[3:6])
    assert "2 experts promoted, 0 suppressed, towards words, hard rule" in notes[7]
    _, notes = chat(f"/load {file}")
    assert any("towards words, fitted values of 2 experts, soft rule, strength 2" in note for note in notes)
    _, notes = chat(f"/steer {own}", "/steer document-memory")
    assert "hard rule" in notes[1], "what was fitted to another map is not taken along"


@pytest.mark.parametrize("command", [("chat", "tiny"), ("models",)])
def test_the_maps_folder_need_not_exist(command: tuple[str, ...], tmp_path: Path) -> None:
    nowhere, file = tmp_path / "nowhere", tmp_path / "file"
    file.write_text("")
    for where in (nowhere, file):
        done = CliRunner().invoke(main, [*command], input="/steer\n", env={"STEERMOE_MAPS": str(where)})
        assert done.exit_code == 0, done.output
        assert "digits-words" in done.output
    for where in (nowhere, file):
        done = CliRunner().invoke(main, [*command, "--maps", str(where)])
        assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
        assert str(where) in done.stderr
