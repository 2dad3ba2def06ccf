"""Pages of help: options under headings, the rare ones behind --help-all, commands in groups, `steermoe` alone."""

from __future__ import annotations

import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main, start_page
from steermoe_local.cli.help_pages import COMMANDS
from steermoe_local.cli.options import settings
from steermoe_local.cli.options.groups import HEADINGS, MODEL, OUTPUT, OWN, STEERING, in_help, place, together


def run(*args: str, **kwargs: Any) -> Result:
    return CliRunner().invoke(main, args, **kwargs)


def page(*args: str) -> list[str]:
    result = run(*args, terminal_width=100)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_every_command_is_in_one_group() -> None:
    grouped = Counter(name for names in COMMANDS.values() for name in names)
    assert {name for name, n in grouped.items() if n > 1} == set()
    assert set(main.commands) - set(grouped) == set(), "put it into COMMANDS of cli/help_pages.py"
    assert set(grouped) - set(main.commands) == set()


def test_help_lists_the_commands_in_groups() -> None:
    lines = page("--help")
    at = [lines.index(f"{heading}:") for heading in COMMANDS]
    assert at == sorted(at)
    listed = [match[1] for line in lines[at[0] :] if (match := re.match(r"  (\S+)  ", line))]
    assert sorted(listed) == sorted(main.commands)
    assert not any(line.endswith("...") and len(line) > 100 for line in lines)


def names_on(lines: list[str]) -> set[str]:
    """The names of options in the first column of a page."""
    found = (re.split(r"  +", line.strip())[0] for line in lines if line.startswith("  -"))
    return {name for names in found for name in re.findall(r"(?<!\w)--?[a-z][\w-]*", names)}


STARTED = {" ".join(path): command for path, command in settings.commands(main)}


@pytest.mark.parametrize("path", sorted(STARTED))
def test_help_all_has_every_option_and_help_the_common_ones(path: str) -> None:
    command = STARTED[path]
    if isinstance(command, click.Group):
        return
    flag = "--help"
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden and p.name != "help_all"]
    everything = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    assert names_on(page(*path.split(), "--help-all")) - {flag, "-h"} == {name.strip() for name in everything}
    common = names_on(page(*path.split(), flag))
    for option in options:
        assert place(option).heading in HEADINGS
        assert bool(common & {*option.opts}) == (not place(option).rare), option.opts
    assert ("--help-all" in common) == any(place(option).rare for option in options)


def test_the_page_of_run_fits_a_screen() -> None:
    lines = page("run", "--help")
    assert len(lines) <= 45
    assert lines[0] == "Usage: steermoe run [OPTIONS] [MODEL] [PROMPT]"
    headings = [line[:-1] for line in lines if line.endswith(":") and line[0] != " "]
    assert headings == ["Model", "Prompt", "Steering", "Sampling", "Output"]


@pytest.mark.parametrize("path", ["", "map", "pairs", "bias", "condition", "config", "tasks"])
def test_groups_take_help_all_too(path: str) -> None:
    assert page(*path.split(), "--help-all") == page(*path.split(), "--help")


def test_help_all_needs_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("= broken")
    env = {"STEERMOE_CONFIG": str(tmp_path / "broken.toml")}
    for flags in (["run", "--help"], ["run", "--help-all"], []):
        assert run(*flags, env=env).exit_code == 0
    assert run("run", "tiny", "x", env=env).exit_code == 2


def test_places_of_options() -> None:
    @click.command()
    @in_help({"own": STEERING}, rare=("own",))
    @together(click.option("--kept"), click.option("--other"), heading={"kept": MODEL, "": OUTPUT}, common=("kept",))
    @click.option("--own")
    @click.option("--plain")
    def command(**_: Any) -> None:
        """Nothing."""

    found = {p.name: (place(p).heading, place(p).rare) for p in command.params}
    assert found == {
        "kept": (MODEL, False),
        "other": (OUTPUT, True),
        "own": (STEERING, True),
        "plain": (OWN, False),
    }


def test_an_error_about_a_rare_option_names_the_page_that_has_it() -> None:
    assert "see steermoe run --help-all" in run("run", "tiny", "x", "--top-k", "many").stderr
    assert run("run", "tiny", "x", "--temp", "hot").stderr.strip().endswith("see steermoe run --help")


def test_no_name_of_an_option_has_two_meanings() -> None:
    """Other spellings than the first name the same parameter in every command that has them."""
    meanings: dict[str, set[str | None]] = {}
    for _, command in settings.commands(main):
        for parameter in command.params:
            for name in parameter.opts if isinstance(parameter, click.Option) else ():
                meanings.setdefault(name, set()).add(parameter.name)
    aliases = {"--temperature", "--max-tokens", "--system", "--think"}
    found = {name: meanings[name] for name in aliases}
    assert found == {
        "--temperature": {"temperature"},
        "--max-tokens": {"n_predict", "max_tokens"},  # the longest answer, of run and of eval
        "--system": {"system_prompt", "system"},
        "--think": {"thinking"},
    }


#
# steermoe alone
#


def test_steermoe_alone_says_how_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_page, "_SECONDS", 60.0)
    (tmp_path / "models").mkdir()
    for n in range(7):
        (tmp_path / "models" / f"own{n}.gguf").write_bytes(b"GGUF")
    (tmp_path / "maps" / "mine").mkdir(parents=True)
    (tmp_path / "maps" / "mine" / "map.json").write_text("{}")
    env = {"STEERMOE_MODELS": str(tmp_path / "models"), "STEERMOE_MAPS": str(tmp_path / "maps")}
    result = run(env=env)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "steermoe chat tiny --map digits-words" in result.stdout
    assert "Models here: tiny, own0, own1, own2, own3 and " in result.stdout
    assert "steermoe learn NAME -m own0 " in result.stdout
    assert "Your steerings: mine\n" in result.stdout
    assert "Your steerings: none yet" in run(env=env | {"STEERMOE_MAPS": str(tmp_path / "none")}).stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_models_folders_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_page, "_SECONDS", 60.0)
    (tmp_path / "own.gguf").write_bytes(b"GGUF")
    config = tmp_path / "config.toml"
    config.write_text(f'models-dir = ["{tmp_path}"]\n')
    assert "own" in run(env={"STEERMOE_CONFIG": str(config)}).stdout


def test_a_slow_folder_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived = threading.Event()

    class Slow:
        @classmethod
        def scan(cls, folders: Any) -> None:
            arrived.wait()
            raise OSError("a folder that is gone")

    monkeypatch.setattr(start_page, "LocalModels", Slow)
    monkeypatch.setattr(start_page, "_SECONDS", 0.01)
    try:
        assert "Models here: tiny\n" in run().stdout
    finally:
        arrived.set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chatt"], "no such command 'chatt'; did you mean chat?"),
        (["pairs", "chek"], "no such command 'chek'; did you mean check?"),
        (["run", "--temperatur", "0"], "no such option '--temperatur'; did you mean --temperature?"),
        (["tiny"], "no such command 'tiny', but a model; to talk to it: steermoe chat tiny"),
        (["zzz"], "no such command 'zzz'; see steermoe --help"),
    ],
)
def test_what_was_probably_meant(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr == f"error: {words}\n"
