"""Speed of recording pairs: `steermoe detect` against llama-imatrix, and time and memory by number of pairs.

    python benchmarks/detection.py [--quick] [--rounds N]

llama-imatrix runs a text through a model and accumulates statistics of the inputs of each matrix product, per expert;
it is the most similar program of llama.cpp. Both run as commands, alternately, on the same tokens in the same pieces;
llama-imatrix with --no-ppl, its faster mode, and with the unpatched libraries of build/stock. A short job, run once,
measures start and loading; the long one runs in every round, and the difference is the cost of the tokens. Processor
time is compared, because other work on the machine disturbs it least, and a ratio compares times of one round only.
`same text`: every prompt has another beginning and all its tokens are counted. `chat`: the two prompts of a pair share
their question, and all pairs share a system message, as real pairs do; llama-imatrix reads the same prompts one after
the other.

Progress goes to stderr, the tables to stdout, everything to build/bench/detection.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from random_q4 import cached_model
from ratios import Ratio, speed_ratios
from workers import STOCK, WorkerError, clean_environment

from steermoe_local.pairs.pairs import Pair, save_pairs

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"
IMATRIX = BUILD / "native" / "bin" / "llama-imatrix"
TINY = HERE.parent / "steermoe_local" / "data"
OUTPUT = BUILD / "bench"
ALPHABET = "ABCDEFGHJKQXZ"
SHORT = 1  # pairs of the short job
LIBRARY_PATH = {"LD_LIBRARY_PATH": str(STOCK)}  # goes before the folder of the program, which has ours
DETECT = "from steermoe_local.cli import main; main()"
# with the graph behind the last router, as worker.py's --whole
DETECT_WHOLE = f"from steermoe_local.llama import capi; capi.NativeRecorder.set_stop = lambda *_: None; {DETECT}"
MEMORY = """
import json, resource, sys, time
from steermoe_local import record_counts
from steermoe_local.pairs.pairs import PairsFile
model, pairs, threads = sys.argv[1:]
record_counts(model, list(PairsFile(pairs))[:1], n_threads=int(threads))
last, start = [], time.perf_counter()
record_counts(model, PairsFile(pairs), n_threads=int(threads), on_batch=last.append)
seconds = time.perf_counter() - start
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024,
                  "n_tokens": last[-1].n_tokens, "n_decoded": last[-1].n_decoded}))
"""


@dataclass(frozen=True)
class Job:
    """A pairs file and the same prompts as one text; both sides of a pair have `n_prompt` tokens."""

    name: str
    pairs: Path
    text: Path
    n_prompt: int
    n_prompts: int

    @property
    def n_tokens(self) -> int:
        return self.n_prompt * self.n_prompts


def letters(rng: random.Random, n: int, alphabet: str = ALPHABET) -> str:
    """As many tokens as characters, in the tokenizers of the random models; ALPHABET also in the embedded one."""
    return "".join(rng.choices(alphabet, k=n))


def write_job(folder: Path, name: str, pairs: list[Pair], n_prompt: int) -> Job:
    job = Job(name, folder / f"{name}.jsonl", folder / f"{name}.txt", n_prompt, 2 * len(pairs))
    save_pairs(pairs, job.pairs)
    sides = [side for pair in pairs for side, _ in pair.sides()]
    assert all(len(side) == n_prompt for side in sides)
    job.text.write_text("".join(str(side) for side in sides))
    return job


def jobs(folder: Path, n_pairs: int, n_prompt: int, alphabet: str = ALPHABET) -> dict[str, tuple[Job, Job]]:
    """A long and a short job of each kind."""
    rng = random.Random(3)
    same = []
    for i in range(n_pairs):
        one, two = letters(rng, n_prompt, alphabet), letters(rng, n_prompt, alphabet)
        same.append(Pair(f"p{i}", one, two, one, two))
    n_system, n_reply = n_prompt // 8, n_prompt // 4
    system = letters(rng, n_system, alphabet)
    chat = []
    for i in range(n_pairs):
        start = system + letters(rng, n_prompt - n_system - n_reply, alphabet)
        one, two = letters(rng, n_reply, alphabet), letters(rng, n_reply, alphabet)
        chat.append(Pair(f"p{i}", start + one, start + two, one, two))
    return {
        name: (write_job(folder, name, pairs, n_prompt), write_job(folder, f"{name}, short", pairs[:SHORT], n_prompt))
        for name, pairs in (("same text", same), ("chat", chat))
    }


@dataclass(frozen=True)
class Seconds:
    wall: float
    cpu: float


def why_no_imatrix() -> str:
    """Why an unpatched llama-imatrix cannot be run here, "" if it can."""
    if resource is None:
        return "this system does not tell how much processor time a command took"
    if not IMATRIX.exists():
        return "llama-imatrix is not built (make tools builds it)"
    if not any(STOCK.glob("*llama.*")):
        return "build/stock has no library (make build/stock/.built builds it)"
    environment = clean_environment() | LIBRARY_PATH | {"LD_TRACE_LOADED_OBJECTS": "1"}  # lists them, as ldd does
    done = subprocess.run([IMATRIX], capture_output=True, text=True, check=False, env=environment, timeout=60)
    loaded = [f"{STOCK}/lib{name}.so " for name in ("llama", "ggml", "ggml-base", "ggml-cpu")]
    if not all(path in done.stdout for path in loaded):
        return "on this system llama-imatrix does not load the unpatched libraries of build/stock by LD_LIBRARY_PATH"
    return ""


def timed(
    command: list[str], environment: dict[str, str] | None = None
) -> tuple[Seconds, subprocess.CompletedProcess[str]]:
    """Run a command; `environment` is added to this process's. Raises WorkerError if it fails."""

    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start = time.perf_counter(), cpu()
    environment = clean_environment() | (environment or {})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    seconds = Seconds(time.perf_counter() - start[0], cpu() - start[1])
    if done.returncode:
        raise WorkerError(f"{command[0]} ended with {done.returncode}: {done.stderr[-800:]}")
    return seconds, done


