"""Shell completion: click's protocol for every shell, and the scripts in the shells that are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from steermoe_local.cli import main
from steermoe_local.cli.options import settings
from steermoe_local.models.shipped_maps import shipped_maps
from steermoe_local.steering.presets import PRESETS

SHELLS = ("bash", "zsh", "fish")
PROGRAM = Path(sys.executable).with_name("steermoe")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a few files, and empty caches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "llama"))
    work = tmp_path / "work"
    for name in (
        "a.gguf",
        "b.GGUF",
        "m.json",
        "p.jsonl",
        "notes.txt",
        ".hidden.gguf",
        "sub/c.gguf",
        "empty/x.txt",
        "docs/x.txt",
    ):
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(work)
    return work


def ask(shell: str, line: str) -> list[tuple[str, str]]:
    """What the program answers a shell that completes the last word of a line: (type, value)."""
    words = line.split(" ")
    env = {"_STEERMOE_COMPLETE": f"{shell}_complete", "COMP_WORDS": line}
    env["COMP_CWORD"] = words[-1] if shell == "fish" else str(len(words) - 1)
    result = CliRunner().invoke(main, [], env=env, prog_name="steermoe")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stderr == ""
    lines = result.stdout.removesuffix("\n").split("\n")
    if shell == "zsh":  # type, value, help on lines of their own
        return [(kind, value) for kind, value in zip(lines[::3], lines[1::3], strict=False)]
    found = [tuple(text.split("\t")[0].split(",", 1)) for text in lines if text]
    return [(kind, value) for kind, value in found]


def values(shell: str, line: str) -> list[str]:
    return [value for kind, value in ask(shell, line) if kind == "plain"]


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_and_options(shell: str, folder: Path) -> None:
    assert set(values(shell, "steermoe ")) == set(main.commands)
    assert values(shell, "steermoe det") == ["detect"]
    assert values(shell, "steermoe pairs sup") == ["superficial"]
    assert set(values(shell, "steermoe run --top-")) == {"--top-k", "--top-p"}
    assert values(shell, "steermoe run --split-mode r") == ["row"]


@pytest.mark.parametrize("shell", SHELLS)
def test_models_maps_and_presets(shell: str, folder: Path) -> None:
    assert values(shell, "steermoe run -m ") == ["tiny", "a.gguf", "b.GGUF", "docs/", "empty/", "sub/"]
    assert values(shell, "steermoe run --model t") == ["tiny"]
    assert values(shell, "steermoe detect -m sub/") == ["sub/c.gguf"]
    assert values(shell, "steermoe info a") == ["a.gguf"]
    assert values(shell, "steermoe info .h") == [".hidden.gguf"]
    assert ask(shell, "steermoe info su") == [("dir", "su")]
    assert values(shell, "steermoe run --preset ") == list(PRESETS)
    assert values(shell, "steermoe run --map ") == [*sorted(shipped_maps()), "m.json", "docs/", "empty/", "sub/"]
    assert values(shell, "steermoe map show m") == ["m.json"]
    assert values(shell, "steermoe bias show a") == ["a.gguf"]
    assert values(shell, "steermoe detect --pairs p") == ["p.jsonl"]
    assert values(shell, f"steermoe info {folder}/sub/") == [f"{folder}/sub/c.gguf"]
    assert ask(shell, "steermoe info nowhere/x") == []
    # names would be lost if the shell were told to complete folders alone
    assert values(shell, "steermoe run --map d") == ["digits-words", "document-memory", "docs/"]


def test_fetched_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = folder.parent / "hub" / "models--someone--Some-MoE-GGUF" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "Some-MoE-Q4_K_M.gguf").write_bytes(b"GGUF")
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    assert values("bash", "steermoe run -m someone/") == ["someone/Some-MoE-GGUF:Q4_K_M"]
    models = folder.parent / "models"
    models.mkdir()
    (models / "mine.gguf").write_bytes(b"GGUF")
    assert values("bash", f"steermoe run --models-dir {models} -m mi") == ["mine"]
    monkeypatch.setenv("STEERMOE_MODELS", str(models))
    assert values("bash", "steermoe run -m mi") == ["mine"]


def test_keys_of_the_configuration(folder: Path) -> None:
    assert values("bash", "steermoe config set thr") == ["threads"]
    assert values("bash", "steermoe config set pairs.ch") == ["pairs.check."]
    assert values("bash", "steermoe config unset run.top-") == ["run.top-k", "run.top-p"]
    assert values("bash", "steermoe config show pai") == ["pairs"]
    assert "check" in values("bash", "steermoe config show pairs ")


def test_every_parameter_completes_without_a_word_on_stderr(folder: Path) -> None:
    """Whatever a command takes, now and later."""
    for path, command in settings.commands(main):
        line = " ".join(("steermoe", *path))
        assert ask("bash", f"{line} ") is not None
        for name, option in settings.options(command).items():
            if not option.is_flag:
                assert ask("bash", f"{line} --{name} ") is not None, (line, name)


def test_a_broken_configuration_or_models_folder_is_no_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "broken.toml").write_text("nonsense")
    monkeypatch.setenv("STEERMOE_CONFIG", str(folder / "broken.toml"))
    assert values("bash", "steermoe det") == ["detect"]
    assert "tiny" in values("bash", "steermoe run -m ")
    assert CliRunner().invoke(main, ["completion", "fish"]).exit_code == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "notes.txt"))
    assert "tiny" in values("bash", "steermoe run -m ")


#
# the scripts
#


def script(shell: str, folder: Path) -> Path:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    path = folder / f"steermoe.{shell}"
    path.write_text(result.stdout)
    return path


def find(shell: str) -> str:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    return found


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    path = f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"PATH": path, "TERM": "dumb"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_click_s_and_parses(shell: str, folder: Path) -> None:
    path = script(shell, folder)
    env = {"_STEERMOE_COMPLETE": f"{shell}_source"}
    assert CliRunner().invoke(main, [], env=env, prog_name="steermoe").stdout == path.read_text()
    assert "_STEERMOE_COMPLETE" in path.read_text()
    assert run(find(shell), "-n", path).stderr == ""


def test_the_help_names_the_shells() -> None:
    assert "[bash|zsh|fish]" in CliRunner().invoke(main, ["completion", "--help"]).output.lower().replace(
        "{", "["
    ).replace("}", "]")
    assert CliRunner().invoke(main, ["completion", "powershell"]).exit_code == 2
    argument = main.commands["completion"].params[0]
    assert isinstance(argument.type, click.Choice)


def test_bash(folder: Path) -> None:
    """The function that bash calls when Tab is pressed, with the words as bash gives them."""
    path = script("bash", folder)
    code = f"""
