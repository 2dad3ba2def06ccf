"""Two processes on one output: the second is refused and told who writes, and nothing that the first has is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.models.embedded import behaviours
from tests.support.held import HELD, hold, patience

FAST = ("-m", "tiny", "-t", "1")
MEASURED = ("--map", "digits-words", "-np", "1", "-n", "3")
# the command without its output, the output, and the file that keeps what is done
COMMANDS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "run": (("run", *FAST, "--temp", "0", "-n", "4", "-np", "1"), "out.jsonl", "out.jsonl.partial"),
    "detect": (("detect", *FAST, "-b", "64", "--phase", "first:1"), "out.json", "out.json.partial.npz"),
    # keeps nothing: its lock says that it is at work
    "trace": (("trace", *FAST, "--temp", "0", "-n", "4", "-np", "1"), "out.npz", ".out.npz.lock"),
    "condition fit": (
        ("condition", "fit", *FAST, "-b", "64", "--over", "last:1"),
        "out.json",
        "out.json.partial.npz",
    ),
    "attribute": (
        ("attribute", *FAST, "--map", "digits-words", "--candidates", "4", "--draws", "32", "--items", "4"),
        "out.json",
        "out.json.partial",
    ),
    "eval": (("eval", *FAST, *MEASURED), "out", "out/records.jsonl.partial"),
    "sweep": (("sweep", *FAST, *MEASURED, "--activate", "0,1"), "out", "out/records.jsonl.partial"),
    "tune": (
        ("tune", *FAST, *MEASURED, "-n", "12", "--max-ppl-increase", "50%", "--max-choices", "2"),
        "out",
        "out/records.jsonl.partial",
    ),
    "experiment": (("experiment", "random10", *FAST, *MEASURED, "--draws", "2"), "out", "out/records.jsonl.partial"),
    "audit": (
        ("audit", *FAST, "--task", "builtin:digits-words", "-np", "1", "-n", "4", "--draws", "2", "--suppress", "10%"),
        "out",
        "out/base.records.jsonl.partial",
    ),
    "transfer": (
        ("transfer", *FAST, *MEASURED, "--pairs", "none", "--quants", "Q8_0"),
        "out",
        "out/base.records.jsonl.partial",
    ),
}


def words_of(command: str, folder: Path, output: str = "") -> list[str]:
    words, name, _ = COMMANDS[command]
    inputs = {
        "run": ["--n-prompts", str(folder / "questions.jsonl")],
        "detect": ["--pairs", str(behaviours()[0].pairs)],
        "trace": ["--prompts", str(folder / "questions.jsonl")],
        "condition fit": ["--pairs", str(behaviours()[0].pairs)],
        "attribute": ["--pairs", str(behaviours()[0].pairs)],
    }
    return [*words, *inputs.get(command, []), "-o", str(folder / (output or name))]


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@contextmanager
def running(command: str, folder: Path, until: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """The command, held once a part of its work is kept."""
    lines = behaviours()[0].heldout.read_text("utf-8").splitlines(keepends=True)
    (folder / "questions.jsonl").write_text("".join(lines[:5]), "utf-8")
    recorders = dict.fromkeys(("detect", "condition fit"), "checkpoints")
    places: dict[str, Any] = {(recorders | {"attribute": "parts"}).get(command, "answers"): 1}
    kept = folder / COMMANDS[command][2]
    with subprocess.Popen(
        [*HELD, *words_of(command, folder)],
        env=os.environ | hold(**places, until=until),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            if command in recorders:
                patience(process, lambda: kept.exists() and kept.stat().st_size)
            else:
                patience(process, lambda: kept.exists() and kept.read_bytes().count(b"\n") > 1)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_process(command: str, tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    with running(command, tmp_path, go_on) as process:
        kept = tmp_path / COMMANDS[command][2]
        before = kept.read_bytes()
        for flags in ([], ["--resume"], ["--restart"]) if command != "trace" else ([],):
            done = invoke(*words_of(command, tmp_path), *flags)
            assert done.exit_code == 1, done.output
            assert done.stdout == ""
            assert len(done.stderr.strip().splitlines()) == 1
            assert f"another steermoe, pid {process.pid}," in done.stderr
            assert str(tmp_path / COMMANDS[command][1]) in done.stderr
        assert kept.read_bytes() == before
        go_on.touch()
        process.communicate(timeout=300)
        # a search may end without a result, and says so by status 1
        assert process.returncode == 0 or (command == "tune" and (tmp_path / "out" / "summary.json").exists())
    left = [path.name for path in tmp_path.rglob("*") if "partial" in path.name or path.name.endswith(("lock", "tmp"))]
    assert left == []
    if command == "run":
        answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
        questions = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text("utf-8").splitlines()]
        assert [answer["id"] for answer in answers] == [question["id"] for question in questions]


def test_the_maps_of_phases_are_outputs(tmp_path: Path) -> None:
    with running("detect", tmp_path) as process:
        for output in ("out.first1.json", "out.rest1.json"):
            done = invoke(*words_of("detect", tmp_path, output))
            assert done.exit_code == 1, done.output
            assert len(done.stderr.strip().splitlines()) == 1
            assert f"another steermoe, pid {process.pid}," in done.stderr
            assert output in done.stderr


@pytest.mark.parametrize("command", ["run", "detect", "eval"])
def test_a_killed_process(command: str, tmp_path: Path) -> None:
    """Its lock is gone with it, and what it kept is there for --resume."""
    with running(command, tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = invoke(*words_of(command, tmp_path))
    assert done.exit_code == 2
    assert "--resume" in done.stderr
    done = invoke(*words_of(command, tmp_path), "--resume")
    assert done.exit_code == 0, done.output
    assert not list(tmp_path.rglob(".*"))


def test_other_names(tmp_path: Path) -> None:
    """Links to the output, and to its folder, are the same output; an interrupted run is found by each of them."""
    (tmp_path / "link.jsonl").symlink_to("out.jsonl")
    (tmp_path / "folder").symlink_to(tmp_path)
    names = ("link.jsonl", "folder/out.jsonl", "folder/link.jsonl")
    with running("run", tmp_path) as process:
        for name in names:
            done = invoke(*words_of("run", tmp_path, name))
            assert done.exit_code == 1
            assert f"pid {process.pid}," in done.stderr
        process.send_signal(signal.SIGKILL)
        process.wait()
    for name in names:
        assert invoke(*words_of("run", tmp_path, name)).exit_code == 2, "the interrupted run is not seen"
    assert invoke(*words_of("run", tmp_path, "link.jsonl"), "--resume").exit_code == 0
    assert (tmp_path / "link.jsonl").is_symlink()
    assert len((tmp_path / "out.jsonl").read_text("utf-8").splitlines()) == 5


def test_a_hard_link_of_what_is_kept(tmp_path: Path) -> None:
    """A backup by hard links does not grow with the run that goes on."""
    with running("run", tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    backup = tmp_path / "backup"
    backup.hardlink_to(tmp_path / "out.jsonl.partial")
    before = backup.read_bytes()
    assert invoke(*words_of("run", tmp_path), "--resume").exit_code == 0
    assert backup.read_bytes() == before


def test_settings_that_are_set_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that change the configuration wait for each other; none undoes another's change."""
    path = tmp_path / "folder" / "config.toml"
    monkeypatch.setenv("STEERMOE_CONFIG", str(path))
    program = "from steermoe_local.cli import main; main()"
    command = [HELD[0], "-P", "-c", program, "config", "set"]
    keys = [("threads", "2"), ("chat.temp", "0.5"), ("run.temp", "0.25"), ("serve.port", "8123")]
    processes = [subprocess.Popen([*command, *pair], stdout=subprocess.DEVNULL) for pair in keys]
    assert [process.wait(timeout=120) for process in processes] == [0] * len(keys)
    text = path.read_text("utf-8")
    assert all(value in text for _, value in keys), text
    assert [found.name for found in path.parent.iterdir()] == ["config.toml"]


@pytest.mark.parametrize(
    "words",
    [
        "detect -m tiny --pairs few.jsonl -t 1 -o a.json --counts ./a.json",
        "detect -m tiny --pairs few.jsonl -t 1 -o a.json --counts c.npz --per-pair link.npz",
        "map merge c.npz -o a.json --counts a.json",
    ],
)
def test_one_file_for_two_outputs(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = next(item for item in behaviours() if item.name == "digits-words").pairs
    Path("few.jsonl").write_text("".join(pairs.read_text("utf-8").splitlines(keepends=True)[:2]))
    Path("c.npz").write_bytes(b"precious")
    Path("link.npz").symlink_to("c.npz")
    done = CliRunner().invoke(main, words.split())
    assert done.exit_code == 2
    assert "name another file" in done.stderr
    assert sorted(os.listdir()) == ["c.npz", "few.jsonl", "link.npz"]
    assert Path("c.npz").read_bytes() == b"precious"
