"""`steermoe transfer`: its files, its JSON, and how it goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local import ExpertMap, model_info
from steermoe_local.cli import main
from steermoe_local.evaluation.studies.transfer import quantize
from steermoe_local.evaluation.studies.transfer import transfer as module
from steermoe_local.models.embedded import behaviour, data_folder

FILES = ["report.md", "summary.json", "columns.jsonl", "transfer.png", "transfer.svg"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A task, a neutral text and pairs of a few lines."""
    folder = tmp_path_factory.mktemp("data")
    neutral = (data_folder() / "neutral.heldout.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "neutral.jsonl").write_text("".join(neutral[:6]))
    pairs = behaviour("digits-words").pairs.read_text("utf-8").splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(pairs[:6]))
    files = ["--neutral", str(folder / "neutral.jsonl"), "--pairs", str(folder / "pairs.jsonl")]
    return ["-m", "tiny", "--map", "digits-words", "-t", "1", "-np", "4", "-n", "4", *files]


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, ["transfer", *map(str, args)])


@pytest.fixture(scope="module")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("run") / "out"
    return run(*options, "--quants", "Q8_0,q4_0", "--keep", "-o", out, "--json"), out


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without matplotlib; drawing takes longer than measuring."""
    monkeypatch.setattr("steermoe_local.evaluation.reports.figure.missing_matplotlib", lambda: "no pictures today")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_its_files(finished: tuple[Result, Path]) -> None:
    done, out = finished
    assert done.exit_code == 0, done.output
    maps = {f"{name}.map.json" for name in ("base", "Q8_0", "Q4_0")}
    records = {f"{name}.records.jsonl" for name in ("base", "Q8_0", "Q4_0")}
    assert names(out) == {*FILES, "models"} | maps | records
    assert names(out / "models") == {f"tiny-moe-{n}.gguf{end}" for n in ("Q8_0", "Q4_0") for end in ("", ".json")}
    assert model_info(out / "models" / "tiny-moe-Q4_0.gguf").file_type == "Q4_0"
    assert (out / "transfer.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "transfer.svg").read_text("utf-8")
    answers = [json.loads(line) for line in (out / "Q4_0.records.jsonl").read_text("utf-8").splitlines()]
    assert {record["kind"] for record in answers} == {"answer", "text"}


def test_its_json(finished: tuple[Result, Path]) -> None:
    done, out = finished
    data = json.loads(done.stdout)
    assert data == json.loads((out / "summary.json").read_text("utf-8"))
    assert [column["name"] for column in data["columns"]] == ["Q8_0", "Q4_0"]
    assert data["provenance"]["n_pairs"] == 6
    assert data["provenance"]["model"]["quantization"] == "F16"
    assert data["provenance"]["steering"]["map"] == "digits-words.json"
    assert re.fullmatch(r"[0-9a-f]{64}", data["provenance"]["base_sha256"])
    for column in (data["base"], *data["columns"]):
        assert column["own_map_sha256"] == ExpertMap.load(out / f"{column['name']}.map.json").sha256
    assert data["columns"][0]["map"]["top_n"] == 20
    assert "not those" in data["warnings"][0]
    assert str(out) not in done.stdout
    assert data["command"].startswith("steermoe transfer --model tiny --map digits-words")
    assert "--quants Q8_0,q4_0 --keep" in data["command"]


def test_the_report(finished: tuple[Result, Path]) -> None:
    text = (finished[1] / "report.md").read_text("utf-8")
    assert "# digits-words over quantizations of tiny-moe.gguf" in text
    assert "(transfer.png)" in text
    for name in ("base (F16)", "Q8\\_0", "Q4\\_0"):
        assert f"| {name} |" in text


def rounded(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: rounded(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [rounded(value) for value in data]
    return round(data, 4) if isinstance(data, float) else data


def interrupted(options: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """A run that ends while the second quantization is measured."""
    real = module._Study.column

    def column(self: Any, evaluator: Any, name: str, *rest: Any) -> Any:
        if name == "Q4_0":
            evaluator.measure([None], what=name)
            raise KeyboardInterrupt
        return real(self, evaluator, name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(module._Study, "column", column)
        return run(*options, "--quants", "Q8_0,Q4_0", "-o", out)


def test_interrupted_and_resumed(
    finished: tuple[Result, Path],
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_pictures: None,
) -> None:
    out = tmp_path / "out"
    done = interrupted(options, out, monkeypatch)
    assert done.exit_code == 130
    assert "Q4_0.records.jsonl.partial; " in done.stderr
    assert "--resume" in done.stderr
    assert "2 models " in done.stderr
    assert {"columns.jsonl.partial", "Q4_0.records.jsonl.partial", "models"} <= names(out)
    assert not {"report.md", "summary.json"} & names(out)

    done = run(*options, "--quants", "Q8_0,Q4_0", "-o", out)
    assert done.exit_code == 2
    assert "columns.jsonl.partial: " in done.stderr
    assert "--resume" in done.stderr
    assert "--restart" in done.stderr
    done = run(*options, "--quants", "Q8_0,Q4_0", "-o", out, "--resume", "--top-n", 5)
    assert done.exit_code == 2
    assert "top_n 20, now it is 5" in done.stderr

    measured: list[str] = []
    real = module._Study.column

    def column(self: Any, evaluator: Any, name: str, *rest: Any) -> Any:
        measured.append(name)
        assert evaluator.n_kept > 0, "what was answered before the interrupt"
        return real(self, evaluator, name, *rest)

    monkeypatch.setattr(module._Study, "column", column)
    done = run(*options, "--quants", "Q8_0,Q4_0", "-o", out, "--resume", "--json")
    assert done.exit_code == 0, done.output
    assert measured == ["Q4_0"]
    assert not any(name.endswith(".partial") for name in names(out))
    assert not (out / "models").exists(), "without --keep nothing is kept"
    one, two = json.loads(done.stdout), json.loads(finished[0].stdout)
    for column_ in (*one["columns"], one["base"], *two["columns"], two["base"]):
        column_["file"]["seconds"] = column_["own_map_sha256"] = None
    # the neutral text was predicted in other batches, which round otherwise
    assert rounded((one["columns"], one["base"])) == rounded((two["columns"], two["base"]))
    assert (out / "base.records.jsonl").read_bytes() == (finished[1] / "base.records.jsonl").read_bytes()


def test_restart(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None) -> None:
    out = tmp_path / "out"
    assert interrupted(options, out, monkeypatch).exit_code == 130
    done = run(*options, "--quants", "Q8_0", "--pairs", "none", "--neutral", "none", "-o", out, "--restart")
    assert done.exit_code == 0, done.output
    assert not any(name.endswith(".partial") for name in names(out)), "of models that this run does not have, too"
    assert "The base's map keeps its swing" in done.stdout or "no effect that could carry over" in done.stdout
    assert "note: no pairs: the quantizations' own maps are not made" in done.stdout
    assert f"written: {out / 'report.md'}" in done.stdout
    assert "RD Pearson" not in done.stdout
    assert "same sets" in done.stdout, "routing is compared on the task's prompts"
    *announced, pictures = done.stderr.splitlines()
    assert all("shorter with" in line or line.startswith("transfer: ") for line in announced)
    assert pictures == "no pictures today"
    assert "transfer.png" not in (out / "report.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--quants", "Q8_0,Q9"], 2, "'Q9'"),
        (["--quants", "IQ2_XS"], 2, "IQ2_XS needs an importance matrix"),
        (["--quants", ""], 2, "--quants"),
        (["--pairs", "not-there.jsonl"], 1, "not-there.jsonl"),
        (["--map", "not-there", "--task", "builtin:neutral"], 2, "not-there: "),
        (["--bias", "b.gguf"], 2, "no such option '--bias'"),
        (["--reverse"], 2, "no such option '--reverse'"),
    ],
)
def test_refused(options: list[str], tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    done = run(*options, *arguments, "-o", tmp_path / "out")
    assert done.exit_code == status, done.output
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_room_on_the_disk(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    done = run(*options, "--quants", "Q8_0", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "Q8_0 " in done.stderr
    assert "5.4 MB, but 0.0 MB" in done.stderr
    assert names(tmp_path / "out") == set(), "nothing to go on from"


def test_a_quantized_base(finished: tuple[Result, Path], options: list[str], tmp_path: Path, no_pictures: None) -> None:
    base = finished[1] / "models" / "tiny-moe-Q4_0.gguf"
    rest = [*options[2:], "--neutral", "none", "--pairs", "none", "--quants", "Q8_0", "-n", "1"]
    done = run("-m", base, *rest, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "warning: " in done.stderr
    assert "quantized already (Q4_0)" in done.stderr
    assert "quantized already" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_the_defaults() -> None:
    """The help's list is the library's."""
    from steermoe_local.cli.commands.transfer import transfer
    from steermoe_local.evaluation.studies.transfer.quantize import QUANTS

    defaults = {option.name: option.default for option in transfer.params}
    assert tuple(str(defaults["quants"]).split(",")) == QUANTS
    assert defaults["n_agreement"] == module.N_AGREEMENT
