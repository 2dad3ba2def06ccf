"""`steermoe map recommend`: what it takes of a run of `steermoe eval`, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from steermoe_local import BiasFile, ExpertMap, read_bias, write_bias
from steermoe_local.cli import main
from steermoe_local.evaluation.tasks.builtin import open_task
from steermoe_local.learning.material import task_lines
from steermoe_local.maps.recommended import Recommended, with_recommended
from steermoe_local.models.embedded import behaviour
from steermoe_local.models.shipped_maps import map_path

DIGITS = map_path("digits-words")
FEW = ("-m", "tiny", "-t", "1", "-n", "8", "--benign", "none", "--n-text", "20")


def run(*words: Any, **env: str) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], env=env)


def evaluated(out: Path, *words: Any, **env: str) -> dict[str, Any]:
    few = () if "--no-controls" in words else ("--control-draws", 1)
    done = run("eval", *FEW, *few, "-o", out, *words, **env)
    assert done.exit_code == 0, done.output
    data: dict[str, Any] = json.loads((out / "summary.json").read_text("utf-8"))
    return data


def recommended_in(path: Path) -> Recommended:
    found = ExpertMap.load(path).recommended
    assert found is not None
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map that recommends nothing."""
    path = tmp_path_factory.mktemp("bare") / "bare.json"
    with_recommended(ExpertMap.load(DIGITS), None).save(path)
    return path


@pytest.fixture(scope="module")
def results(bare: Path) -> Path:
    """A run of steermoe eval with numbers and the capped rule."""
    evaluated(
        bare.parent / "results", "--map", bare, "--task", "builtin:digits-words", "--activate", 2, "--deactivate", 3,
        "--layers", "0-4", "--cap", 6,
    )  # fmt: skip
    return bare.parent / "results"


#
# numbers
#


def test_the_measured_choice_steers_from_then_on(bare: Path, results: Path, tmp_path: Path) -> None:
    out = tmp_path / "told.json"
    done = run("map", "recommend", bare, results, "-o", out)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("recommended: +2 -3 layers=0-4 cap=6; "), "the choice, and what it did"
    found, data = recommended_in(out), json.loads((results / "summary.json").read_text("utf-8"))
    assert found.choice == {"activate": 2, "deactivate": 3, "layers": "0-4", "cap": 6.0}
    sides = {side["name"]: side for side in data["sides"]}
    assert (found.unsteered, found.steered) == tuple(sides[name]["rate"]["value"] for name in ("unsteered", "towards"))
    assert found.perplexity == pytest.approx(sides["towards"]["fluency"]["perplexity_ratio"] - 1)
    assert (found.n_items, found.kl, found.command) == (8, sides["towards"]["fluency"]["kl"], data["command"])
    assert "towards digits" in found.task
    assert ExpertMap.load(out).sha256 == ExpertMap.load(bare).sha256
    steering = json.loads(run("run", "-m", "tiny", "-p", "Four?", "--map", out, "--json").stdout)["steering"]
    assert (steering["mode"], json.loads(steering["choice"])["deactivate"]) == ("capped", 3)


def test_the_file_of_the_summary_in_place_as_json_and_one_way(bare: Path, results: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    shutil.copy(bare, own)
    done = run("map", "recommend", own, results / "summary.json", "-o", own, "--one-way", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["map"] == str(own)
    assert told["recommended"] == recommended_in(own).to_dict()
    assert told["recommended"]["one_way"] is True
    refused = run("run", "-m", "tiny", "-p", "Four?", "--map", own, "--reverse")
    assert (refused.exit_code, "digits alone" in refused.stderr) == (2, True)
    done = run("map", "recommend", own, "--none", "-o", own)
    assert done.exit_code == 0, done.output
    assert own.read_bytes() == bare.read_bytes()


def test_either_a_summary_or_none(bare: Path, results: Path, tmp_path: Path) -> None:
    for words in ((), (results, "--none")):
        done = run("map", "recommend", bare, *words, "-o", tmp_path / "m.json")
        assert (done.exit_code, "SUMMARY" in done.stderr) == (2, True)
        assert not (tmp_path / "m.json").exists()


def test_another_map_is_refused(bare: Path, results: Path, tmp_path: Path) -> None:
    changed = replace(ExpertMap.load(bare), notes="another one")
    changed.save(tmp_path / "other.json")
    done = run("map", "recommend", tmp_path / "other.json", results, "-o", tmp_path / "m.json")
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert "measured another map" in done.stderr


def _drop(*path: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for name in path[:-1]:
            data = data[int(name) if isinstance(data, list) else name]
        del data[path[-1]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        _drop("steering"),
        _drop("sides"),
        _drop("provenance"),
        _drop("sides", "0", "rate"),
        _drop("sides", "1", "rate", "value"),
        lambda data: data["sides"].__setitem__(0, 7),
        lambda data: data.update(sides=[]),
        lambda data: data["sides"][1]["rate"].update(value="all"),
        lambda data: data["sides"][1]["rate"].update(value=7.0),
        lambda data: data["sides"][1]["rate"].update(n="many"),
        lambda data: data["steering"].update(activate=-3),
        lambda data: data["steering"].update(rank="best"),
        lambda data: data["steering"].update(layers="0-99"),
        lambda data: data["steering"].update(activate=0, deactivate=0),
        lambda data: data.update(controls=7),
    ],
)
def test_a_damaged_summary_is_one_line(
    change: Callable[[Any], None], bare: Path, results: Path, tmp_path: Path
) -> None:
    data = json.loads((results / "summary.json").read_text("utf-8"))
    change(data)
    (tmp_path / "summary.json").write_text(json.dumps(data), "utf-8")
    done = run("map", "recommend", bare, tmp_path, "-o", tmp_path / "m.json")
    assert done.exit_code == 1, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '{"steering": {}}', "\x00"])
