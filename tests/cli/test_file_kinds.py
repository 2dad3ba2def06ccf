"""A file that stands where another kind belongs is called what it is, by every command that reads one."""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from steermoe_local._util import file_kinds
from steermoe_local._util.file_kinds import DATA, FileKind, kind_of
from steermoe_local.cli import main
from steermoe_local.detection.checkpoint import Checkpoint, CheckpointFile
from steermoe_local.maps.export import easysteer_config, easysteer_spec, plain_ranking, steermoe_csv
from steermoe_local.maps.routing_sums import RoutingSums
from steermoe_local.models.embedded import embedded_model
from steermoe_local.pairs.pairs import Pair, save_pairs
from steermoe_local.steering.bias_file import write_bias
from tests.support import random_pairs
from tests.support.builders import hard_bias, random_counts, table_map, write_gguf
from tests.support.paths import GOLDEN

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


def run(*args: Any, **kwargs: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], **kwargs)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each kind under a name that tells nothing, by the name of its constant."""
    folder = tmp_path_factory.mktemp("kinds")
    made: dict[str, Path] = {}

    def at(name: str, data: bytes | str | None = None) -> Path:
        made[name] = folder / f"file-{len(made)}"
        if data is not None:
            made[name].write_bytes(data.encode() if isinstance(data, str) else data)
        return made[name]

    shutil.copy(embedded_model(), at("MODEL"))
    write_bias(hard_bias(), at("BIAS"))
    write_gguf(at("CONTROL_VECTOR"), "controlvector", {}, {"direction.1": np.ones(4, np.float32)})
    write_gguf(at("IMATRIX"), "llama", {"general.type": "imatrix"}, {"x": np.ones(4, np.float32)})
    write_gguf(at("ADAPTER"), "llama", {"general.type": "adapter"}, {"x": np.ones(4, np.float32)})
    write_gguf(at("PROJECTOR"), "clip", {"general.type": "mmproj"}, {"x": np.ones(4, np.float32)})
    table_map([[0.5, -0.5]]).save(at("MAP"))
    random_counts(1).save(at("COUNTS"))
    random_pairs.write(at("PAIR_COUNTS"), random_pairs.random_pairs(1))
    with open(at("TRACE"), "wb") as file:
        np.savez(file, meta="{}", texts=np.zeros(1, np.int32), experts=np.zeros((1, 1, 1)), weights=np.zeros((1, 1, 1)))
    kept = CheckpointFile(folder / "c")
    kept.save(Checkpoint(np.zeros((2, 3, 4), np.int64), np.zeros((2, 3), np.int64), RoutingSums.zeros((3, 4))), {})
    kept.path.rename(at("CHECKPOINT"))
    save_pairs([Pair("a", "one", "1", "one", "1")], at("PAIRS"))
    at("PROMPTS", '{"prompt": "x", "positive": "y"}\n')
    at("TASK", '{"task": {"scorer": "contains"}}\n{"prompt": "x", "answer": "y"}\n')
    at("ANSWERS", '{"id": "a", "text": "x", "finish_reason": "stop", "usage": {}}\n')
    at("PARTIAL_ANSWERS", '{"format": "steermoe-partial-answers", "version": 1, "settings": {}}\n')
    at("PLAN", '{"rules": ["thinking: none"]}')
    at("CHAT", '{\n "format": "steermoe-chat",\n "version": 1}')
    shutil.copy(GOLDEN / "frames" / "pandas-2.2.3.pkl", at("RANKING"))
    at("RESULTS", json.dumps({"task": {}, "positive": {}, "negative": {}, "sides": {}, "command": []}, indent=1))
    at("RESULTS_SWEEP", json.dumps({"about": {}, "grid": {}, "points": ["x" * 70_000], "command": []}, indent=1))
    at("RESULTS_LONG", json.dumps({"task": {}, "sides": {}, "effects": ["x" * 70_000]}, indent=1))
    at("RESULTS_RECORDS", '{"id": "a", "bias": "unsteered", "kind": "answer", "text": "x"}\n')
    at("EXPORTED_CSV", steermoe_csv(table_map([[0.5, -0.5]])))
    at("EXPORTED", plain_ranking(table_map([[0.5, -0.5]])))
    at("EASYSTEER", easysteer_config(np.array([[1, -1]], np.int8)))
    at("EASYSTEER_SPEC", easysteer_spec("x.json"))
    at("SQUAD", json.dumps({"version": "v2.0", "data": []}))
    at("SAFETY", '{"prompt": "x", "response": "y", "is_safe": true}\n')
    at("LFS", POINTER)
    at("PARQUET", b"PAR1" + bytes(20))
    at("COMPRESSED", gzip.compress(b"{}"))
    at("ARCHIVE", None)
    shutil.make_archive(str(folder / "z"), "zip", folder, made["LFS"].name)
    (folder / "z.zip").rename(made["ARCHIVE"])
    at("SAFETENSORS", (2).to_bytes(8, "little") + b"{}")
    at("WEB_PAGE", "\n<!DOCTYPE html>\n<html></html>")
    with zipfile.ZipFile(at("WEIGHTS"), "w") as weights:
        weights.writestr("archive/data.pkl", b"\x80\x02.")
    with tarfile.open(at("TAR"), "w") as packed:
        packed.add(made["LFS"])
    at("UTF16_UNMARKED", "prompt,a\n".encode("utf-16-le"))
    at("UTF16", "a,b\n".encode("utf-16"))
    at("PDF", b"%PDF-1.7\n")
    at("PICTURE", b"\x89PNG\r\n\x1a\n" + bytes(20))
    return made


def kind_named(name: str) -> FileKind:
    found = getattr(file_kinds, name if hasattr(file_kinds, name) else name.split("_")[0])
    assert isinstance(found, FileKind)
    return found


def test_each_kind_is_recognized(files: dict[str, Path]) -> None:
    assert {name: kind_of(path) for name, path in files.items()} == {name: kind_named(name) for name in files}
    known = {name for name, value in vars(file_kinds).items() if isinstance(value, FileKind)}
    assert known - {"OTHER"} <= set(files)


def test_what_is_no_kind(tmp_path: Path) -> None:
    """What is not known, cannot be read or is not a file; a damaged file is left to its reader."""
    for number, data in enumerate((b"", b"\n", b"hello", b"[]", b"{", b'{"x": 1}', b"PK\x03\x04", b"\xff\xfe", b"1,2")):
        path = tmp_path / str(number)
        path.write_bytes(data)
        assert kind_of(path) is None, data
    assert kind_of(tmp_path) is None
    assert kind_of(tmp_path / "none") is None
    assert kind_of("a\0b") is None


# Where a file is read, and the kinds that may stand there.
READERS: dict[str, tuple[list[str], set[str]]] = {
    "model": (["info", "FILE"], {"MODEL"}),
    "model to run": (["run", "-m", "FILE", "-p", "x"], {"MODEL"}),
    "bias": (["run", "-m", "tiny", "-p", "x", "--bias", "FILE"], {"BIAS"}),
    "bias to inspect": (["bias", "show", "FILE"], {"BIAS"}),
    "map": (["map", "show", "FILE"], {"MAP"}),
    "map to steer by": (["run", "-m", "tiny", "-p", "x", "--activate", "1", "--map", "FILE"], {"MAP"}),
    "counts": (["map", "merge", "FILE", "-o", "OUT"], {"COUNTS", "PAIR_COUNTS"}),
    "per-pair counts": (["map", "stats", "MAP", "--per-pair", "FILE", "-o", "OUT"], {"PAIR_COUNTS"}),
    "pairs": (["detect", "-m", "tiny", "--pairs", "FILE", "-o", "OUT"], {"PAIRS"}),
    "pairs to check": (["pairs", "check", "FILE", "-m", "tiny"], {"PAIRS"}),
    "prompts": (["run", "-m", "tiny", "--n-prompts", "FILE", "-n", "1"], {"PROMPTS", "SAFETY"}),
    "a task": (
        ["eval", "-m", "tiny", "--map", "digits-words", "--task", "FILE", "-o", "OUT"],
        {"TASK", "PROMPTS", "SAFETY"},
    ),
    "a neutral text": (["eval", "-m", "tiny", "--map", "digits-words", "--neutral", "FILE", "-o", "OUT"], set()),
    "ranking": (["map", "import", "FILE", "-o", "OUT", "--model-id", "a/b", "--behaviour", "c"], {"RANKING"}),
    "squad": (["pairs", "faithfulness", "--squad", "FILE", "-o", "OUT"], {"SQUAD", "PARQUET", "COMPRESSED"}),
    "safety": (["pairs", "safety", "--data", "FILE", "-o", "OUT"], {"SAFETY", "PARQUET", "COMPRESSED"}),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_every_other_kind(reader: str, files: dict[str, Path], tmp_path: Path) -> None:
    words, own = READERS[reader]
    for name, path in files.items():
        if name in own or (reader in ("squad", "safety") and kind_named(name) in DATA):
            continue
        given = {"FILE": str(path), "OUT": str(tmp_path / "out"), "MAP": str(files["MAP"])}
        result = run(*[given.get(word, word) for word in words])
        assert result.exit_code in (1, 2), (name, result.output)
        assert result.stderr.count("\n") == 1, (name, result.output)
        assert str(path) in result.stderr
        kind = kind_named(name)
        assert kind.what in result.stderr, (name, result.stderr)
        assert kind.use in result.stderr, (name, result.stderr)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["config", "show", "run"],
        ["run", "-m", "tiny", "-f", "FILE"],
        ["pairs", "superficial", "FILE", "-o", "OUT"],
        ["pairs", "from-csv", "FILE", "--positive-column", "a", "--negative-column", "b", "-o", "OUT"],
        ["eval", "-m", "tiny", "--map", "digits-words", "--neutral", "FILE", "-o", "OUT"],
        ["run", "-m", "tiny", "--n-prompts", "-"],
    ],
)
def test_pointers_elsewhere(words: list[str], files: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """A Git LFS pointer is called one wherever a file is read, also where any text may stand."""
    if words[0] == "config":
        monkeypatch.setenv("STEERMOE_CONFIG", str(files["LFS"]))
    given = {"FILE": str(files["LFS"]), "OUT": str(tmp_path / "out")}
    result = run(*[given.get(word, word) for word in words], input=POINTER if words[-1] == "-" else None)
    assert result.exit_code in (1, 2), result.output
    assert "Git LFS pointer" in result.stderr
    assert "git lfs pull" in result.stderr
    assert result.stderr.count("\n") == 1


def test_damaged_files_of_the_right_kind_stay_damaged(files: dict[str, Path], tmp_path: Path) -> None:
    """Their reader says what is wrong in them, as before."""
    path = tmp_path / "m.json"
    path.write_text(files["MAP"].read_text().replace('"rd"', '"dr"'))
    assert "rd: missing" in run("map", "show", path).stderr
    path.write_text('{"positive": "a", "negative": "b"}')
    assert "positive_target: missing" in run("pairs", "check", path, "-m", "tiny").stdout
    path.write_bytes(files["MODEL"].read_bytes()[:1000])
    result = run("info", path)
    assert result.exit_code == 1
    assert "damaged GGUF" in result.stderr