def imatrix(model: Path, job: Job, n_batch: int, n_threads: int, folder: Path) -> Seconds:
    chunks = job.n_prompts
    seconds, done = timed(
        [
            *(str(IMATRIX), "-m", str(model), "-f", str(job.text), "-o", str(folder / "imatrix.gguf")),
            *("--output-format", "gguf", "-c", str(job.n_prompt), "-b", str(n_batch), "-ub", str(n_batch)),
            *("--chunks", str(chunks), "-t", str(n_threads), "-fa", "off", "--no-ppl", "-ngl", "0"),
        ],
        LIBRARY_PATH,
    )
    assert f"computing over {chunks} chunks" in done.stderr, done.stderr[-2000:]
    return seconds


def detect(
    model: Path, job: Job, n_batch: int, n_threads: int, folder: Path, whole: bool = False
) -> tuple[Seconds, dict[str, Any]]:
    seconds, done = timed(
        [
            *(
                sys.executable,
                "-P",
                "-c",
                DETECT_WHOLE if whole else DETECT,
                "detect",
                "-m",
                str(model),
                "--pairs",
                str(job.pairs),
            ),
            *("-o", str(folder / "map.json"), "-b", str(n_batch), "-ub", str(n_batch), "-t", str(n_threads), "--json"),
        ]
    )
    facts = json.loads(done.stdout)
    assert facts["n_tokens"] == job.n_tokens
    return seconds, facts


def against_imatrix(
    what: str,
    model: Path,
    both: tuple[Job, Job],
    rounds: int,
    n_batch: int,
    n_threads: int,
    folder: Path,
    log: Callable[[str], None],
    *,
    noise: bool = True,
    whole: bool = False,
) -> dict[str, Any]:
    """Times of both programs. With `noise` llama-imatrix runs twice a round: the ratio of its two times is the noise.

    `whole`: `detect` computes the last layer's experts, which it usually leaves out and llama-imatrix does not.
    """
    facts: dict[str, Any] = {}

    def run(name: str, job: Job) -> Seconds:
        nonlocal facts
        if name == "detect":
            seconds, facts = detect(model, job, n_batch, n_threads, folder, whole)
            return seconds
        return imatrix(model, job, n_batch, n_threads, folder)

    long, short = both
    turns = ["imatrix", "detect", *(["imatrix again"] if noise else [])]
    base = {name: run(name, short) for name in turns}
    log(f"{what}: short job done")
    seen: dict[str, list[Seconds]] = {name: [] for name in turns}
    for number in range(rounds):
        first = number % len(turns)
        for name in turns[first:] + turns[:first]:
            seen[name].append(run(name, long))
            log(f"{what}: {name}: {seen[name][-1].cpu - base[name].cpu:.2f} s of processor time")
        log(f"{what}: round {number + 1} of {rounds}")
    n_tokens = long.n_tokens - short.n_tokens
    times = {name: [one.cpu - base[name].cpu for one in seen[name]] for name in turns}
    walls = {name: [one.wall - base[name].wall for one in seen[name]] for name in turns}
    commands = {name: [one.wall for one in seen[name]] for name in turns}
    ratios = {
        "ratio": speed_ratios(times["detect"], times["imatrix"]),
        "ratio_of_commands": speed_ratios(commands["detect"], commands["imatrix"]),
    }
    if noise:
        ratios["noise"] = speed_ratios(times["imatrix again"], times["imatrix"])
    return {
        "n_tokens": long.n_tokens,
        "n_decoded": facts["n_decoded"],
        "cpu_seconds": times,
        "wall_seconds": walls,
        "seconds_of_the_long_command": commands,
        "tokens_per_cpu_second": {name: n_tokens / statistics.median(values) for name, values in times.items()},
        **{name: Ratio.of(values).to_dict() for name, values in ratios.items()},
    }


