"""Every command with wrong input of each kind: one line that names the file and the cure, an exit status, no traces."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from steermoe_local import ExpertMap, errors, record_counts, write_bias
from steermoe_local.cli import main
from steermoe_local.cli.options import settings
from steermoe_local.maps.pair_counts import PairCountsWriter
from steermoe_local.pairs.pairs import load_pairs
from steermoe_local.steering.bias_file import BiasFile
from tests.support.paths import ROOT
from tests.support.random_effects import effects

PAIRS = ROOT / "examples" / "pairs"

# Every command with good input. `<kind` is a file to read, `<<folder` a folder; `>name` is a file to write.
LINES = [
    "attribute -m <model --map <map --pairs <pairs -o >map2.json",
    "attribute -m tiny --map <map --pairs <pairs --neutral <prompts -o >map2.json",
    "audit -m tiny --task <task --neutral none -o out",
    "bias build <map -o >bias.gguf --activate 1",
    "bias build <map -o >bias.gguf --activate 1 -m <model",
    "bias show <bias",
    "bias show <bias -m <model",
    "chat -m <model",
    "chat -m tiny --map <map --activate 1",
    "chat -m tiny --bias <bias",
    "chat -m tiny --plan <plan",
    "chat -m tiny --maps <<folder",
    "completion bash",
    "condition fit -m <model --pairs <pairs -o >condition.json --write-map >lean.json",
    "condition fit -m tiny --map <map --pairs <pairs -o >condition.json",
    "config",
    "config path",
    "config set threads 1",
    "config show",
    "config unset threads",
    "demo -o >folder",
    "detect -m <model --pairs <pairs -o >map.json",
    "detect -m tiny --pairs <pairs -o >map.json --counts >counts.npz --per-pair >run.pairs.npz",
    "detect -m tiny --pairs <pairs -o >map.json --phase first:1",
    "eval -m tiny --bias <bias --task <task --neutral none --benign <task --no-controls -o out",
    "eval -m tiny --plan <plan --task <task --neutral none --benign none --no-controls -o out",
    "eval -m tiny --map <map --activate 1 --task <task --neutral none --benign none --pairs <pairs -o out",
    "experiment top20 -m tiny --map <map --activate 1 --task <task --neutral none --benign none -o out",
    "fit -m <model --map <effects --pairs <pairs --budget 0.02 -o >bias.gguf",
    "info <model",
    "learn mine -m <model --pairs <pairs --quick --maps-dir out",
    "learn polite -m tiny --like Polite. --unlike Rude. --questions <prompts --maps-dir out",
    "map card <map --base-model some/model -o >README.md",
    "map diff <map <map -o >diff.png",
    "map export <map --format json -o >ranking.json",
    "map import <ranking -o >map.json",
    "map merge <counts -o >map.json --counts >counts.npz",
    "map plot <map -o >map.png",
    "map recommend <map --none -o >map2.json",
    "map recommend <map <summary -o >map2.json",
    "map recommend <map <summary --fitted <bias -o >map2.json",
    "map show <map",
    "map show <map --per-pair <perpair",
    "map stats <map --per-pair <perpair -o >map.json",
    "models --maps <<folder",
    "pairs check <pairs -m <model",
    "pairs faithfulness --squad <squad -o >pairs.jsonl",
    "pairs from-csv <csv --prompt-column question --positive-column polite --negative-column rude -o >pairs.jsonl",
    "pairs numbers -n 2 -o >pairs.jsonl",
    "pairs safety --data <safety -o >pairs.jsonl",
    "pairs safety --data <safety --refusals <prompts -o >pairs.jsonl",
    "pairs shuffle <pairs -o >pairs.jsonl",
    "pairs superficial <pairs -o >pairs.jsonl",
    "presets",
    "behaviours",
    "behaviours german",
    "pull nobody/no-such-model --offline",
    "run -m <model -p hello -n 1",
    "run -m tiny -p hello -n 1 --map <map --activate 1",
    "run -m tiny -p hello -n 1 --bias <bias",
    "run -m tiny -p hello -n 1 --plan <plan",
    "run -m tiny -f <prompts -n 1",
    "run -m tiny --n-prompts <prompts -n 1 -o >answers.jsonl",
    "serve -m <model --port 0",
    "serve -m tiny --port 0 --steering <steering --activate 1",
    "serve -m tiny --port 0 --plan <plan",
    "serve -m tiny --port 0 --api-key-file <key",
    "sweep -m tiny --map <map --task <task --neutral none --benign none --activate 1 -o out",
    "tasks build mquake <mquake -o >task.jsonl",
    "tasks check <task",
    "tasks check <task -m <model",
    "tasks list",
    "trace -m <model -p hello -o >trace.npz",
    "trace -m tiny --pairs <pairs --logits -o >trace.csv",
    "trace -m tiny --prompts <prompts --map <map --activate 1 -n 1 --temp 0 -o >trace.npz",
    "trace -m tiny -p hello --bias <bias -o >trace.npz",
    "transfer -m <model --map <map --activate 1 --task <task --neutral none --pairs <pairs --quants Q8_0 -o out",
    "tune -m tiny --map <map --task <task --benign none --max-ppl-increase 5% -o out",
]
# What may be empty, or anything: text is text.
ANYTHING_GOES = {"key": ("garbage", "wrong"), "prompts": ("wrong",), "csv": ("wrong",), "model": ()}
# Folders that are looked into if they are there.
SEES_WHAT_IS_THERE = ("models",)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> dict[str, Path]:
    """A good file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    pairs = load_pairs(PAIRS / "numbers.jsonl")
    per_pair = folder / "run.pairs.npz"

    with contextlib.ExitStack() as stack:

        def sidecar(identity: Any, digest: str) -> PairCountsWriter:
            writer = PairCountsWriter(per_pair, identity, behaviour="numbers", pairs_digest=digest)
            return stack.enter_context(writer)

        counts = record_counts(tiny_path, pairs, behaviour="numbers", n_threads=1, per_pair=sidecar)
    counts.save(folder / "counts.npz")
    expert_map = ExpertMap.from_counts(counts)
    expert_map.save(folder / "map.json")
    tried = effects({"layer": 1, "expert": 2, "action": "suppress", "effect": 0.5, "effect_se": 0.1, "p": 0.001})
    replace(expert_map, effects=tried).save(folder / "effects.json")
    write_bias(BiasFile.from_signs(expert_map.choose(1, 1), expert_map.identity), folder / "bias.gguf")
    (folder / "careful.plan.json").write_text(json.dumps({"rules": ["answer: map +1 -1"]}))
    (folder / "prompts.txt").write_text("hello\n")
    (folder / "safety.jsonl").write_text('{"prompt": "p", "response": "r", "is_safe": false}\n')
    edit = {"prompt": "{} is in", "subject": "a", "question": "q", "target_new": "b", "target_true": "c"}
    (folder / "mquake.json").write_text(json.dumps([{"case_id": 1, "requested_rewrite": [edit]}]))
    (folder / "task.jsonl").write_text('{"task": {"scorer": "refusal"}}\n{"prompt": "hello"}\n')
    (folder / "key").write_text("0123456789abcdef0123456789abcdef\n")
    measured = {"bias": "bias.gguf", "provenance": {"map_sha256": expert_map.sha256, "fit": '{"reverse": false}'}}
    unsteered = {"name": "unsteered", "rate": {"value": 0.5, "n": 2}}
    summary = {"steering": measured, "sides": [unsteered], "provenance": {"settings": {}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return {
        "map": folder / "map.json",
        "summary": folder / "summary.json",
        "effects": folder / "effects.json",
        "counts": folder / "counts.npz",
        "perpair": per_pair,
        "bias": folder / "bias.gguf",
        "plan": folder / "careful.plan.json",
        "prompts": folder / "prompts.txt",
        "safety": folder / "safety.jsonl",
        "key": folder / "key",
        "mquake": folder / "mquake.json",
        "task": folder / "task.jsonl",
        "steering": folder / "map.json",
        "ranking": folder / "ranking.pkl",
        "model": tiny_path,
        "pairs": PAIRS / "numbers.jsonl",
        "squad": PAIRS / "squad-layout.json",
        "csv": PAIRS / "tone.csv",
    }


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no network."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("STEERMOE_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text("")
    return folder


def start(words: list[str]) -> Result:
    return CliRunner().invoke(main, words, input="")


def words_of(line: str, good: dict[str, Path], folder: Path, change: tuple[int, str] | None = None) -> list[str]:
    """The words of a line with good files; the word at a place is another one if it is to be changed."""
    words = []
    for place, word in enumerate(line.split()):
        if change and change[0] == place:
            words.append(change[1])
        elif word.startswith("<<"):
            (folder.parent / "some").mkdir(exist_ok=True)
            words.append(str(folder.parent / "some"))
        elif word.startswith("<"):
            words.append(str(good[word[1:]]))
        elif word.startswith(">"):
            words.append(str(folder / word[1:]))
        else:
            words.append(word)
    return words


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def is_refused(result: Result, status: set[int], names: str = "") -> str:
    """One line on stderr that begins with error:, names something and says what to do; nothing on stdout."""
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in status, (result.exit_code, result.output)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line for line in lines if not line.startswith("warning: ")] == lines[-1:], result.stderr
    message = lines[-1]
    assert message.startswith("error: "), message
    assert "Traceback" not in message
    assert names in message, (names, message)
    assert re.search(r"[;,:(] ?\w+", message[len("error: ") :].replace(names, "", 1)), f"no cure: {message}"
    return message


def test_every_command_is_here() -> None:
    """A new command needs a line above."""
    commands = {" ".join(path) for path, _ in settings.commands(main)}
    missing = {name for name in commands if not any(f"{line} ".startswith(f"{name} ") for line in LINES)}
    assert not missing


#
# files to read
#


def inputs() -> Iterator[Any]:
    for line in LINES:
        for place, word in enumerate(line.split()):
            if word.startswith("<"):
                for kind in ("missing", "folder", "empty", "garbage", "wrong"):
                    reports = line.startswith("pairs check <pairs") and place == 2 and kind in ("garbage", "wrong")
                    if kind not in ANYTHING_GOES.get(word.strip("<"), ()) and not reports:
                        yield pytest.param(line, place, kind, id=f"{line}-{place}-{kind}")


@pytest.mark.parametrize(("line", "place", "kind"), list(inputs()))
def test_wrong_files(line: str, place: int, kind: str, good: dict[str, Path], work: Path) -> None:
    what = line.split()[place].lstrip("<")
    wants_folder = line.split()[place].startswith("<<")
    bad = work.parent / f"bad-{kind}"
    if kind == "folder":
        if wants_folder:
            return
        bad.mkdir()
    elif kind == "empty":
        bad.touch()
    elif kind == "garbage":
        bad.write_bytes(bytes(range(256)) * 20)
    elif kind == "wrong":  # a good file of another kind
        bad = good["bias" if what in ("pairs", "map", "effects", "squad", "safety") else "pairs"]
    if wants_folder and kind == "missing" and line.startswith(SEES_WHAT_IS_THERE):
        return
    if not wants_folder and what == "ranking" and not good[what].exists():
        good[what].touch()
    before = files(work)
    result = start(words_of(line, good, work, (place, str(bad))))
    is_refused(result, {1, 2}, bad.name)
    assert files(work) == before, "a failed command must leave no file"


#
# files to write
#


def outputs() -> Iterator[Any]:
    for line in LINES:
        for place, word in enumerate(line.split()):
            if word.startswith(">") and not line.startswith("demo"):
                pipe = ("pipe",) if hasattr(os, "mkfifo") else ()
                for kind in ("no folder", "folder", "in a file", "locked", *pipe):
                    yield pytest.param(line, place, kind, id=f"{line}-{place}-{kind}")


@pytest.mark.parametrize(("line", "place", "kind"), list(outputs()))
def test_outputs_that_cannot_be_written(
    line: str, place: int, kind: str, good: dict[str, Path], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = line.split()[place].removeprefix(">")
    (work.parent / "file").touch()
    bad = {
        "no folder": work.parent / "nowhere" / name,
        "folder": work.parent / f"f-{name}",
        "in a file": work.parent / "file" / name,
        "pipe": work.parent / f"pipe-{name}",  # stands for every file that is not regular, like /dev/null
        "locked": work.parent / "locked" / name,
    }[kind]
    if kind == "folder":
        bad.mkdir()
    if kind == "pipe":
        os.mkfifo(bad)
    if kind == "locked":
        bad.parent.mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))  # root would be let in
    if not good["ranking"].exists():
        good["ranking"].touch()
    message = is_refused(start(words_of(line, good, work, (place, str(bad)))), {2}, str(bad))
    assert ";" in message or "," in message
    assert files(work) == [], "a failed command must leave no file"
    assert not bad.is_file()


