"""Text that a chat template leaves out, or reads as tokens: what the commands say of it, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.pairs.pairs import Message, Pair, save_pairs
from tests.support.gguf_copy import copy_model
from tests.support.sentencepiece_models import write_sentencepiece_model

USER = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}\n{% endif %}{% endfor %}"
THOUGHTLESS = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}\n{% endfor %}"
NAMED = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{# developer #}"


def run(*args: Any, **kwargs: Any) -> Result:
    return CliRunner().invoke(main, [*map(str, args)], **kwargs)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> dict[str, Path]:
    """The embedded model under templates that leave text out, and one with a SentencePiece vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    made = {"spm": write_sentencepiece_model(folder / "spm.gguf", NAMED)}
    for name, template in (("user", USER), ("thoughtless", THOUGHTLESS), ("named", NAMED)):
        (made[name],) = copy_model(tiny_path, folder / f"{name}.gguf", template=template)
    return made


def pairs_file(path: Path, *messages: tuple[str, str], target: str = "") -> Path:
    """One pair: the positive side as given, the negative one with digits in words."""
    words = str.maketrans({"1": "one", "2": "two", "7": "seven"})

    def side(negative: bool) -> tuple[Message, ...]:
        return tuple(Message(role, text.translate(words) if negative else text) for role, text in messages)

    target = target or messages[-1][1]
    save_pairs([Pair("a", side(False), side(True), target, target.translate(words))], path)
    return path


def checked(path: Path, model: Path) -> tuple[int, dict[str, Any]]:
    result = run("pairs", "check", path, "-m", model, "--json")
    return result.exit_code, json.loads(result.stdout)


def detected(path: Path, model: Path, folder: Path) -> Result:
    return run("detect", "-m", model, "--pairs", path, "-o", folder / "map.json", "-t", 1)


def test_a_system_message_that_is_left_out(tmp_path: Path, models: dict[str, Path]) -> None:
    path = pairs_file(tmp_path / "p.jsonl", ("system", "Be brief."), ("user", "Count."), ("assistant", "1, 2"))
    status, data = checked(path, models["user"])
    assert (status, data["located"]) == (0, 1)
    assert [entry["side"] for entry in data["warnings"]] == ["positive", "negative"]
    assert all("message 1 (system)" in entry["reason"] for entry in data["warnings"])
    result = detected(path, models["user"], tmp_path)
    assert result.exit_code == 1
    assert "message 1 (system)" in result.stderr
    assert not (tmp_path / "map.json").exists()
    status, data = checked(path, models["named"])
    assert (status, data["warnings"]) == (0, [])
    assert detected(path, models["named"], tmp_path).exit_code == 0


def test_a_target_in_what_was_thought(tmp_path: Path, models: dict[str, Path]) -> None:
    """The word is in the question, too, where it must not be counted."""
    path = pairs_file(tmp_path / "p.jsonl", ("user", "Say 7."), ("assistant", "<think>a 7</think>ok"), target="7")
    status, data = checked(path, models["thoughtless"])
    assert (status, data["located"]) == (1, 0)
    assert all("message 2 (assistant)" in entry["reason"] for entry in data["problems"])
    assert detected(path, models["thoughtless"], tmp_path).exit_code == 1
    path = pairs_file(tmp_path / "p.jsonl", ("user", "Say 7."), ("assistant", "<think>a</think>7"), target="7")
    status, data = checked(path, models["thoughtless"])
    assert (status, data["located"]) == (0, 1)
    assert "text of message 2" in data["warnings"][0]["reason"]


def test_one_letter_replies(tmp_path: Path, models: dict[str, Path]) -> None:
    """Every letter of the template's own text, as a reply."""
    for letter in "aeinrstu[]":
        path = pairs_file(tmp_path / "p.jsonl", ("user", "user 1"), ("assistant", letter), ("user", "1"), target=letter)
        result = run("pairs", "check", path, "-m", models["named"])
        assert result.exit_code == 0
        assert f"[assistant]«{letter}»" in result.stdout


def test_two_bos_tokens(tmp_path: Path, models: dict[str, Path]) -> None:
    path = tmp_path / "p.jsonl"
    save_pairs([Pair("a", "<s>Count. 1", "<s>Count. one", "1", "one"), Pair("b", "<s>1", "<s>one", "1", "one")], path)
    status, data = checked(path, models["spm"])
    assert (status, data["located"]) == (0, 2)
    assert len(data["warnings"]) == 4
    result = detected(path, models["spm"], tmp_path)
    assert result.exit_code == 0
    assert result.stderr.count("'<s>'") == 1, "said once"
    counts = data["sides"]["positive"]["prompt_tokens"]
    save_pairs([Pair("a", "Count. 1", "Count. one", "1", "one"), Pair("b", "1", "one", "1", "one")], path)
    assert checked(path, models["spm"])[1]["sides"]["positive"]["prompt_tokens"] == counts


def test_a_message_that_spells_a_control_token(tmp_path: Path, models: dict[str, Path]) -> None:
    path = pairs_file(tmp_path / "p.jsonl", ("user", "What is <s>?"), ("assistant", "1"))
    status, data = checked(path, models["spm"])
    assert (status, data["located"]) == (1, 0)
    assert "spells '<s>'" in data["problems"][0]["reason"]
    assert detected(path, models["spm"], tmp_path).exit_code == 1
    assert checked(path, models["named"])[1]["located"] == 1, "no token of that model"


def test_run_says_it_once(tmp_path: Path, models: dict[str, Path]) -> None:
    answer = ["-n", 2, "-t", 1, "--temp", 0]
    result = run("run", "-m", models["user"], "--system-prompt", "Be brief.", "-p", "Count.", *answer)
    assert (result.exit_code, result.stderr.count("message 1 (system)")) == (0, 1)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": i, "system": "Be brief.", "prompt": "Count."}) + "\n" for i in range(3))
    )
    result = run("run", "-m", models["user"], "--n-prompts", prompts, *answer)
    assert (result.exit_code, result.stderr.count("message 1 (system)")) == (0, 1)
    assert len(result.stdout.splitlines()) == 3
    result = run("run", "-m", models["named"], "--system-prompt", "Be brief.", "-p", "Count.", *answer)
    assert (result.exit_code, result.stderr) == (0, "")
    result = run("run", "-m", models["spm"], "--raw", "-p", "<s>Count", *answer)
    assert (result.exit_code, result.stderr.count("'<s>'")) == (0, 1)


def test_chat_says_it_once(models: dict[str, Path]) -> None:
    said = "Count.\nCount.\n/exit\n"
    result = run("chat", "-m", models["user"], "--system-prompt", "Be brief.", "-n", 2, "-t", 1, input=said)
    assert (result.exit_code, result.output.count("message 1 (system)")) == (0, 1)
    result = run("chat", "-m", models["named"], "--system-prompt", "Be brief.", "-n", 2, "-t", 1, input=said)
    assert (result.exit_code, "message 1 (system)" in result.output) == (0, False)
