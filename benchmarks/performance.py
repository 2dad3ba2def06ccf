"""Cost of steering and recording: speed and memory against an unpatched build, and against transformers.

    python benchmarks/performance.py [--check] [--write-docs]     (make bench; about ten minutes on two cores)

Random Q4_0 models (random_q4.py) in worker processes, one request at a time. In a round every variant does the same
work once, in rotating order; a ratio compares times of one round only, so disturbances that last longer than a round
cancel out. The ratio of the two stock processes is the remaining noise. Progress goes to stderr, the tables to stdout,
and all figures to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import against_transformers
import numpy as np
from random_q4 import SHAPES, cached_model
from ratios import Ratio, noise_of, speed_ratios, verdict
from worker import steering_rows
from workers import HERE, STOCK, Worker, WorkerError, llama_worker

from steermoe_local.model_files.model_info import model_info
from steermoe_local.steering.bias_file import BiasFile, Mode, write_bias

Log = Callable[[str], None]
Answer = tuple[float, str]  # seconds per token, digest of the logits

DOCS = HERE.parent / "docs" / "performance.md"
OUTPUT = HERE.parent / "build" / "bench"
START, END = "<!-- measured:start -->", "<!-- measured:end -->"
MAX_ROUNDS = 60
MAX_TOKENS = 640  # the contexts hold 1024
PROMPT_SHARE = 0.7  # of a shape's time
PER_EXPERTS = 10_000
MEMORY_LIMIT = 1.0  # MB of its own over stock, for each PER_EXPERTS experts
BIAS_LIMIT = 5.0  # ms
# of "plain", "hard", ... prompt and decode over stock; detect is an additional figure without a promise
AT_LEAST = {"plain": 1.0, "hard": 0.99, "soft": 0.99, "rows": 0.99, "trace": 0.99, "recorder": 1.0}
NAMES = {
    "plain": "no bias",
    "hard": "hard rule in all layers",
    "soft": "soft rule in all layers",
    "rows": "hard rule, tokens in turns under two biases and unsteered",
    "trace": "trace, the experts of every token in all layers but the last",
    "recorder": "recorder, all tokens in all layers",
    "detect": "`record_counts`, all it does",
}


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    speed: dict[str, tuple[int, int, float]]  # shape: prompt tokens, decoded tokens, seconds
    memory: dict[str, int]  # shape: repetitions
    n_biases: int
    transformers: dict[str, float]  # shape: seconds
    min_rounds: int = 5
    n_gpu_layers: int = 0
    stock: Path = STOCK


FULL = Plan({"granite": (64, 50, 180.0), "olmoe": (64, 50, 180.0)}, {"many": 3, "granite": 1}, 5, {"granite": 60.0})
QUICK = Plan(
    {"toy": (32, 4, 0.0), "toy-olmoe": (32, 4, 0.0)}, {"toy": 2}, 2, {"toy": 0.0}, min_rounds=2
)  # to try the script itself


#
# measure
#


def measure_speed(
    shape: str, model: Path, plan: Plan, n_threads: int, log: Log
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Ratios of one shape, and the times of setting biases."""
    n_prompt, n_decode, seconds = plan.speed[shape]
    with ExitStack() as stack:
        log(f"{shape}: loading")
        where = {"n_gpu_layers": plan.n_gpu_layers, "stock_folder": plan.stock}
        stock = [stack.enter_context(llama_worker(model, ["plain"], n_threads, stock=True, **where)) for _ in range(2)]
        ours = stack.enter_context(llama_worker(model, list(NAMES), n_threads, **where))
        turns = Turns(stock, ours)

        def prompt(worker: Worker, variant: str) -> Answer:
            n = 2 * n_prompt if variant == "detect" else n_prompt  # a pair has two sides
            answer = worker.ask("prompt", variant=variant, n=n)
            return answer["seconds"] / n, answer.get("logits", "")

        def token(position: int) -> Callable[[Worker, str], Answer]:
            def next_token(worker: Worker, variant: str) -> Answer:
                answer = worker.ask("decode", variant=variant, start=position, n=1)
                return answer["seconds"], answer["logits"]

            return next_token

        decoders = [name for name in NAMES if name not in ("recorder", "detect")]
        for variant in NAMES:
            for worker in stock:
                prompt(worker, "plain")  # warm up; leaves each context with a prompt to continue
            prompt(ours, variant)
        n_rounds = n_tokens = 0
        end = time.monotonic() + seconds * PROMPT_SHARE
        while n_rounds < plan.min_rounds or (time.monotonic() < end and n_rounds < MAX_ROUNDS):
            turns.round("prompt", list(NAMES), prompt)
            n_rounds += 1
            log(f"{shape}: prompt {n_rounds}")
        end = time.monotonic() + seconds * (1 - PROMPT_SHARE)
        while n_tokens < n_decode or (time.monotonic() < end and n_tokens < MAX_TOKENS):
            turns.round("decode", decoders, token(n_prompt + n_tokens))
            n_tokens += 1
        log(f"{shape}: {n_tokens} tokens")
        biases = ours.ask("biases", n=plan.n_biases)
    return {
        "n_prompt": n_prompt,
        "n_decode": n_tokens,
        "n_rounds": n_rounds,
        "rounds_with_other_logits": turns.n_different,
        "tokens_per_second": {name: 1 / statistics.median(values) for name, values in turns.times.items()},
        "seconds_per_token": turns.times,
        **compare(turns.times),
    }, biases