#
# options
#


def commands() -> Iterator[Any]:
    for path, command in settings.commands(main):
        yield pytest.param(path, command, id=" ".join(path))


@pytest.mark.parametrize(("path", "command"), list(commands()))
def test_unknown_options(path: tuple[str, ...], command: click.Command, work: Path) -> None:
    name = " ".join(path)
    line = next(line for line in LINES if f"{line} ".startswith(f"{name} "))
    if name in ("config show", "config set"):  # takes the options of other commands, and negative numbers
        return
    result = start([*words_of(line, _NOT_THERE, work), "--qqqq"])
    message = is_refused(result, {2}, "'--qqqq'")
    assert message.endswith(f"see steermoe {name} --help")
    assert files(work) == []


_KINDS = [word.strip("<") for line in LINES for word in line.split() if word.startswith("<")]
# files that no option looks at; a word without an ending would be the name of a map, which is looked for at once
_NOT_THERE = dict.fromkeys(_KINDS, Path("x")) | {"map": Path("x.json"), "effects": Path("x.json")}


@pytest.mark.parametrize(("path", "command"), list(commands()))
def test_missing_arguments_and_options(path: tuple[str, ...], command: click.Command, work: Path) -> None:
    required = [parameter for parameter in command.params if parameter.required]
    if required:
        is_refused(start([*path]), {2}, "missing ")
    for parameter in required:
        if isinstance(parameter, click.Option) and len(required) > 1:
            line = next(line for line in LINES if line.startswith(" ".join(path)) and parameter.opts[0] in line)
            words = words_of(line, _NOT_THERE, work)
            at = words.index(parameter.opts[0])
            message = is_refused(start(words[:at] + words[at + 2 :]), {2}, "missing option")
            assert parameter.opts[-1] in message
            assert files(work) == []


