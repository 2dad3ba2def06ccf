"""`steermoe tasks`: files and data sets of the hub become tasks, which are checked and listed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from steermoe_local.cli import main
from steermoe_local.cli.commands.tasks import build
from steermoe_local.evaluation.datasets.builders import ADAPTERS, ANSWER_AS, HOPS, MATCH
from steermoe_local.evaluation.tasks.builtin import builtin_names
from steermoe_local.evaluation.tasks.scorers import SCORERS
from steermoe_local.evaluation.tasks.tasks import load_task
from tests.pairs.test_pair_builders import write_lines
from tests.support.dataset_samples import (
    ADVBENCH,
    COUNTERFACTUAL,
    CRANES,
    HUB_MCTEST,
    MQUAKE,
    STRONGREJECT,
    TRIVIA,
    UNANSWERABLE,
    write_csv,
    write_json,
    write_mctest,
)
from tests.support.hub_stand_in import Hub, running
from tests.support.paths import ROOT


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, ["tasks", *map(str, args)])


def ok(*args: Any) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def fails(status: int, *args: Any) -> str:
    result = run(*args)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "task.jsonl"


#
# build
#


def test_build_tells_what_it_left_out(tmp_path: Path, out: Path) -> None:
    rows = [*UNANSWERABLE, UNANSWERABLE[0], {"context": "c", "question": float("nan")}]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    result = ok("build", "faitheval-unanswerable", source, "-o", out)
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"4 items from 6 rows of {source}: {out}",
        "  1 left out: no question",
        "  1 left out: the same as an earlier item",
    ]
    task = load_task(out)
    assert (task.name, task.scorer, len(task.items)) == ("faitheval-unanswerable", "contains", 4)


def test_build_as_json_with_a_head_of_ones_own(tmp_path: Path, out: Path) -> None:
    source = write_csv(tmp_path / "rows.csv", STRONGREJECT)
    head = ["--name", "mine", "--license", "MIT", "--system", "Be kind.", "--max-tokens", 33]
    data = json.loads(ok("build", "strongreject", source, "-o", out, *head, "--json").stdout)
    assert (data["items"], data["rows"], data["skipped"], data["sources"]) == (4, 4, {}, [str(source)])
    task = load_task(out)
    assert (task.name, task.license, task.system, task.max_tokens) == ("mine", "MIT", "Be kind.", 33)
    assert data["task"] == json.loads(out.read_text().splitlines()[0])["task"]
    assert task.items[0].extra == {"category": "Paper", "source": "made up"}


def test_selection(tmp_path: Path, out: Path) -> None:
    source = write_json(tmp_path / "mquake.json", MQUAKE)

    def ids(*flags: Any) -> list[str]:
        ok("build", "mquake", source, "-o", out, *flags)
        return [str(item.id) for item in load_task(out).items]

    everything = [f"{case}.{n}" for case in range(4) for n in (1, 2)]
    assert ids() == everything
    assert ids("--skip", 1, "--limit", 2) == ["0.2", "1.1"]
    drawn = ids("--sample", 3, "--seed", 1)
    assert drawn == ids("--sample", 3, "--seed", 1)
    assert drawn == sorted(drawn)
    assert len({tuple(ids("--sample", 3, "--seed", seed)) for seed in range(6)}) > 2
    assert ids("--hops", "multi", "--all-questions", "--limit", 4) == ["0.1", "0.2", "0.3", "1.1"]
    assert "give one of them" in fails(2, "build", "mquake", source, "-o", out, "--limit", 1, "--sample", 1)


def test_several_sources(tmp_path: Path, out: Path) -> None:
    half = write_json(tmp_path / "dev.json", CRANES[:2]), write_json(tmp_path / "test.json", CRANES[2:])
    ok("build", "tdc2023", *half, "-o", out)
    assert [item.content for item in load_task(out).items] == CRANES
    assert [item.id for item in load_task(out).items] == ["row-1", "row-2", "row-3", "row-4"]


def test_mctest_with_answers_elsewhere(tmp_path: Path, out: Path) -> None:
    path = write_mctest(tmp_path)
    elsewhere = path.with_suffix(".ans").rename(tmp_path / "other.ans")
    assert "name the file with --answers" in fails(1, "build", "mctest", path, "-o", out)
    ok("build", "mctest", path, "--answers", elsewhere, "--answer-as", "text", "--closed-book", "-o", out)
    task = load_task(out)
    assert (task.name, task.options) == ("mctest-closed-book", {"normalize": "characters"})
    assert {str(item.content)[:9] for item in task.items} == {"Question:"}


def test_a_column_of_ones_own(tmp_path: Path, out: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [{"ask": text, "n": 1} for text in CRANES])
    message = fails(1, "build", "advbench", path, "-o", out)
    assert "'goal' or 'prompt'" in message
    assert "'ask', 'n'" in message
    ok("build", "advbench", path, "--column", "ask", "-o", out)
    assert [item.content for item in load_task(out).items] == CRANES
    assert "no column 'x'; its columns are 'ask', 'n'" in fails(
        1, "build", "advbench", path, "--column", "x", "-o", out
    )


def test_wrong_use(tmp_path: Path, out: Path) -> None:
    source = write_json(tmp_path / "a.json", TRIVIA)
    assert "'triviaqa' is no layout; take one of " in fails(2, "build", "triviaqa", source, "-o", out)
    assert "layout cf-triviaqa: takes no --hops; it takes --closed-book, --instruction" in fails(
        2, "build", "cf-triviaqa", source, "--hops", "multi", "-o", out
    )
    assert "take hops multi" in fails(2, "build", "mquake", source, "--all-questions", "-o", out)
    assert "no column 'context', 'question'; its columns are 'question_text', 'paragraph_text'" in fails(
        1, "build", "faitheval-inconsistent", source, "-o", out
    )
    assert "there is no item to write (4 left out: no question)" in fails(
        1,
        "build",
        "cf-triviaqa",
        write_json(tmp_path / "b.json", [row | {"question_text": 3.5} for row in TRIVIA]),
        "-o",
        out,
    )
    assert not out.exists()


def test_the_choices_are_the_librarys() -> None:
    types = {parameter.name: getattr(parameter.type, "choices", None) for parameter in build.params}
    for name, allowed in (("answer_as", ANSWER_AS), ("match", MATCH), ("hops", HOPS)):
        assert tuple(types[name]) == allowed


#
# data sets of the hub
#


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    def lines(items: list[Any]) -> bytes:
        return "".join(json.dumps(item) + "\n" for item in items).encode()

    hub = Hub()
    advbench = write_csv(tmp_path / "source.csv", ADVBENCH).read_bytes()
    hub.datasets = {
        "Salesforce/FaithEval-counterfactual-v1.0": {
            "main": {"data/test-00000-of-00001.jsonl": lines(COUNTERFACTUAL), "README.md": b"# rows"}
        },
        "sagnikrayc/mctest": {
            "refs/convert/parquet": {
                "mc160/test/0000.jsonl": lines(HUB_MCTEST[:1]),
                "mc500/test/0000.jsonl": lines(HUB_MCTEST),
                "mc500/train/0000.jsonl": lines(HUB_MCTEST[:2]),
            }
        },
        "lab/advbench": {"main": {"harmful_behaviors.csv": advbench}},
    }
    with running(hub):
        yield hub


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """What the hub's client read from the environment at its import is set in its constants."""
    values = {
        "ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
        "HF_HUB_OFFLINE": False,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_TOKEN_PATH": str(tmp_path / "home" / "token"),
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return hub


@pytest.mark.parametrize(
    ("layout", "source", "n"),
    [
        ("faitheval-counterfactual", ADAPTERS["faitheval-counterfactual"].source, 4),
        ("mctest", ADAPTERS["mctest"].source.rpartition(" ")[2], 4),
        ("advbench", "hub:lab/advbench", 4),
    ],
)
def test_from_the_hub_and_then_from_its_cache(client: Hub, out: Path, layout: str, source: str, n: int) -> None:
    assert source.startswith("hub:")
    ok("build", layout, source, "-o", out)
    first = out.read_bytes()
    assert len(load_task(out).items) == n
    out.unlink()
    client.requests.clear()
    ok("build", layout, source, "--offline", "-o", out)
    assert out.read_bytes() == first
    assert not client.requests


def test_what_the_hub_does_not_have(client: Hub, out: Path) -> None:
    assert "the hub knows no such data set" in fails(1, "build", "mquake", "hub:nobody/nothing", "-o", out)
    assert "not in the hub's cache" in fails(1, "build", "mquake", "hub:lab/advbench", "--offline", "-o", out)
    assert not out.exists()


#
# check and list
#


def test_check_a_builtin_task_on_a_model() -> None:
    data = json.loads(ok("check", "builtin:digits-words", "-m", "tiny", "--json").stdout)
    assert (data["items"], data["scorer"], data["problems"]) == (120, "sides", [])
    tokens = data["tokens"]
    assert 0 < tokens["shortest"] <= tokens["median"] <= tokens["longest"] < tokens["needed"] <= tokens["trained"]
    assert tokens["needed"] == tokens["longest"] + data["max_tokens"] + 1
    shown = ok("check", "builtin:digits-words", "-m", "tiny").stdout
    assert "prompt tokens" in shown
    assert data["sha256"] in shown


def test_check_finds_items_that_cannot_be_scored(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": "a\\u001b[2J", "prompt": "x"}\n{"id": "b", "prompt": "y", "answer": "z"}\n')
    assert "how are the answers scored?" in fails(2, "check", path)
    assert "'x' is no scorer" in fails(2, "check", path, "--scorer", "x")
    result = run("check", path, "--scorer", "contains")
    assert result.exit_code == 1
    assert "2, usable 1" in result.stdout
    assert "answer: missing" in result.stdout
    assert "\x1b[2J" not in result.stdout
    data = json.loads(run("check", path, "--scorer", "contains", "-m", "tiny", "--json").stdout)
    assert [problem["id"] for problem in data["problems"]] == ["a\x1b[2J"]
    assert data["tokens"]["shortest"] > 0
    assert json.loads(ok("check", path, "--scorer", "refusal", "--json").stdout)["tokens"] is None


def test_check_warns_of_prompts_beyond_the_training_context(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [{"id": "long", "prompt": "three " * 2000}, {"id": "short", "prompt": "three"}]
    write_lines(path, lines)
    result = ok("check", path, "--scorer", "refusal", "-m", "tiny")
    assert "warnings: 1" in result.stdout
    assert "long: needs " in result.stdout


def test_list_names_everything() -> None:
    data = json.loads(ok("list", "--json").stdout)
    assert [entry["name"] for entry in data["builtin"]] == [f"builtin:{name}" for name in builtin_names()]
    assert [entry["name"] for entry in data["layouts"]] == list(ADAPTERS)
    assert [entry["name"] for entry in data["scorers"]] == list(SCORERS)
    shown = ok("list").stdout
    for name in (*builtin_names(), *ADAPTERS, *SCORERS):
        assert name in shown


def test_help_loads_no_evaluation() -> None:
    code = (
        "import sys; from steermoe_local.cli import main\n"
        "try: main(['tasks', 'build', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not [n for n in sys.modules if n.startswith('steermoe_local.evaluation')]"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


#
# the page
#


def test_the_page_names_what_there_is() -> None:
    page = (ROOT / "docs" / "task-builders.md").read_text("utf-8")
    for name, layout in ADAPTERS.items():
        assert f"`{name}`" in page
        for columns in layout.columns[:1]:
            for column in columns:
                assert f"`{column}`" in page, (name, column)
    for parameter in build.params:
        if parameter.name not in (
            "layout",
            "sources",
            "output",
            "as_json",
            "debug",
            "help_all",
        ):  # the last: of all commands
            assert f"`{parameter.opts[-1]}" in page, parameter.opts
