"""A model and a prompt without flags: which of them a word is, and what is said where that is not clear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.cli.options.positionals import names_model
from steermoe_local.models.embedded import embedded_model

ASKED = "Which number comes after three?"
TINY = {"STEERMOE_MODEL": "tiny"}
ELSEWHERE = {"STEERMOE_MODEL": "none.gguf"}


def run(*args: Any, **kwargs: Any) -> Result:
    return CliRunner().invoke(main, ["run", "--temp", "0", "-n", "8", *map(str, args)], **kwargs)


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        (["tiny", ASKED], {}),
        (["tiny", ASKED], ELSEWHERE),  # the nearest counts
        ([ASKED], TINY),
        (["tiny", "-p", ASKED], {}),
        (["tiny", "-p", ASKED], ELSEWHERE),
        (["-m", "tiny", ASKED], ELSEWHERE),
        (["-m", "tiny", "tiny", ASKED, "-p", ASKED], {}),  # the same twice is no contradiction
        (["tiny", "--", ASKED], {}),
    ],
)
def test_a_model_and_a_prompt_without_flags(arguments: list[str], env: dict[str, str]) -> None:
    result = run(*arguments, env=env)
    assert (result.exit_code, result.stdout) == (0, "4\n"), result.output


def test_what_is_piped_in_stands_before_the_prompt() -> None:
    piped = run("tiny", "comes after three?", input="Which number\n", env={})
    flag = run("-m", "tiny", "-p", "comes after three?", input="Which number\n")
    assert piped.exit_code == 0
    assert piped.stdout == flag.stdout
    assert run("tiny", input=ASKED).stdout == "4\n"


def test_the_configuration_names_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('model = "tiny"\n')
    env = {"STEERMOE_CONFIG": str(tmp_path / "config.toml")}
    assert run(ASKED, env=env).stdout == "4\n"
    assert run("none.gguf", ASKED, env=env).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "env", "status", "words"),
    [
        ([ASKED], {}, 2, f'which model? "{ASKED}" names none; give it before the prompt, like steermoe run tiny'),
        (["tiny"], {}, 2, "no prompt; write it behind the model"),
        (["tiny"], TINY, 2, "no prompt; write it behind the model"),
        ([], {}, 2, "which model?"),
        (["tiny", ASKED, "-m", "none.gguf"], {}, 2, "tiny and -m none.gguf both name a model; give one of them"),
        (["tiny", ASKED, "-hf", "user/repo"], {}, 2, "tiny and -hf user/repo both name a model; give one of them"),
        (["tiny", ASKED, "-hff", "x.gguf"], {}, 2, "-hff goes with -hf"),
        (["tiny", ASKED, "-p", "Other."], {}, 2, f'"{ASKED}" and -p "Other." both give the prompt; give one of them'),
        (["tiny", ASKED, "-f", "text.txt"], {}, 2, "-p and -f both give the prompt"),
        (["tiny", ASKED, "--n-prompts", "-"], {}, 2, "--n-prompts has the prompts"),
        (["tiny", *ASKED.split()], {}, 2, "6 words without a flag, where a model and a prompt can stand; quote"),
        (["user/repo"], TINY, 1, 'steermoe pull user/repo; a prompt that looks like a model\'s name: -p "user/repo"'),
    ],
)
def test_errors_name_the_cure(arguments: list[str], env: dict[str, str], status: int, words: str) -> None:
    result = run(*arguments, env={"HF_HUB_CACHE": "/nonexistent", **env})
    assert (result.exit_code, result.stdout) == (status, "")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_which_texts_name_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("Not a model.")
    Path("docs").mkdir()
    Path("blob").write_bytes(embedded_model().read_bytes()[:4096])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "own.gguf").write_bytes(embedded_model().read_bytes()[:4096])
    for text in ("tiny", "missing.gguf", "user/repo", "user/repo:Q4_K_M", "qwen3-30b-a3b", "blob", "own"):
        assert names_model(text, (tmp_path / "folder",)), text
    for text in ("docs", "notes.txt", "own?", "What is in blob?", "3 / 4", "x" * 100_000, "What is in a.gguf", ""):
        assert not names_model(text, (tmp_path / "folder",)), text[:20]


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_chat_and_serve_take_a_model(command: str) -> None:
    def refusal(*arguments: str) -> str:
        result = CliRunner().invoke(main, [command, *arguments], env=ELSEWHERE)
        assert result.exit_code in (1, 2)
        return result.stderr

    assert "other.gguf" in refusal("other.gguf")
    assert "none.gguf" in refusal()
    assert "other.gguf and -m tiny both name a model" in refusal("other.gguf", "-m", "tiny")


def test_chat_talks_to_the_model() -> None:
    result = CliRunner().invoke(main, ["chat", "tiny", "--temp", "0"], input=f"{ASKED}\n", env=ELSEWHERE)
    assert result.stdout == "4\n"


def test_info_takes_a_model_as_the_others_do() -> None:
    def info(*arguments: str, **env: str) -> Result:
        return CliRunner().invoke(main, ["info", "--json", *arguments], env=env)

    shown = info("tiny").stdout
    assert '"architecture": "olmoe"' in shown
    assert info("-m", "tiny").stdout == info(**TINY).stdout == info("tiny", **ELSEWHERE).stdout == shown
    assert info().exit_code == 2
    assert "none.gguf and -m tiny both name a model" in info("none.gguf", "-m", "tiny").stderr