@pytest.mark.parametrize(("path", "command"), list(commands()))
def test_values_of_another_type(path: tuple[str, ...], command: click.Command, work: Path) -> None:
    """A word where a number or one of several words belongs."""
    line = next(line for line in LINES if f"{line} ".startswith(f"{' '.join(path)} "))
    words = words_of(line, _NOT_THERE, work)
    if path == ("config", "show"):
        return
    for name, option in settings.options(command).items():
        takes_words = settings.kind(option).what not in ("integer", "number")
        if option.is_flag or (takes_words and not isinstance(option.type, click.Choice)):
            continue
        shown = f"--{name}" if f"--{name}" in option.opts else option.opts[0]  # an old name stands for the new one
        message = is_refused(start([*words, f"--{name}", "seven"]), {2}, shown)
        assert "'seven'" in message
    assert files(work) == []


@pytest.mark.parametrize(("path", "command"), list(commands()))
def test_help(path: tuple[str, ...], command: click.Command) -> None:
    """An example that names the command; every option explained; nothing wider than the page."""
    result = CliRunner().invoke(main, [*path, "--help"], terminal_width=100)
    assert result.exit_code == 0
    assert re.search(rf"\n  Examples?:\n(?: +.*\n)*? +.*steermoe {' '.join(path)}\b", result.output), result.output
    for name, option in settings.options(command).items():
        assert option.help, f"--{name} of {' '.join(path)} is not explained"
    examples = re.findall(r"steermoe ([^\n|>]*)", result.output.split("Example", 1)[1].split("\nOptions", 1)[0])
    for example in examples:
        for word in re.findall(r" (-[a-z-]+)", example):
            assert re.search(rf"[ ,]{re.escape(word)}[, /\]]", result.output) or example.split()[0] != path[0], (
                word,
                example,
            )


