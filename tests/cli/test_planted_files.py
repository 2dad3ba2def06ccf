"""No command runs code that lies in the current folder: not its modules, not its shared libraries, not its settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from steermoe_local.cli import main
from steermoe_local.models.embedded import behaviour, data_folder
from steermoe_local.pairs.pairs import save_pairs
from tests.pairs.test_pair_builders import COLUMNS, RATED
from tests.support import pickled_frames as frames
from tests.support.condition_pairs import kinds_of_prompts
from tests.support.dataset_samples import COUNTERFACTUAL
from tests.support.hub_stand_in import Hub, running
from tests.support.planted import LIBRARIES, loaded_by_python, plant, traces
from tests.support.running_server import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="traps are made for Linux")

FEW = "-m tiny --map digits-words -t 1 -n 2"
MEASURED = f"{FEW} --benign none --n-text 20"
TUNE = "tune -m tiny --map digits-words -t 1 -n 24 --n-text 100 --benign none --max-ppl-increase 5% --seed 1"
AUDIT = "-m tiny -t 1 --task builtin:digits-words -n 4 --n-text 20 --draws 2 --layer-draws 0 --promote none"
TRANSFER = f"transfer {FEW} -np 2 --pairs few.jsonl --neutral neutral.jsonl --quants q8_0"
ATTRIBUTE = "attribute -m tiny --candidates 8 --draws 64 --n-text 20 --action suppress -t 1"
FIT = "fit -m tiny --pairs few.jsonl --map effects.json --budget 1 --population 4 --evaluations 4 --n-text 20 -t 1"
# What each command is tried with: something that it carries out, in the folder that `files` makes.
COMMANDS = {
    "pull": "pull lab/tiny-GGUF",
    "models": "models",
    "info": "info tiny",
    "pairs check": "pairs check few.jsonl -m tiny",
    "pairs faithfulness": "pairs faithfulness --squad squad.json -o OUT",
    "pairs safety": "pairs safety --data rated.json -o OUT",
    "pairs numbers": "pairs numbers -n 2 -o OUT",
    "pairs from-csv": "pairs from-csv table.csv --prompt-column p --positive-column a --negative-column b -o OUT",
    "pairs superficial": "pairs superficial few.jsonl -o OUT",
    "pairs shuffle": "pairs shuffle few.jsonl -o OUT",
    "tasks build": "tasks build faitheval-counterfactual counterfactual.json -o OUT",
    "tasks list": "tasks list",
    "tasks check": "tasks check regex.jsonl --scorer regex -m tiny",
    "learn": "learn numbers -m tiny --behaviour digits-words --quick -t 1 --maps-dir OUT",
    "detect": "detect -m tiny --pairs few.jsonl --behaviour numbers -t 1 -o OUT",
    "trace": "trace -m tiny --pairs few.jsonl -t 1 -o OUT.parquet",
    "attribute": f"{ATTRIBUTE} --pairs few.jsonl --map map.json -o OUT",
    "fit": f"{FIT} -o OUT",
    "condition fit": "condition fit -m tiny --pairs prompts.jsonl --draws 19 -t 1 -o OUT --write-map OUT.json",
    "map show": "map show map.json",
    "map stats": "map stats map.json --per-pair pairs.npz -o OUT",
    "map recommend": "map recommend map.json --none -o OUT",
    "map plot": "map plot map.json -o OUT.svg",
    "map diff": "map diff map.json map.json -o OUT.png",
    "map merge": "map merge counts.npz -o OUT",
    "map import": "map import ranking.pkl -m tiny --model-id lab/tiny --behaviour numbers -o OUT",
    "map export": "map export map.json --format steermoe-csv -o OUT",
    "map card": "map card map.json --base-model lab/tiny --license CC0-1.0 -o OUT",
    "presets": "presets",
    "behaviours": "behaviours formal",
    "bias build": "bias build map.json --activate 2 --deactivate 2 -o OUT",
    "bias show": "bias show bias.gguf -m tiny",
    "run": "run -m tiny --plan rules.plan.toml -p x -n 2 -t 1",
    "chat": "chat -m tiny --bias bias.gguf -n 2 -t 1",
    "serve": "serve -m tiny --port 0 -t 1 -c 128",
    "eval": f"eval {MEASURED} --activate 2 --task regex.jsonl --scorer regex -o OUT",
    "experiment": "experiment random10 -t 1 -n 1 --draws 1 --n-text 20 --benign none -o OUT",
    "sweep": f"sweep {MEASURED} --activate 2 --deactivate 0 -o OUT",
    "tune": f"{TUNE} -o OUT",
    "transfer": f"{TRANSFER} -o OUT",
    "audit": f"audit {AUDIT} -o OUT",
    "demo": "demo -n 1 --draws 1 -o OUT",
    "config show": "config show",
    "config path": "config path",
    "config set": "config set temp 0.5",
    "config unset": "config unset temp",
    "completion": "completion bash",
}
# Minutes of them in one form are enough: what differs between the forms is over when a command begins.
LONG = {"learn", "audit", "attribute", "demo", "eval", "experiment", "fit", "sweep", "transfer", "tune"}
FORMS = {
    "program": [str(Path(sys.executable).with_name("steermoe"))],
    "python -m": [sys.executable, "-m", "steermoe_local"],
}


def commands(command: click.Command, *path: str) -> Iterator[str]:
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, *path, name)
    else:
        yield " ".join(path)


def test_every_command_has_a_line() -> None:
    assert sorted(commands(main)) == sorted(COMMANDS)


def files(folder: Path) -> None:
    """What the commands read."""
    lines = {
        "few.jsonl": (behaviour("digits-words").pairs, 2),
        "neutral.jsonl": (data_folder() / "neutral.heldout.jsonl", 2),
    }
    for name, (source, n) in lines.items():
        (folder / name).write_text("".join(source.read_text("utf-8").splitlines(keepends=True)[:n]))
    save_pairs(kinds_of_prompts(20), folder / "prompts.jsonl")
    items = [{"id": str(n), "prompt": f"What is {n}?", "pattern": "(a|b)", "answer": "a"} for n in range(2)]
    (folder / "regex.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, rows in (("squad", COLUMNS), ("rated", RATED), ("counterfactual", COUNTERFACTUAL)):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "table.csv").write_text("p,a,b\nask,yes,no\n")
    (folder / "rules.plan.toml").write_text('rules = ["answer: map +2 -2", "prompt: bias"]\n')
    counts = np.full((5, 24), 10, np.int64)  # of 60 tokens, top-4
    counts[:, ::2] += 5
    counts[:, 1::2] -= 5
    (folder / "ranking.pkl").write_bytes(frames.dumps(frames.frame(frames.ranking(counts, counts[:, ::-1], 60, 60))))
    made = [f"detect -m tiny --pairs {folder}/few.jsonl --behaviour x -t 1 --per-pair {folder}/pairs.npz"]
    made[0] += f" --counts {folder}/counts.npz -o {folder}/map.json"
    made += [f"{ATTRIBUTE} --pairs {folder}/few.jsonl --map {folder}/map.json -o {folder}/effects.json"]
    made += [f"bias build {folder}/map.json --activate 2 --deactivate 2 -o {folder}/bias.gguf"]
    for words in made:
        done = CliRunner().invoke(main, words.split())
        assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def hub(tiny_path: Path) -> Iterator[Hub]:
    with running(Hub(models={"lab/tiny-GGUF": {"main": {"tiny-Q4_K_M.gguf": tiny_path.read_bytes()}}})) as hub:
        yield hub


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A planted folder for each form. What Python imports before it comes to the package is out of its reach."""
    without = {"program": frozenset[str](), "python -m": loaded_by_python() | {"__future__"}}
    place = tmp_path_factory.mktemp
    made = {form: plant(place("planted"), without=without[form], libraries=LIBRARIES) for form in FORMS}
    for folder in made.values():
        files(folder)
    return made


