"""`steermoe audit`: its files, its JSON, how it goes on after an interruption, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.evaluation.studies.audit import audit as module
from steermoe_local.models.embedded import data_folder
from tests.support.announced import untimed
from tests.support.interrupting import interrupted_after

FAST = "-m tiny -t 1 -np 8 -n 6 --draws 3 --layer-draws 2 --blocks 2 --suppress 10%,0.4 --promote 1/6"
FILES = {"report.md", "report.html", "summary.json", "columns.jsonl", "audit.png", "audit.svg", "base.records.jsonl"}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A task and a neutral text of a few lines."""
    neutral = tmp_path_factory.mktemp("data") / "neutral.jsonl"
    lines = (data_folder() / "neutral.heldout.jsonl").read_text("utf-8").splitlines(keepends=True)
    neutral.write_text("".join(lines[:4]))
    words = FAST.replace("1/6", "0.125").split()
    return [*words, "--task", "builtin:refuse-comply", "--neutral", str(neutral)]


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, ["audit", *map(str, args)])


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("run") / "out"
    return run(*options, "--quants", "q4_0", "-o", out, "--json"), out


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without matplotlib; drawing takes longer than measuring."""
    monkeypatch.setattr("steermoe_local.evaluation.reports.figure.missing_matplotlib", lambda: "no pictures today")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def figures(data: Any) -> Any:
    """What was measured: without what another run has otherwise, as batches round otherwise."""
    if isinstance(data, dict):
        return {name: figures(value) for name, value in data.items() if name not in ("created", "command", "seconds")}
    if isinstance(data, list | tuple):
        return [figures(value) for value in data]
    return round(data, 4) if isinstance(data, float) else data


def test_its_files(finished: tuple[Result, Path]) -> None:
    done, out = finished
    assert done.exit_code == 0, done.output
    assert names(out) == FILES | {"Q4_0.records.jsonl"}, "without --keep no models"
    assert (out / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "audit.svg").read_text("utf-8")
    answers = [json.loads(line) for line in (out / "base.records.jsonl").read_text("utf-8").splitlines()]
    assert {record["kind"] for record in answers} == {"answer", "benign", "text"}
    n_steerings = 3 * 3 + 2 * 2 * 2
    assert len(answers) <= (n_steerings + 1) * 13, "six items of two tasks and a text each"
    assert f"base: {n_steerings} random steerings, {12 * n_steerings} answers, about " in done.stderr
    assert f"Q4_0: 9 random steerings, {12 * 9} answers, about " in done.stderr


def test_its_json(finished: tuple[Result, Path]) -> None:
    done, out = finished
    data = json.loads(done.stdout)
    assert data == json.loads((out / "summary.json").read_text("utf-8"))
    assert (data["task"], data["unrelated"], data["level"]) == ("refuse-comply", "neutral", 0.8)
    base, other = data["models"]
    assert (base["name"], other["name"]) == ("base", "Q4_0")
    points = [(point["action"], point["rate"], point["n_experts"]) for point in base["points"]]
    assert points == [("suppress", 0.1, 12), ("suppress", 0.4, 48), ("promote", 0.125, 15)]
    assert points == [(point["action"], point["rate"], point["n_experts"]) for point in other["points"]]
    assert [(point["action"], point["layers"]) for point in base["blocks"]] == [
        (action, layers) for action in ("suppress", "promote") for layers in ([0, 1, 2], [3, 4])
    ]
    assert other["blocks"] == []
    for point in base["points"]:
        assert len(point["behaviour"]["draws"]) == 3
        assert 0 <= point["behaviour"]["share"]["low"] <= point["behaviour"]["share"]["high"] <= 1
        assert point["text"]["share"]["n"] == 1
    assert other["kept"]["n"] == data["provenance"]["n_shown"]
    assert other["text"]["kl"] > 0
    assert base["kept"] is None
    assert {(found["model"], found["action"]) for found in data["breaks"]} == {
        (model, action) for model in ("base", "Q4_0") for action in ("suppress", "promote")
    }
    assert data["command"].startswith("steermoe audit --task builtin:refuse-comply --model tiny")
    assert "--suppress 0.1,0.4 --promote 0.125" in data["command"]
    assert str(out) not in done.stdout


def test_the_report(finished: tuple[Result, Path]) -> None:
    text = (finished[1] / "report.md").read_text("utf-8")
    assert text.startswith("# How refuse-comply (refuse) holds under random routing\n")
    assert "(audit.png)" in text
    assert "Random draws are no adversary" in text
    tables = ("Where it breaks", "Quantizations, unsteered", "refuse-comply on base", "Language on Q4\\_0", "By depth")
    for title in tables:
        assert f"## {title}\n" in text


def test_the_same_draws_give_the_same_figures(
    finished: tuple[Result, Path], options: list[str], tmp_path: Path, no_pictures: None
) -> None:
    done = run(*options, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    one, two = json.loads(done.stdout)["models"], json.loads(finished[0].stdout)["models"]
    assert figures(one) == figures(two[:1])
    answers = [(out / "base.records.jsonl").read_bytes() for out in (tmp_path / "out", finished[1])]
    assert answers[0] == answers[1]
    other = json.loads(run(*options, "-o", tmp_path / "other", "--json", "--seed", 1).stdout)
    assert figures(other["models"]) != figures(one)


@pytest.mark.parametrize("n", [5, 60])
def test_interrupted_and_resumed(
    n: int, finished: tuple[Result, Path], options: list[str], tmp_path: Path, no_pictures: None
) -> None:
    out = tmp_path / "out"
    with interrupted_after(n):
        done = run(*options, "-o", out)
    assert done.exit_code == 130
    assert f"{n} results are kept in {out / 'base.records.jsonl.partial'}" in done.stderr
    assert not {"report.md", "summary.json"} & names(out)
    done = run(*options, "-o", out)
    assert done.exit_code == 2
    assert "--resume" in done.stderr
    done = run(*options, "-o", out, "--resume", "--json")
    assert done.exit_code == 0, done.output
    assert not any(name.endswith(".partial") for name in names(out))
    assert figures(json.loads(done.stdout)["models"]) == figures(json.loads(finished[0].stdout)["models"][:1])
    lines = [(folder / "base.records.jsonl").read_text("utf-8").splitlines() for folder in (out, finished[1])]
    answers = [[line for line in found if '"kind": "text"' not in line] for found in lines]
    assert len(lines[0]) == len(lines[1])
    assert answers[0] == answers[1], "but for texts, which were predicted in other batches"
    if n > 13:  # the unsteered model is measured, so its speed is not known
        assert ", about" not in done.stderr


def test_interrupted_on_a_quantization(
    finished: tuple[Result, Path],
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_pictures: None,
) -> None:
    out = tmp_path / "out"
    real = module._Study.quantization

    def stopped(self: Any, evaluator: Any, *rest: Any) -> Any:
        evaluator.measure([None])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module._Study, "quantization", stopped)
        done = run(*options, "--quants", "Q4_0", "-o", out)
    assert done.exit_code == 130
    assert "1 model is done" in done.stderr
    assert {"columns.jsonl.partial", "Q4_0.records.jsonl.partial", "base.records.jsonl", "models"} <= names(out)
    done = run(*options, "--quants", "Q4_0", "-o", out, "--resume", "--draws", 4)
    assert done.exit_code == 2
    assert "n_draws 3, now it is 4" in done.stderr

    measured: list[str] = []

    def quantization(self: Any, evaluator: Any, name: str, *rest: Any) -> Any:
        measured.append(name)
        return real(self, evaluator, name, *rest)

    monkeypatch.setattr(module._Study, "quantization", quantization)
    monkeypatch.setattr(module._Study, "base", None)
    done = run(*options, "--quants", "Q4_0", "-o", out, "--resume", "--json")
    assert done.exit_code == 0, done.output
    assert measured == ["Q4_0"]
    assert not any(name.endswith(".partial") for name in names(out))
    assert figures(json.loads(done.stdout)["models"]) == figures(json.loads(finished[0].stdout)["models"])


def test_for_people(options: list[str], tmp_path: Path, no_pictures: None) -> None:
    """Without anything to compare with, by a level of one's own."""
    out = tmp_path / "out"
    rest = ["--unrelated", "none", "--neutral", "none", "--promote", "none", "--layer-draws", "0", "--level", "50%"]
    done = run(*options[:-2], *rest, "-o", out)
    assert done.exit_code == 0, done.output
    assert "Where it breaks" in done.stdout
    assert "there is nothing to compare it with" in done.stdout
    assert "items show the behaviour unsteered, so the intervals are wide" in done.stdout
    assert f"written: {out / 'report.md'}" in done.stdout
    assert "promoted" not in done.stdout
    assert "By depth" not in done.stdout
    data = json.loads((out / "summary.json").read_text("utf-8"))
    assert data["level"] == 0.5
    assert data["unrelated"] is None


