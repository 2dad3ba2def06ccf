"""Templates whose reasoning has markers that are not known: every command that answers says so, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from steermoe_local.cli import main
from tests.support.gguf_copy import copy_model
from tests.support.running_server import running

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.reasoning_content }}\n{% endfor %}"
QUESTION = "Which number comes after three?"
FAST = ("-t", 1, "-n", 4)


@pytest.fixture(scope="module")
def models(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`unknown` reasons between markers that no table has, `known` between <think> and </think>, `none` not at all."""
    folder = tmp_path_factory.mktemp("models")
    templates = {"unknown": TURNS + "{# <pondering> #}", "known": TURNS + "{# <think> #}"}
    templates["none"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return {name: copy_model(tiny_path, folder / f"{name}.gguf", template=t)[0] for name, t in templates.items()}


def said(*arguments: object, stdin: str = "") -> list[str]:
    """The lines on stderr that are about reasoning."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    assert done.exit_code == 0, done.output
    assert "warning" not in done.stdout
    return [line for line in done.stderr.splitlines() if "reasoning" in line]


@pytest.mark.parametrize("name", ["unknown", "known", "none"])
def test_it_is_said_once(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    model, times = models[name], int(name == "unknown")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n', "utf-8")
    run = ("run", "-m", model, *FAST)
    assert len(said(*run, "--map", "digits-words", "--compare", "-p", QUESTION)) == times
    assert len(said(*run, "--n-prompts", prompts)) == times
    assert said(*run, "--raw", "-p", QUESTION) == [], "no template, no reasoning of its form"
    assert len(said("chat", "-m", model, *FAST, stdin="one\ntwo\n")) == times
    few = ("-n", 1, "-t", 1, "--benign", "none", "--neutral", "none", "--no-controls")
    lines = said("eval", "-m", model, "--map", "digits-words", *few, "-o", tmp_path / "out")
    assert len(lines) == times
    if times:
        assert "unknown.gguf" in lines[0]


@pytest.mark.parametrize(("name", "reasoning"), [("unknown", "unknown"), ("known", "separated"), ("none", None)])
def test_the_server_tells_its_clients(models: dict[str, Path], name: str, reasoning: str | None) -> None:
    with running(model=models[name], parallel=1) as server:
        for model in server.client.get("/v1/models").json()["data"]:
            assert model["meta"]["reasoning"] == reasoning