def growth(
    model: Path, sizes: list[int], repeats: int, n_threads: int, folder: Path, log: Callable[[str], None]
) -> Any:
    """Time (the best of several, because of other work on the machine) and peak memory for growing numbers of pairs."""
    rng = random.Random(5)
    made = []
    for i in range(max(sizes)):
        question = f"Which of these words is the longest one: {' '.join(letters(rng, 4) for _ in range(6))}?"
        one, two = letters(rng, 5), str(rng.randrange(10**5))
        made.append(Pair(f"p{i}", f"{question} {one}", f"{question} {two}", one, two))
    seen: dict[int, list[dict[str, float]]] = {n: [] for n in sizes}
    for n in sizes:
        save_pairs(made[:n], folder / f"{n}.jsonl")
    for repeat in range(repeats):
        for n in sizes if repeat % 2 else sizes[::-1]:
            command = [sys.executable, "-P", "-c", MEMORY, str(model), str(folder / f"{n}.jsonl"), str(n_threads)]
            seen[n].append(json.loads(timed(command)[1].stdout))
        log(f"growth: repetition {repeat + 1} of {repeats}")
    best = {n: min(run["seconds"] for run in seen[n]) for n in sizes}
    cpu = {n: min(run["cpu"] for run in seen[n]) for n in sizes}
    return {
        "pairs": sizes,
        "seconds": best,
        "cpu_seconds": cpu,
        "exponent": float(np.polyfit(np.log(sizes), np.log([best[n] for n in sizes]), 1)[0]),
        "peak_mb": {n: min(run["peak_mb"] for run in seen[n]) for n in sizes},
        "tokens_a_pair": {n: seen[n][0]["n_tokens"] / n for n in sizes},
    }


def cells(ratio: dict[str, Any]) -> str:
    return (
        f"{ratio['median']:.2f} | {ratio['low']:.2f} to {ratio['high']:.2f} | {ratio['min']:.2f} to {ratio['max']:.2f}"
    )


def render(report: dict[str, Any]) -> str:
    # t/s: per second of processor time; commands: ratio of the long commands' times with starting and loading
    lines = [
        f"{report['threads']} thread(s), batches of {report['n_batch']} tokens, {report['rounds']} rounds; load of the "
        f"machine {report['load'][0]} before, {report['load'][1]} after.",
        "",
        "| model | prompts | tokens | decoded | imatrix t/s | ours t/s | ratio | 95% interval | min, max | commands |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in report["imatrix"].items():
        shape, job = name.split(": ")
        rate = found["tokens_per_cpu_second"]
        lines.append(
            f"| {shape} | {job} | {found['n_tokens']} | {found['n_decoded']} | {rate['imatrix']:.0f} | "
            f"{rate['detect']:.0f} | {cells(found['ratio'])} | {found['ratio_of_commands']['median']:.2f} |"
        )
        lines.append(f"| | imatrix / imatrix (noise) | | | | | {cells(found['noise'])} | |")
    grown = report["growth"]
    lines += ["", "| pairs | seconds | processor seconds | peak memory, MB |", "| --- | --- | --- | --- |"]
    for n in grown["pairs"]:
        lines.append(f"| {n} | {grown['seconds'][n]:.2f} | {grown['cpu_seconds'][n]:.2f} | {grown['peak_mb'][n]:.1f} |")
    lines += ["", f"Time grows with the pairs to the power {grown['exponent']:.2f}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small models: to try the script itself")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shapes", nargs="*", help="only these models")
    parser.add_argument("--kinds", nargs="*", help="only these: 'same text', 'chat'")
    parser.add_argument("--models", type=Path, default=OUTPUT / "models")
    arguments = parser.parse_args()
    if reason := why_no_imatrix():
        raise SystemExit(f"error: {reason}")

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    n_batch = 512
    plan = {"toy": (32, 64)} if arguments.quick else {"granite": (4, 128), "tiny": (96, 64)}
    report: dict[str, Any] = {
        "threads": arguments.threads,
        "n_batch": n_batch,
        "rounds": arguments.rounds,
        "load": [round(os.getloadavg()[0], 1)],
        "imatrix": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape, (n_pairs, n_prompt) in plan.items():
            if arguments.shapes is not None and shape not in arguments.shapes:
                continue
            model = TINY / "tiny-moe.gguf" if shape == "tiny" else cached_model(shape, arguments.models)
            for kind, both in jobs(folder, n_pairs, n_prompt).items():
                if arguments.kinds is not None and kind not in arguments.kinds:
                    continue
                what = f"{shape}: {kind}"
                report["imatrix"][what] = against_imatrix(
                    what, model, both, arguments.rounds, n_batch, arguments.threads, folder, log
                )
        sizes = [50, 100, 200] if arguments.quick else [100, 200, 400, 800, 1600]
        model = TINY / "tiny-moe.gguf"
        report["growth"] = growth(model, sizes, 2 if arguments.quick else 3, arguments.threads, folder, log)
    report["load"].append(round(os.getloadavg()[0], 1))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "detection.json").write_text(json.dumps(report, indent=1))
    print(render(report))


if __name__ == "__main__":
    try:
        main()
    except WorkerError as error:
        raise SystemExit(f"error: {error}") from None
