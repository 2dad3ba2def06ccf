"""A full disk: exit status 1 and one line, wherever it is met, and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from steermoe_local.cli import main
from steermoe_local.models.embedded import behaviours, embedded_model
from steermoe_local.models.shipped_maps import map_path

resource = pytest.importorskip("resource")

PROGRAM = [sys.executable, "-P", "-c", "from steermoe_local.cli import main; main(prog_name='steermoe')"]
MAP = str(map_path("digits-words"))
PAIRS = str(behaviours()[0].pairs)
FAST = ("-m", "tiny", "-t", "1")
MEASURED = ("--map", "digits-words", "-np", "1", "-n", "3")
WRITERS: dict[str, tuple[str, ...]] = {
    "bias build": ("bias", "build", MAP, "--activate", "2", "-o", "out"),
    "map export": ("map", "export", MAP, "--format", "json", "-o", "out"),
    "map card": ("map", "card", MAP, "--base-model", "a/b", "-o", "out"),
    "map plot": ("map", "plot", MAP, "-o", "out.png"),
    "run": ("run", *FAST, "--temp", "0", "-n", "4", "--n-prompts", "questions.jsonl", "-o", "out"),
    "detect": ("detect", *FAST, "--pairs", PAIRS, "-o", "out", "--per-pair", "pairs.npz", "--counts", "counts.npz"),
    "trace": ("trace", *FAST, "--temp", "0", "-n", "4", "--prompts", "questions.jsonl", "-o", "out.npz"),
    "trace csv": ("trace", *FAST, "--pairs", PAIRS, "-o", "out.csv"),
    "trace parquet": ("trace", *FAST, "--pairs", PAIRS, "-o", "out.parquet"),
    "condition fit": (
        *("condition", "fit", *FAST, "--pairs", PAIRS, "--over", "last:1", "--draws", "19"),
        *("-o", "out", "--write-map", "lean.json"),
    ),
    "detect by phase": (
        *("detect", *FAST, "--pairs", PAIRS, "-o", "out", "--per-pair", "pairs.npz", "--counts", "counts.npz"),
        *("--phase", "first:1"),
    ),
    "attribute": (
        *("attribute", *FAST, "--map", MAP, "--pairs", PAIRS, "--candidates", "4", "--draws", "32", "--items", "4"),
        *("-o", "out"),
    ),
    "eval": ("eval", *FAST, *MEASURED, "-o", "out"),
    "sweep": ("sweep", *FAST, *MEASURED, "--activate", "0,1", "-o", "out"),
    "experiment": ("experiment", "random10", *FAST, *MEASURED, "--draws", "2", "-o", "out"),
    "audit": ("audit", *FAST, "--task", "builtin:digits-words", "-n", "4", "--draws", "2", "-o", "out"),
    "transfer": ("transfer", *FAST, *MEASURED, "--pairs", "none", "--quants", "Q8_0", "-o", "out"),
    "config set": ("config", "set", "threads", "2"),
}


def limit(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def run(
    words: Sequence[str], folder: Path, size: int | None = None, **streams: int
) -> subprocess.CompletedProcess[str]:
    """The program in a folder, unable to write files of more than `size` bytes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run(
        [*PROGRAM, *words],
        cwd=folder,
        env=os.environ | {"STEERMOE_CONFIG": str(folder / "config.toml"), "TMPDIR": "/dev/shm"},
        stdin=subprocess.DEVNULL,
        preexec_fn=None if size is None else limit(size),
        text=True,
        check=False,
        **pipes,  # type: ignore[call-overload]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = behaviours()[0].heldout.read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "questions.jsonl").write_text("".join(lines[:20]), "utf-8")
    (tmp_path / "config.toml").write_text("")
    return tmp_path


@pytest.mark.parametrize("command", WRITERS)
def test_no_room(command: str, folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    done = run(WRITERS[command], folder, 0)
    assert done.returncode == 1, done.stderr
    *notes, error = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert os.strerror(errno.EFBIG) in error
    assert not [line for line in notes if "Traceback" in line]
    left = {path.name for path in folder.iterdir()} - before
    assert left <= {"out", "out.partial.pairs"}, "an incomplete file is there"
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("command", ["run", "detect", "eval"])
def test_once_there_is_room_again(command: str, folder: Path) -> None:
    """The disk is full in the middle; --resume ends with what a run with room gives."""
    words = [*WRITERS[command], "--seed", "1"] if command == "run" else list(WRITERS[command])
    sizes = {"run": 4000, "detect": 11000, "eval": 5000}
    done = run(words, folder, sizes[command])
    assert done.returncode == 1, done.stderr
    assert "--resume" in done.stderr
    kept = [path for path in folder.rglob("*") if ".partial" in path.name]
    assert kept
    done = run([*words, "--resume"], folder)
    assert done.returncode == 0, done.stderr
    assert not [path for path in folder.rglob("*") if ".partial" in path.name or path.name.startswith(".")]
    if command == "run":
        other = run([*words, "-o", "other"], folder)
        assert other.returncode == 0, other.stderr
        assert (folder / "out").read_bytes() == (folder / "other").read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("--version",),
        ("map", "--help"),
        ("map", "show", MAP),
        ("map", "show", MAP, "--json"),
        ("info", "tiny"),
        ("models",),
        ("presets",),
        ("config", "path"),
        ("run", *FAST, "-n", "4", "-p", "one"),
        ("run", *FAST, "-n", "4", "--n-prompts", "questions.jsonl"),
    ],
    ids=" ".join,
)
def test_behind_stdout(words: tuple[str, ...], folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = run(words, folder, stdout=full.fileno())
    assert done.returncode == 1, done.stderr
    *announced, error = done.stderr.strip().splitlines()
    assert [line.split(":")[0] for line in announced] == (["run"] if "--n-prompts" in words else [])
    assert error.startswith("error: ")
    assert os.strerror(errno.ENOSPC) in error


def test_a_cache_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of models' facts saves time and nothing else."""
    shutil.copyfile(embedded_model(), folder / "m.gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    done = run(("models", "--models-dir", str(folder)), folder, 0)
    assert done.returncode == 0, done.stderr
    assert "m" in done.stdout
    assert not [path for path in (folder / "cache").rglob("*") if path.is_file()]


def test_a_wrong_path_is_wrong_usage(folder: Path) -> None:
    """Status 2, as before: the command line names a place that cannot be."""
    for output in ("no/such/folder/out", "x" * 300, "questions.jsonl/out"):
        words = [output if word == "out" else word for word in WRITERS["bias build"]]
        done = CliRunner().invoke(main, [str(folder / word) if word == output else word for word in words])
        assert done.exit_code == 2, done.stderr