class Turns:
    """Takes turns and keeps seconds per token by "variant: task", one value a round.

    Before each variant of ours comes a turn of one of the stock processes, so that every turn finds caches and threads
    as another process left them. A stock process that has several turns in a round counts with their mean.
    """

    def __init__(self, stock: Sequence[Worker], ours: Worker) -> None:
        self.stock, self.ours = stock, ours
        self.times: dict[str, list[float]] = {}
        self.n_different = 0
        self._n = 0

    def round(self, task: str, variants: list[str], run: Callable[[Worker, str], Answer]) -> None:
        """One turn of every variant, in rotating order; whether our plain logits are stock's bit for bit."""
        shift = self._n % len(variants)
        found: dict[str, list[float]] = {"stock 0": [], "stock 1": []}
        logits: set[str] = set()
        for i, variant in enumerate(variants[shift:] + variants[:shift]):
            which = (self._n + i) % 2
            seconds, digest = run(self.stock[which], "plain")
            found[f"stock {which}"].append(seconds)
            logits.add(digest)
            seconds, digest = run(self.ours, variant)
            found[variant] = [seconds]
            if variant == "plain":
                logits.add(digest)
        self._n += 1
        self.n_different += len(logits) != 1
        for name, values in found.items():
            self.times.setdefault(f"{name}: {task}", []).append(statistics.fmean(values))


def compare(times: dict[str, list[float]]) -> dict[str, Any]:
    """Noise, and ratios with verdicts, from seconds per token by "variant: task", round by round."""
    noise: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for task in ("prompt", "decode"):
        first, second = times[f"stock 0: {task}"], times[f"stock 1: {task}"]
        same = Ratio.of(speed_ratios(first, second))
        noise[task] = same.to_dict()
        reference = [statistics.fmean(pair) for pair in zip(first, second, strict=True)]
        for variant in NAMES:
            name = f"{variant}: {task}"
            if name not in times:
                continue
            ratio = Ratio.of(speed_ratios(times[name], reference))
            ratios[name] = ratio.to_dict()
            if variant in AT_LEAST:
                ratios[name]["at_least"] = AT_LEAST[variant]
                ratios[name]["holds"] = verdict(ratio, AT_LEAST[variant], noise_of(same))
    return {"noise": noise, "ratios": ratios}