def test_the_unrelated_task_itself_is_audited(options: list[str], tmp_path: Path, no_pictures: None) -> None:
    """By default it is then compared with nothing but the text."""
    words = ["builtin:neutral" if word == "builtin:refuse-comply" else word for word in options]
    rest = ["--promote", "none", "--layer-draws", "0", "--suppress", "10%", "--json"]
    done = run(*words, *rest, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["unrelated"] is None


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--suppress", "90%"], 2, "suppress 0.9: leaves fewer than the 4"),
        (["--suppress", "0"], 2, "suppress: 0.0"),
        (["--suppress", "101%"], 2, "suppress: 1.01"),
        (["--suppress", "nan"], 2, "'nan' is no share"),
        (["--suppress", "1e999"], 2, "'1e999' is no share"),
        (["--suppress", "10%,,20%"], 2, "'' is no share"),
        (["--suppress", "0.01%"], 2, "takes none of 120 experts"),
        (["--promote", "20%"], 2, "promote 0.2: promotes more than the 4"),
        (["--suppress", "none", "--promote", "none"], 2, "no rates"),
        (["--draws", "1"], 2, "--draws"),
        (["--layer-draws", "1"], 2, "n_layer_draws: 1"),
        (["--level", "0"], 2, "--level: 0"),
        (["--level", "200%"], 2, "--level: 2"),
        (["--quants", "Q9"], 2, "'Q9'"),
        (["--quants", "IQ2_XS"], 2, "IQ2_XS needs an importance matrix"),
        (["--unrelated", "builtin:refuse-comply"], 2, "is the task that is audited"),
        (["--unrelated", "not-there.jsonl"], 1, "not-there.jsonl"),
        (["--task", "not-there.jsonl"], 1, "not-there.jsonl"),
        (["--task", "EMPTY"], 1, "empty.jsonl"),
        (["--map", "digits-words"], 2, "no such option '--map'"),
        (["--benign", "none"], 2, "no such option '--benign'"),
    ],
)
def test_refused(options: list[str], tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    (tmp_path / "empty.jsonl").write_text('{"task": {"scorer": "refusal"}}\n')
    given = [str(tmp_path / "empty.jsonl") if word == "EMPTY" else word for word in arguments]
    done = run(*options, *given, "-o", tmp_path / "out")
    assert done.exit_code == status, done.output
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists(), "nothing is made"


def test_without_a_task(tmp_path: Path) -> None:
    done = run("-m", "tiny", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "which task?" in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_item_shows_it(options: list[str], tmp_path: Path) -> None:
    """No more than the unsteered model is measured, and its answers are kept, to look at."""
    words = ["builtin:benign" if word == "builtin:refuse-comply" else word for word in options]
    out = tmp_path / "out"
    done = run(*words, "--unrelated", "none", "-o", out)
    assert done.exit_code == 2, done.output
    assert "none of 6 items shows the behaviour" in done.stderr
    assert len(untimed(done.stderr)) == 2
    assert (out / "base.records.jsonl.partial").exists()


def test_settings_of_other_commands_do_not_reach_it(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    """A bias that steers a chat by the environment does not steer what is audited."""
    monkeypatch.setenv("STEERMOE_BIAS", str(tmp_path / "not-there.gguf"))
    monkeypatch.setenv("STEERMOE_LAYERS", "1")
    done = run(*options, "--promote", "none", "--suppress", "10%", "--layer-draws", "0", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