def test_what_is_no_summary_is_one_line(text: str, bare: Path, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text, "utf-8")
    done = run("map", "recommend", bare, tmp_path, "-o", tmp_path / "m.json")
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert "summary.json of steermoe eval" in done.stderr


def test_where_it_steered_a_part_alone_is_refused(bare: Path, tmp_path: Path) -> None:
    rule = f'answer: "{bare}" +2 -2'
    evaluated(tmp_path / "part", "--steer", rule, "--no-controls", "--task", "builtin:digits-words")
    done = run("map", "recommend", bare, tmp_path / "part", "-o", tmp_path / "m.json")
    assert (done.exit_code, "without --preset and rules" in done.stderr) == (2, True)


def test_a_choice_that_moves_nothing_is_said_to(bare: Path, results: Path, tmp_path: Path) -> None:
    data = json.loads((results / "summary.json").read_text("utf-8"))
    for side in data["sides"]:
        side["rate"]["value"] = 0.5
    (tmp_path / "summary.json").write_text(json.dumps(data), "utf-8")
    done = run("map", "recommend", bare, tmp_path, "-o", tmp_path / "m.json")
    assert done.exit_code == 0, done.output
    assert "does not move the answers" in done.stderr
    assert "does not move" not in run("map", "recommend", bare, results, "-o", tmp_path / "m.json").stderr


#
# fitted values
#


def fitted(bare: Path, folder: Path, *, reverse: bool, **provenance: str) -> Path:
    """A bias file as steermoe fit makes it, of values that differ."""
    expert_map = ExpertMap.load(bare)
    table = expert_map.choose(2, 3) * np.linspace(4, 7, expert_map.rd.size).reshape(expert_map.rd.shape)
    said = {"map_sha256": expert_map.sha256, "fit": json.dumps({"reverse": reverse})} | provenance
    path = folder / f"fit-{reverse}.gguf"
    write_bias(BiasFile.from_soft(-table if reverse else table, expert_map.identity, 1.0, said), path)
    return path


@pytest.mark.parametrize("reverse", [False, True])
def test_fitted_values_are_taken_from_the_bias_that_was_measured(bare: Path, reverse: bool, tmp_path: Path) -> None:
    bias = fitted(bare, tmp_path, reverse=reverse)
    data = evaluated(tmp_path / "out", "--bias", bias, "--task", "builtin:digits-words")
    words = ("map", "recommend", bare, tmp_path / "out", "-o", tmp_path / "told.json")
    done = run(*words)
    assert (done.exit_code, f"{bias.name}; give it with --fitted FILE" in done.stderr) == (2, True)
    done = run(*words, "--fitted", bias)
    assert done.exit_code == 0, done.output
    assert "recommended: fitted values of 5 experts" in done.stdout
    found = recommended_in(tmp_path / "told.json")
    assert found.choice == ({"reverse": True} if reverse else {})
    rates = [side["rate"]["value"] for side in data["sides"]]
    assert [found.unsteered, found.steered] == [1 - rate if reverse else rate for rate in rates]
    assert found.steered is not None
    assert found.unsteered is not None
    assert found.steered > found.unsteered
    assert ("words" if reverse else "digits") in found.task
    made = tmp_path / "made.gguf"
    commands: tuple[tuple[int, tuple[Any, ...]], ...] = ((1, ()), (2, ("--mode", "soft", "--strength", 2)))
    for strength, options in commands:
        done = run("bias", "build", tmp_path / "told.json", "-o", made, *options)
        assert done.exit_code == 0, done.output
        assert np.array_equal(read_bias(made).dense(), strength * read_bias(bias).dense())
    # what they are measured to be once more is the same recommendation
    evaluated(tmp_path / "again", "--map", tmp_path / "told.json", "--task", "builtin:digits-words", "--no-controls")
    done = run("map", "recommend", tmp_path / "told.json", tmp_path / "again", "-o", tmp_path / "twice.json")
    assert done.exit_code == 0, done.output
    again = recommended_in(tmp_path / "twice.json")
    assert (again.choice, again.values, again.steered) == (found.choice, found.values, found.steered)


