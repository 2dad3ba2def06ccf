"""Measures all figures of docs/results.md: `steermoe eval`, `sweep`, `experiment`, `transfer` and `tune`'s search.

    python benchmarks/results.py [--write-docs] [-m MODEL] [--folder FOLDER] [--jobs N] [--items N]

Runs the program's own commands, --jobs at a time, each with its own folder of results; finished ones are not run again,
and an interrupted run continues. Decoding is greedy on one thread, so a machine gets the same figures every time.

Where the small model is (build/small, or --small), benchmarks/small.py measures it, too, and fills the second column;
where it is not, the page says so.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from performance import machine, write_docs
from results_tables import render
from small_tables import render as render_small
from small_tables import two_columns

from steermoe_local import ModelError, __version__
from steermoe_local.models.embedded import behaviours
from steermoe_local.models.local_models import resolve_model

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"
OUTPUT = ROOT / "build" / "bench" / "results"
START, END = "<!-- results:start -->", "<!-- results:end -->"
SMALL = ROOT / "build" / "small" / "small.gguf"
SMALL_RESULT = "small.json"
SMALL_START, SMALL_END = "<!-- small:start -->", "<!-- small:end -->"

QUANTS = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0,Q3_K_M,Q2_K,IQ4_XS"
N_EXPERIMENT = 40  # items of the named experiments, whose measurements overlap
EXPERIMENTS = ("random10", "top20", "activate-benign", "superficial", "random-matched", "layers", "routing-kinds")
PICTURES = {"eval": "effect.png", "sweep": "pareto.png", "transfer": "transfer.png", "layers": "layers.png"}
ORDER = ("sweep", "eval", "transfer")  # the long ones
SHOWN = "digits-words"  # the behaviour whose plots are in the docs


@dataclass(frozen=True)
class Job:
    """One command; `name` is its folder of results, `words` the command as a reader would type it."""

    behaviour: str
    kind: str
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.behaviour}/{self.kind}"


def jobs(model: str, n_items: int | None, folder: Path) -> list[Job]:
    """All commands, the long ones first. Maps are those of `detect`, as not all behaviours' maps ship."""
    some = () if n_items is None else ("-n", str(n_items))
    few = ("-n", str(min(n_items or N_EXPERIMENT, N_EXPERIMENT)))
    found = []
    for behaviour in behaviours():
        map_file = str(map_of(behaviour.name, folder))
        common = ("-m", model, "--map", map_file, "--task", f"builtin:{behaviour.name}", *some)
        numbers = ("--activate", str(behaviour.n_activate), "--deactivate", str(behaviour.n_deactivate))
        pairs = ("--pairs", str(behaviour.pairs))
        grid = ("--activate", "0,1,2,8", "--deactivate", "0,2,8,32", "--both-ways")
        found += [
            Job(behaviour.name, "eval", ("eval", *common, *numbers, *pairs)),
            Job(behaviour.name, "sweep", ("sweep", *common, *grid)),
            Job(behaviour.name, "transfer", ("transfer", *common, *numbers, *pairs, "--quants", QUANTS)),
            *(Job(behaviour.name, name, ("experiment", name, *common, *few, *numbers, *pairs)) for name in EXPERIMENTS),
        ]
    return sorted(found, key=lambda job: ORDER.index(job.kind) if job.kind in ORDER else len(ORDER))


def map_of(behaviour: str, folder: Path) -> Path:
    """Where its map is."""
    return folder / f"{behaviour}.json"


def detect(model: str, folder: Path) -> None:
    """Make the maps."""
    for behaviour in behaviours():
        path = map_of(behaviour.name, folder)
        sides = ("--positive", behaviour.positive, "--negative", behaviour.negative)
        if not path.exists():
            steermoe("detect", "-m", model, "--pairs", str(behaviour.pairs), "-o", str(path), *sides, "-t", "1")


def steermoe(*words: str) -> None:
    """Run the program that is installed beside this Python. Raises RuntimeError with the end of what it printed."""
    program = shutil.which("steermoe", path=str(Path(sys.executable).parent)) or "steermoe"
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)}: {(done.stderr or done.stdout).strip()[-2000:]}")


def run(job: Job, folder: Path, log: Callable[[str], None]) -> None:
    """Run a command unless its results are there. Raises RuntimeError."""
    output = folder / job.name
    if (output / "summary.json").exists():
        return
    output.mkdir(parents=True, exist_ok=True)
    again = ["--resume"] if list(output.glob("*.partial")) else []
    start = time.monotonic()
    steermoe(*job.words, "-t", "1", "-o", str(output), *again)
    log(f"{job.name}: {time.monotonic() - start:.0f} s")