def measure_memory(shape: str, model: Path, n_repetitions: int, n_threads: int, log: Log) -> dict[str, Any]:
    """Peak memory over stock. Every run is a process of its own, and reads the weights into memory of its own:
    pages of a mapped file come and go with the system's cache.

    Those of the libraries are left out of what the promise is about: they are as many for one expert as for all,
    processes share them, and the kernel maps them by 64 kB, so that their number depends on where the linker puts
    what is used.
    """
    n_tokens = 512  # a full ubatch: every part of the buffers is used
    modes: tuple[Mode, ...] = ("hard", "soft")
    biases = {str(mode): write_steering(model, mode) for mode in modes}
    runs = ["stock", "stock, all outputs", "plain", *modes, "recorder"]
    seen: dict[str, dict[str, list[float]]] = {name: {"peak": [], "mapped": [], "anonymous": []} for name in runs}
    for repetition in range(n_repetitions):
        for name in runs:
            stock = name.startswith("stock")
            variant = {"stock, all outputs": "all", "recorder": "recorder"}.get(name, "plain")
            bias = biases.get(name)
            with llama_worker(model, [variant], n_threads, stock=stock, mmap=False, bias=bias) as worker:
                worker.ask("prompt", variant=variant, n=n_tokens)
                if variant != "recorder":
                    worker.ask("decode", variant=variant, start=n_tokens, n=4)
                answer = worker.ask("memory")
            if answer["peak"] is None:
                return {"skipped": "this system has no /proc to read memory from"}
            for kind, values in seen[name].items():
                values.append(answer[kind])
        log(f"memory, {shape}: repetition {repetition + 1}")
    limit = MEMORY_LIMIT * max(1.0, SHAPES[shape].n_experts / PER_EXPERTS)
    result: dict[str, Any] = {"n_experts": SHAPES[shape].n_experts, "limit": limit, "megabytes": seen, "over_stock": {}}
    for name, kinds in seen.items():
        if name == "stock":
            continue
        over: dict[str, Any] = {
            kind: statistics.median(kinds[kind]) - statistics.median(seen["stock"][kind]) for kind in kinds
        }
        result["over_stock"][name] = over
        over["own"] = over["peak"] - over["mapped"]
        if name in AT_LEAST:
            over["holds"] = "yes" if over["own"] < limit else "no"
    noise = [max(values) - min(values) for values in seen["stock"].values()]
    result["noise"] = dict(zip(seen["stock"], noise, strict=True))
    return result


def write_steering(model: Path, mode: Mode) -> Path:
    """The bias file of a steered run, in the model's folder."""
    identity = model_info(model).require_moe()
    rows = steering_rows(identity.n_layer, identity.n_expert, mode)
    path = model.with_suffix(f".{mode}.bias")
    write_bias(BiasFile(identity, mode, {layer: np.array(row, np.float32) for layer, row in rows.items()}), path)
    return path


def summarize_biases(milliseconds: dict[str, list[float]]) -> dict[str, Any]:
    """Median and maximum of each step, and the additional time of the next token over an ordinary one."""
    token = statistics.median(milliseconds["a token"])
    steps: dict[str, Any] = {}
    for name, values in milliseconds.items():
        if name == "a token" or name.endswith(": next token"):
            continue
        median = statistics.median(values)
        after = statistics.median(milliseconds[f"{name}: next token"]) - token
        holds = "yes" if median < BIAS_LIMIT else "no"
        steps[name] = {"median": median, "max": max(values), "next_token_over": after, "holds": holds}
    return {"a_token": token, "steps": steps}


def machine() -> dict[str, Any]:
    """The machine that it was measured on."""
    info: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "python": sys.version[:6],
    }
    try:
        fields = dict(
            line.split(":", 1)
            for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
            if ":" in line
        )
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        flags = fields.get("flags", "").split()
        info["cpu"] = f"{fields['model name']}, family {fields['cpu family']} model {fields['model']}"
        info["vectors"] = ", ".join(
            f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if f in flags
        )
        total = Path("/proc/meminfo").read_text().split("\n")[0].split()[1]
        info["memory_gb"] = round(int(total) * 1024 / 1e9)
    except (OSError, KeyError):
        info["cpu"] = platform.processor()
    return info