@pytest.mark.parametrize(
    ("command", "form"),
    [(command, form) for command in COMMANDS for form in FORMS if form == "program" or command not in LONG],
)
def test_nothing_planted_runs(command: str, form: str, folders: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    folder = folders[form]
    words = [word.replace("OUT", str(tmp_path / "out")) for word in COMMANDS[command].split()]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "STEERMOE_M"))}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    environment["STEERMOE_CONFIG"] = str(tmp_path / "config.toml")
    (tmp_path / "config.toml").write_text("temp = 0.0\n")
    with tempfile.TemporaryFile("w+") as out:
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
        with subprocess.Popen([*FORMS[form], *words], cwd=folder, env=environment, **options) as process:

            def written() -> str:
                out.seek(0)
                return out.read()

            if command == "serve":
                until(lambda: process.poll() is not None or "http://" in written(), seconds=60)
                process.send_signal(signal.SIGTERM)
            process.wait()
        assert traces(folder) == []
        assert process.returncode == 0, written()


def test_the_traps_work(folders: dict[str, Path]) -> None:
    """Each kind of trap leaves its trace when it is used; a new folder, as the others must have none."""
    folder = plant(folders["program"].parent / "used", libraries=LIBRARIES)
    codes = ["import random", "import ctypes; ctypes.CDLL('./libgomp.so.1')", "import matplotlib"]
    found = []
    for code in codes:
        clean = "import sys; sys.path.remove('')\n" if code != codes[0] else ""
        done = subprocess.run([sys.executable, "-c", clean + code], cwd=folder, capture_output=True, check=False)
        found.append((done.returncode != 0, traces(folder)))
        (folder / "trace.txt").unlink(missing_ok=True)
    assert found == [(True, ["random"]), (False, ["libgomp.so.1"]), (True, [])]