def tuning(folder: Path, n_items: int | None, log: Callable[[str], None]) -> None:
    """The search of `tune` against a grid (benchmarks/tuning.py)."""
    output = folder / "tuning.json"
    if output.exists():
        return
    some = [] if n_items is None else ["--items", str(n_items)]
    start = time.monotonic()
    script = str(Path(__file__).parent / "tuning.py")
    subprocess.run([sys.executable, script, *some, str(output)], check=True, stdout=sys.stderr)
    log(f"tuning: {time.monotonic() - start:.0f} s")


def small_model(name: str | None) -> Path | None:
    """The small model: the one that is named, or that in build/, or one of the name `small`; None without either.

    Raises RuntimeError for one that is named and not there.
    """
    if name is None and SMALL.exists():
        return SMALL
    try:
        path = resolve_model(name or "small")
    except ModelError:
        path = Path(name or "small")
    if name is not None and not path.exists():
        raise RuntimeError(f"--small {name}: no such model; leave it out where there is none")
    return path if path.is_file() else None


def small(
    model: Path | None,
    corpus: Path | None,
    folder: Path,
    n_items: int | None,
    n_jobs: int,
    untrained: Path | None = None,
) -> dict[str, Any] | None:
    """What benchmarks/small.py measures on the small model; None where there is no such model."""
    if model is None:
        return None
    words = ["-m", str(model), "--folder", str(folder), "--jobs", str(n_jobs)]
    words += [] if n_items is None else ["--items", str(n_items)]
    words += [] if corpus is None else ["--corpus", str(corpus)]
    words += [] if untrained is None else ["--untrained", str(untrained)]
    script = str(Path(__file__).parent / "small.py")
    subprocess.run([sys.executable, script, *words], check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads((folder / SMALL_RESULT).read_text("utf-8"))
    return found


def small_section(report: Mapping[str, Any], found: Mapping[str, Any] | None) -> str:
    """Both columns, and the tables of the second."""
    columns = two_columns(report["behaviours"], found)
    return columns if found is None else f"{columns}\n\n{render_small(found)}"


def gather(found: Sequence[Job], folder: Path) -> dict[str, Any]:
    """All summaries: {behaviour: {kind: summary}}, and the tuning's."""
    pairs = f"steermoe_local/data/{SHOWN}.pairs.jsonl"
    made = f"steermoe detect -m tiny --pairs {pairs} -o {SHOWN}.json"
    report: dict[str, Any] = {"behaviours": {}, "commands": {"detect": made}}
    for job in found:
        text = (folder / job.name / "summary.json").read_text("utf-8")
        report["behaviours"].setdefault(job.behaviour, {})[job.kind] = json.loads(text)
        if job.behaviour == SHOWN:
            words = [shown(word) for word in job.words]
            report["commands"][job.kind] = shlex.join(["steermoe", *words, "-o", "OUT"])
    report["tuning"] = json.loads((folder / "tuning.json").read_text("utf-8"))
    return report


def shown(word: str) -> str:
    """A word of a command without the folders of this machine."""
    if word.endswith(".pairs.jsonl"):
        return f"steermoe_local/data/{Path(word).name}"
    return Path(word).name if Path(word).is_absolute() else word


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what steering does on the embedded model, or on another.")
    parser.add_argument("-m", "--model", default="tiny", help="a quantization of the embedded model, for its maps")
    parser.add_argument("--folder", type=Path, default=OUTPUT, help="keeps the results of each command")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    parser.add_argument("--items", type=int, help="first N prompts of each task: tries the script")
    parser.add_argument("--small", help="the small model, for the second column: a file or a name")
    parser.add_argument("--corpus", type=Path, help="its corpus, for benchmarks/small.py's first run")
    parser.add_argument(
        "--untrained", type=Path, help="a model of its shape that learnt nothing, for benchmarks/small.py"
    )
    parser.add_argument("--write-docs", action="store_true", help="put tables and pictures into docs/")
    arguments = parser.parse_args()
    begin = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {line}", file=sys.stderr, flush=True)

    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    todo = jobs(arguments.model, arguments.items, folder)
    try:
        other_model = small_model(arguments.small)
        detect(arguments.model, folder)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            futures = [pool.submit(tuning, folder, arguments.items, log)]
            futures += [pool.submit(run, job, folder, log) for job in todo]
            for future in futures:
                future.result()
        report = gather(todo, folder)
        other = small(
            other_model, arguments.corpus, folder.parent / "small", arguments.items, arguments.jobs, arguments.untrained
        )
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    about = machine()
    report["about"] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "tool": f"steermoe-local {__version__}",
        "machine": ", ".join(filter(None, [about["cpu"], about.get("vectors"), about["system"]])),
        "items": arguments.items,
    }
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text, section = render(report), small_section(report, other)
    print(f"{text}\n{section}")
    if arguments.write_docs:
        for kind, name in PICTURES.items():
            source = folder / SHOWN / kind / name
            if source.exists():
                shutil.copyfile(source, IMAGES / f"results-{kind}.png")
        write_docs(DOCS, text, START, END)
        write_docs(DOCS, section, SMALL_START, SMALL_END)


if __name__ == "__main__":
    main()