def load() -> list[float] | None:
    """Load averages over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def git_commit() -> str:
    """What git calls the commit; "" without git, or outside a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def circumstances() -> dict[str, Any]:
    """When, of which commit and on which machine something is measured."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": git_commit(),
        "machine": machine(),
        "load_before": load(),
    }


def measure(plan: Plan, n_threads: int, models: Path, parts: Sequence[str], log: Log) -> dict[str, Any]:
    """Measure the parts; returns what is written as JSON."""
    start = time.monotonic()
    report: dict[str, Any] = {
        **circumstances(),
        "threads": n_threads,
        "speed": {},
        "biases": {},
        "memory": {},
        "transformers": {},
    }

    def model_of(shape: str) -> Path:
        log(f"{shape}: model")
        return cached_model(shape, models)

    if "speed" in parts:
        for shape in plan.speed:
            model = model_of(shape)
            need, free = 3 * 1.15 * model.stat().st_size + 1e9, against_transformers.free_memory()
            if free is not None and need > free:
                reason = f"its three processes need {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are available"
                log(f"{shape}: skipped, {reason}")
                report["speed"][shape] = {"skipped": reason}
                continue
            speed, biases = measure_speed(shape, model, plan, n_threads, log)
            report["speed"][shape] = speed
            report["biases"][shape] = summarize_biases(biases) | {"milliseconds": biases}
    if "memory" in parts:
        for shape, n_repetitions in plan.memory.items():
            report["memory"][shape] = measure_memory(shape, model_of(shape), n_repetitions, n_threads, log)
    if "transformers" in parts:
        for shape, seconds in plan.transformers.items():
            report["transformers"][shape] = against_transformers.measure(
                shape,
                dtypes=list(against_transformers.BYTES),
                n_threads=n_threads,
                seconds=seconds,
                min_rounds=plan.min_rounds,
                models=models,
                log=log,
            )
    report["load_after"] = load()
    report["seconds"] = round(time.monotonic() - start)
    return report


#
# report
#


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ratio_cells(ratio: dict[str, Any], digits: int = 3) -> list[str]:
    return [
        f"{ratio['median']:.{digits}f}",
        f"{ratio['low']:.{digits}f} to {ratio['high']:.{digits}f}",
        f"{ratio['min']:.{digits}f} to {ratio['max']:.{digits}f}",
    ]


def speed_section(shape: str, speed: dict[str, Any]) -> str:
    title = f"### Speed, {shape} shape\n\n"
    if "skipped" in speed:
        return title + f"Skipped: {speed['skipped']}."
    rates = speed["tokens_per_second"]
    rows = []
    for task in ("prompt", "decode"):
        rate = rates[f"stock 0: {task}"]
        rows.append(["stock / stock (noise)", task, f"{rate:.1f}", *ratio_cells(speed["noise"][task]), "", ""])
        for name, ratio in speed["ratios"].items():
            variant, its_task = name.split(": ")
            if its_task == task:
                promise = f"≥ {ratio['at_least']:.2f}" if "at_least" in ratio else ""
                cells = [f"{rates[name]:.1f}", *ratio_cells(ratio), promise, ratio.get("holds", "")]
                rows.append([NAMES[variant], task, *cells])
    different = speed["rounds_with_other_logits"]
    bits = (
        "the same bits as stock's in every round" if not different else f"OTHER BITS than stock's in {different} rounds"
    )
    header = ["ours / stock", "task", "tokens/s", "ratio", "95% interval", "min to max", "promise", "holds"]
    return (
        f"{title}Prompt of {speed['n_prompt']} tokens, {speed['n_decode']} decoded, "
        f"{speed['n_rounds']} rounds. Without a bias our logits had {bits}.\n\n" + table(header, rows)
    )


def biases_section(biases: dict[str, Any]) -> str:
    rows = [
        [
            shape,
            name,
            f"{step['median']:.2f} ms",
            f"{step['max']:.2f} ms",
            f"{step['next_token_over']:+.1f} ms",
            f"< {BIAS_LIMIT:g} ms",
            step["holds"],
        ]
        for shape, found in biases.items()
        for name, step in found["steps"].items()
    ]
    header = ["shape", "step", "median", "max", "next token, over an ordinary one", "promise", "holds"]
    return "### Setting and swapping a bias in a live context\n\n" + table(header, rows)


def memory_section(memory: dict[str, Any]) -> str:
    rows = []
    for shape, found in memory.items():
        if "skipped" in found:
            rows.append([shape, found["skipped"], "", "", "", "", "", ""])
            continue
        base = statistics.median(found["megabytes"]["stock"]["peak"])
        rows.append([shape, "stock (spread)", f"{base:.1f} MB", f"± {found['noise']['peak']:.2f} MB", "", "", "", ""])
        for name, over in found["over_stock"].items():
            limit = f"< {found['limit']:.2f} MB" if "holds" in over else ""
            total = statistics.median(found["megabytes"][name]["peak"])
            cells = [f"{over[kind]:+.2f} MB" for kind in ("peak", "own", "anonymous")] + [limit, over.get("holds", "")]
            rows.append([f"{shape}, {found['n_experts']:,} experts", NAMES.get(name, name), f"{total:.1f} MB", *cells])
    header = ["shape", "run", "peak", "peak over stock", "without the libraries' pages"]
    header += ["private at the end, over stock", "promise", "holds"]
    return "### Memory\n\n" + table(header, rows)


def transformers_section(shape: str, found: dict[str, Any]) -> str:
    title = f"### Against transformers, {shape} shape\n\n"
    if "skipped" in found:
        return title + f"Skipped: {found['skipped']}."
    rows = []
    for figure, both in found["figures"].items():
        speeds = [f"{both[side]:.1f} tokens/s" for side in ("ours", "theirs")]
        cells = [*ratio_cells(both["ratio"], 2), f"≥ {both['aim']:g}", both["reached"]]
        rows.append([figure, both["how"], *speeds, *cells])
    memory = found["memory"]
    if "ratio" in memory:
        theirs = min(peak for peak in memory["theirs"].values() if peak is not None)
        cells = [f"{memory['ours']:.0f} MB", f"{theirs:.0f} MB", f"{memory['ratio']:.2f}", "", "", "≤ 0.33"]
        rows.append(["peak memory", "", *cells, memory["reached"]])
        mapped = memory["ours_mapped"]
        cells = [f"{mapped:.0f} MB", f"{theirs:.0f} MB", f"{mapped / theirs:.2f}", "", "", "", ""]
        rows.append(["peak with pages of the mapped file", "", *cells])
    header = ["figure", "transformers' best", "ours", "theirs", "ours / theirs", "95% interval", "min to max"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{title}{versions}; {found['n_rounds']} rounds of {against_transformers.N_PROMPT} tokens, then "
        f"{against_transformers.N_DECODE} decoded.\n\n" + table([*header, "aim", "reached"], rows)
    )


def head(report: dict[str, Any], command: str) -> str:
    """The sentence with the circumstances of a report, its seconds, and its threads where they are the same for all."""
    about = report["machine"]
    parts = [", ".join(filter(None, [about["cpu"], about.get("vectors")])), f"{about['cores']} cores"]
    parts += [f"{about['memory_gb']} GB"] if "memory_gb" in about else []
    parts += [about["system"]]
    parts += [f"{report['threads']} threads"] if "threads" in report else []
    parts += [f"load {report['load_before'][0]} before" for _ in [0] if report.get("load_before")]
    return (
        f"Measured {report['date']} (commit {report['commit'] or 'unknown'}) by `{command}` in {report['seconds']} s: "
        + "; ".join(parts)
        + "."
    )


def render(report: dict[str, Any]) -> str:
    """The measured part of docs/performance.md."""
    sections = [head(report, "make bench")]
    sections += [speed_section(shape, found) for shape, found in report["speed"].items()]
    sections += [biases_section(report["biases"])] if report["biases"] else []
    sections += [memory_section(report["memory"])] if report["memory"] else []
    sections += [transformers_section(shape, found) for shape, found in report["transformers"].items()]
    return "\n\n".join(sections) + "\n"


def broken_promises(report: Any, path: str = "") -> list[str]:
    """The entries of the report whose promise does not hold."""
    found = []
    for name, value in report.items():
        if name == "holds" and value == "no":
            found.append(path)
        elif name == "rounds_with_other_logits" and value:
            found.append(f"{path}: logits")
        elif isinstance(value, dict):
            found += broken_promises(value, f"{path}, {name}" if path else name)
    return found


def write_docs(docs: Path, text: str, start: str = START, end: str = END) -> None:
    """Put the text between the markers. Raises ValueError when they are missing."""
    before, _, rest = docs.read_text(encoding="utf-8").partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{docs}: has no {start} and {end}; put them back")
    docs.write_text(f"{before}{start}\n\n{text}\n{end}{after}", encoding="utf-8", newline="\n")


def require_stock(folder: Path = STOCK) -> None:
    """Exit with the cure if the unpatched build is missing."""
    if not any(folder.glob("*llama.*")):
        if folder != STOCK:
            raise SystemExit(f"error: --stock {folder}: has no libllama; name the folder of an unpatched build")
        raise SystemExit("error: build/stock has no library; run make build/stock/.built (make bench does)")


def deliver(
    arguments: argparse.Namespace,
    measured: Callable[[], dict[str, Any]],
    render: Callable[[dict[str, Any]], str],
    log: Log,
    markers: tuple[str, str] = (START, END),
) -> None:
    """Take the figures of --from, or measure and write them to --json; print them; handle --write-docs and --check.

    Exits with 1 for an error, and for a broken promise with --check.
    """
    try:
        if arguments.source:
            report = json.loads(arguments.source.read_text(encoding="utf-8"))
        else:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)  # before long work
            report = measured()
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            log(f"figures in {arguments.json}")
        text = render(report)
        print(text)
        if arguments.write_docs:
            write_docs(DOCS, text, *markers)
    except (WorkerError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    broken = broken_promises(report)
    for promise in broken:
        log(f"does not hold: {promise}")
    if arguments.check and broken:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what steering and recording cost.")
    parser.add_argument("--json", type=Path, default=OUTPUT / "performance.json", help="where the figures go")
    parser.add_argument("--from", dest="source", type=Path, help="do not measure, take the figures of this file")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--check", action="store_true", help="fail if a promise does not hold")
    parser.add_argument("--quick", action="store_true", help="toy models, few rounds: tries the script, means nothing")
    parser.add_argument("--only", default="speed,memory,transformers", help="parts to measure")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--models", type=Path, default=against_transformers.MODELS, help="keeps the random models")
    parser.add_argument("--shapes", help="of the models whose speed is measured (granite,olmoe)")
    parser.add_argument("--seconds", type=float, help="for the speed of each shape")
    parser.add_argument("--gpu-layers", type=int, default=0, help="layers on the first device (make test-cuda)")
    parser.add_argument("--stock", type=Path, default=STOCK, help="folder of the unpatched libraries")
    arguments = parser.parse_args()
    begin = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {line}", file=sys.stderr, flush=True)

    def measured() -> dict[str, Any]:
        require_stock(arguments.stock)
        plan = QUICK if arguments.quick else FULL
        shapes = arguments.shapes.split(",") if arguments.shapes else plan.speed
        if unknown := [shape for shape in shapes if shape not in plan.speed]:
            raise SystemExit(f"error: --shapes {','.join(unknown)}: there are {', '.join(plan.speed)}")
        speed = {name: plan.speed[name] for name in shapes}
        if arguments.seconds is not None:
            speed = {name: (n_prompt, n, arguments.seconds) for name, (n_prompt, n, _) in speed.items()}
        plan = replace(plan, speed=speed, n_gpu_layers=arguments.gpu_layers, stock=arguments.stock)
        return measure(plan, arguments.threads, arguments.models, arguments.only.split(","), log)

    deliver(arguments, measured, render, log)


if __name__ == "__main__":
    main()
