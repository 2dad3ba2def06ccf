"""steermoe tune: its files, its exit status, an interruption, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.steering.bias_file import read_bias
from tests.support.interrupting import interrupted_after

MAP = "tune -m tiny --map digits-words -t 1 -n 24 --n-text 100 --benign none"
BUDGET = "--max-ppl-increase 5%"


def start(line: str, *more: str) -> Result:
    return CliRunner().invoke(main, [*line.split(), *more])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The shipped map, tuned on half of 24 prompts."""
    folder = tmp_path_factory.mktemp("tune") / "out"
    return folder, start(f"{MAP} {BUDGET} --seed 1", "-o", str(folder))


def test_the_files(tuned: tuple[Path, Result]) -> None:
    folder, result = tuned
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "bias.gguf",
        "records.jsonl",
        "report.html",
        "report.md",
        "summary.json",
        "tuning.png",
        "tuning.svg",
    ]
    data = json.loads((folder / "summary.json").read_text("utf-8"))
    assert data["outcome"] == "found"
    assert data["about"]["seed"] == 1
    assert data["heldout"]["gain"]["low"] > 0
    assert data["heldout"]["gain"]["n"] == 12
    assert 0 < data["n_measured"] <= data["n_tried"] < 30 < data["n_grid"]
    report = (folder / "report.md").read_text("utf-8")
    for words in (
        "pick, held out",
        "## The way",
        "## Why it stopped",
        "12 were held out",
        "steermoe tune --model tiny",
    ):
        assert words in report, words
    assert f"of {data['n_grid']} choices were looked at" in result.stdout


def test_the_bias_says_where_it_comes_from(tuned: tuple[Path, Result]) -> None:
    folder, _ = tuned
    data = json.loads((folder / "summary.json").read_text("utf-8"))
    bias = read_bias(folder / "bias.gguf")
    choice = json.loads(bias.provenance["choice"])
    assert {name: choice[name] for name in ("activate", "deactivate")} == {
        name: data["chosen"][name] for name in ("activate", "deactivate")
    }
    assert bias.provenance["map_sha256"] == data["about"]["steering"]["map_sha256"]
    shown = CliRunner().invoke(main, ["bias", "show", str(folder / "bias.gguf"), "-m", "tiny"])
    assert "made for tiny: yes" in shown.output or shown.exit_code == 0


def test_resumed(tmp_path: Path) -> None:
    line = f"{MAP} {BUDGET} --json -o"
    whole = json.loads(start(line, str(tmp_path / "whole")).stdout)
    with interrupted_after(40):
        assert start(line, str(tmp_path / "out")).exit_code == 130
    assert not (tmp_path / "out" / "bias.gguf").exists()
    data = json.loads(start(line, str(tmp_path / "out"), "--resume").stdout)
    for name in ("trials", "chosen", "heldout", "why", "n_answers"):
        assert data[name] == whole[name]
    biases = [(tmp_path / name / "bias.gguf").read_bytes() for name in ("whole", "out")]
    assert biases[0] == biases[1]


def test_the_other_side_under_a_strength(tmp_path: Path) -> None:
    """--reverse, --strength and --layers hold for all choices, and stand in the bias."""
    line = f"{MAP} {BUDGET} --reverse --strength 8 --max-activate 2 --max-deactivate 2 --write"
    result = start(line, str(tmp_path / "words.gguf"), "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    bias = read_bias(tmp_path / "words.gguf")
    choice = json.loads(bias.provenance["choice"])
    assert bias.mode == "soft"
    assert (choice["reverse"], choice["scale"]) == (True, 8)
    assert max(choice["activate"], choice["deactivate"]) <= 2
    assert not (tmp_path / "out" / "bias.gguf").exists()
    data = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    assert data["heldout"]["steered"]["value"] < data["heldout"]["unsteered"]["value"]


def test_no_effect_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    """Numbers in digits have nothing to do with answers from memory: status 1, a report, and no bias of before."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "bias.gguf").write_text("of an earlier search")
    line = "tune -m tiny --task builtin:neutral -t 1 -n 12 --n-text 100 --max-kl 1e-9 --benign none"
    more = ("--max-activate", "4", "--max-deactivate", "0", "--map", str(map_path("digits-words")), "-o", str(out))
    result = start(line, *more)
    assert result.exit_code == 1, result.output
    assert "no bias is written" in result.stdout
    assert not (out / "bias.gguf").exists()
    data = json.loads((out / "summary.json").read_text("utf-8"))
    assert data["outcome"] in ("nothing inside the budget", "no effect")
    assert data["bias"] is None
    again = start(f"{line} --json", *more)
    assert again.exit_code == 1
    assert json.loads(again.stdout)["outcome"] == data["outcome"]
    assert "no bias" in again.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("", "--max-ppl-increase, --max-kl"),
        ("--max-refusal-increase 5%", "--max-ppl-increase, --max-kl"),
        ("--max-ppl-increase x", "'x'"),
        ("--max-ppl-increase -5%", "'-5%'"),
        ("--max-ppl-increase nan", "'nan'"),
        ("--max-kl -1", "--max-kl"),
        (f"{BUDGET} --neutral none", "--neutral FILE"),
        (f"{BUDGET} --max-refusal-increase 5%", "--benign FILE"),
        (f"{BUDGET} -n 7", "7 items"),
        (f"{BUDGET} --choosing-share 0", "share: 0.0"),
        (f"{BUDGET} --layers 9", "layer 9"),
        (f"{BUDGET} --activate 3", "'--activate'"),
        (f"{BUDGET} --max-choices 0", "--max-choices"),
        (f"{BUDGET} --max-choices 9 --exhaustive", "--max-choices is for"),
        (f"{BUDGET} --write nowhere/at/all.gguf", "nowhere/at"),
    ],
)
def test_refused(more: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = start(f"{MAP} {more}", "-o", str(tmp_path / "out"))
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*")), "nothing is made"


def test_a_bias_file_cannot_be_tuned(tmp_path: Path) -> None:
    CliRunner().invoke(
        main, ["bias", "build", str(map_path("digits-words")), "--activate", "1", "-o", str(tmp_path / "b.gguf")]
    )
    line = f"tune -m tiny --bias {tmp_path / 'b.gguf'} --task builtin:digits-words {BUDGET}"
    result = start(line, "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "give --map MAP" in result.stderr