def test_other_bias_files_are_refused(bare: Path, results: Path, tmp_path: Path) -> None:
    def refused(out: Path, bias: Path, words: str, status: int = 2) -> None:
        done = run("map", "recommend", bare, out, "--fitted", bias, "-o", tmp_path / "m.json")
        assert (done.exit_code, len(done.stderr.splitlines())) == (status, 1), done.output
        assert words in done.stderr

    own = fitted(bare, tmp_path, reverse=False)
    evaluated(tmp_path / "out", "--bias", own, "--no-controls", "--task", "builtin:digits-words")
    refused(results, own, "leave out --fitted")
    refused(tmp_path / "out", fitted(bare, tmp_path, reverse=True), "not the bias file that")
    refused(tmp_path / "out", bare, str(bare), 1)
    refused(tmp_path / "out", tmp_path / "none.gguf", "none.gguf", 1)
    wrong: dict[str, dict[str, str]] = {"another map": {"map_sha256": "0" * 64}, "did not make": {"fit": ""}}
    for n, (words, said) in enumerate(wrong.items()):
        (folder := tmp_path / str(n)).mkdir()
        bias = fitted(bare, folder, reverse=False, **said)
        evaluated(folder / "out", "--bias", bias, "--no-controls", "--task", "builtin:digits-words")
        refused(folder / "out", bias, words)
    assert not (tmp_path / "m.json").exists()


#
# what a learnt steering brings
#


@pytest.fixture
def learnt(tmp_path: Path) -> Path:
    """The user's maps folder with the learnt steering `mine`, whose task and pairs are of its own."""
    folder = tmp_path / "maps" / "mine"
    folder.mkdir(parents=True)
    shutil.copy(DIGITS, folder / "map.json")
    task = open_task("builtin:digits-words")
    items = tuple(replace(item, id=f"own-{n}") for n, item in enumerate(task.items[:24]))
    (folder / "task.jsonl").write_text(task_lines(replace(task, name="mine", items=items)), "utf-8")
    shutil.copy(behaviour("digits-words").pairs, folder / "pairs.jsonl")
    return folder.parent


def test_eval_takes_the_task_and_the_pairs_of_a_learnt_steering(learnt: Path, tmp_path: Path) -> None:
    data = evaluated(tmp_path / "out", "--map", "mine", STEERMOE_MAPS=str(learnt))
    assert data["task"] == "mine"
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text("utf-8").splitlines()]
    assert {record["item"] for record in records if record["kind"] == "answer"} == {f"own-{n}" for n in range(8)}
    drawn = {control["kind"]: control["n"] for control in data["controls"]}
    assert drawn["superficial"] > 0, "drawn from its pairs"
    (learnt / "mine" / "pairs.jsonl").unlink()
    data = evaluated(tmp_path / "without", "--map", "mine", STEERMOE_MAPS=str(learnt))
    assert {control["kind"]: control["n"] for control in data["controls"]}["superficial"] == 0
    other = evaluated(
        tmp_path / "given",
        "--map",
        "mine",
        "--no-controls",
        "--task",
        "builtin:digits-words",
        STEERMOE_MAPS=str(learnt),
    )
    assert other["task"] != "mine", "what is given comes first"
    (learnt / "mine" / "task.jsonl").unlink()
    done = run("eval", *FEW, "--map", "mine", "-o", tmp_path / "none", STEERMOE_MAPS=str(learnt))
    assert (done.exit_code, "--task" in done.stderr) == (2, True)


def test_tune_takes_the_task_of_a_learnt_steering(learnt: Path, tmp_path: Path) -> None:
    words = "-m tiny -t 1 -n 16 --n-text 100 --benign none --max-ppl-increase 5% --max-activate 2 --max-deactivate 2"
    done = run("tune", *words.split(), "--map", "mine", "-o", tmp_path / "out", STEERMOE_MAPS=str(learnt))
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    records = (tmp_path / "out" / "records.jsonl").read_text("utf-8").splitlines()
    items = {record.get("item") for record in map(json.loads, records) if record["kind"] == "answer"}
    assert items <= {f"own-{n}" for n in range(16)}
    assert len(items) > 1
    assert data["about"]["settings"]["task"] == "mine"