source {path}
complete -p steermoe
complete_line() {{
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _steermoe_completion steermoe
    echo "${{COMPREPLY[@]}}"
}}
complete_line steermoe det
complete_line steermoe pairs sup
complete_line steermoe run -m a
complete_line steermoe run --preset f
"""
    done = run(find("bash"), "--norc", "-c", code)
    assert done.stdout.splitlines() == [
        "complete -o nosort -F _steermoe_completion steermoe",
        "detect",
        "superficial",
        "a.gguf",
        "faithful",
    ], done.stderr


def test_fish(folder: Path) -> None:
    path = script("fish", folder)
    lines = ("steermoe det", "steermoe pairs sup", "steermoe run -m a", "steermoe run --preset f")
    code = "; ".join([f"source {path}", *(f'complete --do-complete "{line}"' for line in lines)])
    done = run(find("fish"), "--no-config", "-c", code)
    found = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert found == ["detect", "superficial", "a.gguf", "faithful"], done.stderr


def test_zsh(folder: Path) -> None:
    """zsh completes in its line editor alone, so it gets a terminal."""
    pexpect = pytest.importorskip("pexpect")
    path = script("zsh", folder)
    env = {"PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}", "TERM": "dumb"}
    shell = pexpect.spawn(find("zsh"), ["-f", "-i"], env=os.environ | env, encoding="utf-8", timeout=30)
    shell.sendline(f"PS1=; autoload -U compinit; compinit -u -d {folder}/zcompdump; source {path}; echo rea''dy")
    shell.expect("\r\nready\r\n")
    for words, whole in (("det", "detect"), ("pairs sup", "pairs superficial"), ("run -m a", "run -m a.gguf")):
        # what the line is after Tab is printed by zsh itself: Ctrl-A, echo before it, Enter
        shell.send(f"steermoe {words}\t")
        shell.expect_exact(whole.removeprefix(words))
        shell.send("\x01echo made: \r")
        shell.expect_exact(f"\nmade: steermoe {whole}")
    shell.close(force=True)