def test_groups_and_commands_that_are_not_there(work: Path) -> None:
    for words in (["nothing"], ["pairs", "nothing"], ["--nothing"], ["map", "--nothing"]):
        is_refused(start(words), {2}, "nothing")
    assert is_refused(start(["detct"]), {2}, "'detct'").endswith("; did you mean detect?")
    for words in (["pairs"], ["map"]):
        result = start(words)
        assert result.exit_code == 2
        assert result.stderr.startswith("Usage: ")


#
# what no command can do anything about
#


def run(shell: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("steermoe")
    return subprocess.run(
        ["bash", "-c", shell.replace("steermoe", f"'{program}'")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk(work: Path) -> None:
    done = run("steermoe info tiny > /dev/full", work)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe(work: Path) -> None:
    done = run("steermoe presets | true; echo ${PIPESTATUS[0]}", work)
    assert done.stderr == ""
    assert done.stdout in ("0\n", "1\n")


def test_out_of_memory(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(main.commands["presets"], "callback", fail)
    is_refused(start(["presets"]), {1}, "out of memory")


def test_an_error_of_the_system_names_its_file(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        os.stat("gone/away")

    monkeypatch.setattr(main.commands["presets"], "callback", fail)
    is_refused(start(["presets"]), {1}, "gone/away: No such file or directory")


#
# what the documentation says
#


def test_the_page_of_errors_names_every_class_and_status() -> None:
    page = (ROOT / "docs" / "errors.md").read_text("utf-8")
    for name in (name for name, kind in vars(errors).items() if isinstance(kind, type)):
        assert f"`{name}`" in page, name
    from steermoe_local.cli import program

    statuses = {0, program.EXIT_ERROR, program.EXIT_USAGE, program.EXIT_INTERRUPTED}
    assert {int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)} == statuses
