"""Where the time of long prompts goes, and what settings of the context do to it.

    python benchmarks/attention.py [--write-docs]     (about ten minutes on two quiet cores)

Layers of real models' shapes with random Q4_0 weights. First the shares of the operations, in the unpatched build and
in ours; then ratios of settings to the default, of two processes in turn. All in CPU time. Progress goes to stderr,
the tables to stdout, and all figures to build/bench/attention.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import performance
from gguf import GGMLQuantizationType as Type
from random_q4 import SHAPES, version_of, write_model
from workers import STOCK, Worker

START, END = "<!-- attention:start -->", "<!-- attention:end -->"
LAYERS = {  # of a small vocabulary, so that the time is that of the layers
    "Granite 1B-A400M": replace(SHAPES["granite"], n_layer=6, n_vocab=512, seed=2),
    "OLMoE 1B-7B": replace(SHAPES["olmoe"], n_layer=2, n_vocab=512, seed=2),
}
PROMPTS = (512, 2048, 4096)
N_CTX = 4096
N_SETTINGS_PROMPT = 2048
OPS = {  # of ggml, by the names in the table
    "experts": ("MUL_MAT_ID",),
    "other products": ("MUL_MAT",),
    "attention": ("FLASH_ATTN_EXT",),
    "MUL": ("MUL",),
}
ON, OFF = 1, 0


def cache(kind: Type, flash: int = ON) -> dict[str, int]:
    """Settings of a KV cache of a type."""
    return {"flash_attn_type": flash, "type_k": kind.value, "type_v": kind.value}


SETTINGS: dict[str, dict[str, int]] = {
    "the same again (noise)": {},
    "without flash attention": {"flash_attn_type": OFF},
    "KV cache in F32": cache(Type.F32),
    "KV cache in BF16": cache(Type.BF16),
    "KV cache in Q8_0": cache(Type.Q8_0),
    "KV cache in F32, without flash attention": cache(Type.F32, OFF),
    "KV cache in BF16, without flash attention": cache(Type.BF16, OFF),
    **{f"ubatch of {n}": {"n_ubatch": n, "n_batch": max(n, 512)} for n in (128, 256, 1024, 2048)},
}


def model_of(name: str, folder: Path) -> Path:
    """The random model, made if the folder does not hold it yet."""
    path = folder / f"attention-{version_of(LAYERS[name])}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_model(path, LAYERS[name])
    return path


def start(model: Path, n_threads: int, settings: dict[str, int], *flags: str, stock: bool = False) -> Worker:
    """A process that reads prompts (attention_worker.py)."""
    arguments = [model, "--threads", n_threads, "--ctx", N_CTX, "--settings", json.dumps(settings), *flags]
    arguments += ["--stock"] if stock else []
    return Worker("attention_worker.py", *arguments, environment={"LLAMA_CPP_LIB_PATH": str(STOCK)} if stock else {})


def measure_ops(model: Path, n_threads: int, n_rounds: int) -> dict[str, Any]:
    """By length of the prompt: CPU seconds of the operations in both builds, and how much faster ours is."""
    found: dict[str, Any] = {}
    with start(model, n_threads, {}, "--times", stock=True) as stock, start(model, n_threads, {}, "--times") as ours:
        workers = (("stock", stock), ("ours", ours))
        for _, worker in workers:
            worker.ask("prompt", n=PROMPTS[0])  # to warm up
        for n in PROMPTS:
            rounds: list[dict[str, Any]] = []
            for _ in range(n_rounds):
                rounds.append({name: worker.ask("prompt", n=n) for name, worker in workers})
            n_different = sum(answers["stock"]["logits"] != answers["ours"]["logits"] for answers in rounds)
            found[str(n)] = {"rounds": rounds, "rounds_with_other_logits": n_different}
    return found


def measure_setting(model: Path, n_threads: int, settings: dict[str, int], n_rounds: int) -> dict[str, Any]:
    """Ratios of the default's CPU time to that of the settings, whether logits differ, and peaks of memory."""
    with start(model, n_threads, {}) as default, start(model, n_threads, settings) as other:
        ratios, same = [], True
        for number in range(n_rounds + 1):
            pair = [default, other] if number % 2 else [other, default]
            answers = {worker: worker.ask("prompt", n=N_SETTINGS_PROMPT) for worker in pair}
            same &= answers[default]["logits"] == answers[other]["logits"]
            if number:
                ratios.append(answers[default]["cpu"] / answers[other]["cpu"])
        peaks = [worker.ask("memory")["peak"] for worker in (default, other)]
    return {"ratios": ratios, "same_logits": same, "peak_mb": peaks}


def measure(parts: list[str], n_rounds: int, folder: Path, log: performance.Log) -> dict[str, Any]:
    """Measure parts on both models; returns what is written as JSON."""
    begin = time.monotonic()
    report: dict[str, Any] = {**performance.circumstances(), "rounds": n_rounds, "ops": {}, "settings": {}}
    for name in LAYERS:
        model = model_of(name, folder)
        for n_threads in (1, 2) if "ops" in parts else ():
            log(f"{name}, {n_threads} threads: operations")
            report["ops"][f"{name}, {n_threads}"] = measure_ops(model, n_threads, n_rounds)
        for setting, fields in SETTINGS.items() if "settings" in parts else ():
            log(f"{name}: {setting}")
            report["settings"].setdefault(setting, {})[name] = measure_setting(model, 1, fields, n_rounds)
    return report | {"seconds": round(time.monotonic() - begin)}


def shares(answers: list[dict[str, Any]]) -> list[str]:
    """Cells: the share of each kind of operation, and of all others."""
    total = sum(answer["cpu"] for answer in answers)
    parts = [sum(answer["ops"].get(op, 0.0) for answer in answers for op in ops) / total for ops in OPS.values()]
    return [f"{part:.0%}" for part in (*parts, 1 - sum(parts))]


def render(report: dict[str, Any]) -> str:
    """The tables of docs/performance.md."""
    ops = []
    for key, lengths in report["ops"].items():
        for n, found in lengths.items():
            rounds = found["rounds"]
            ratio = statistics.median(answers["stock"]["cpu"] / answers["ours"]["cpu"] for answers in rounds)
            bits = "OTHER BITS" if found["rounds_with_other_logits"] else "same bits"
            for build in ("stock", "ours"):
                answers = [both[build] for both in rounds]
                speed = int(n) / statistics.median(answer["cpu"] for answer in answers)
                last = [f"{ratio:.2f}", bits] if build == "ours" else ["", ""]
                ops.append([*key.split(", "), n, build, *shares(answers), f"{speed:.0f}", *last])
    settings = []
    for setting, models in report["settings"].items():
        cells = []
        for one in models.values():
            default, other = one["peak_mb"]
            more = f"{other - default:+.0f} MB" if default else ""  # None where /proc is missing
            bits = "same" if one["same_logits"] else "other"
            cells += [f"{statistics.median(one['ratios']):.2f}", more, bits]
        settings.append([setting, *cells])
    header = [
        name + column if column.startswith(":") else column
        for name in LAYERS
        for column in (": speed", "memory", "bits")
    ]
    return (
        f"{performance.head(report, 'python benchmarks/attention.py')}\n\n"
        f"Shares of the CPU time of a prompt by operation, means of {report['rounds']} rounds; last columns: tokens "
        "per second of CPU time, how many times as fast as stock (median), logits.\n\n"
        + performance.table(
            ["layers", "threads", "prompt", "build", *OPS, "rest", "tokens/s", "ours / stock", "logits"], ops
        )
        + f"\n\nSettings, in ours, one thread, a prompt of {N_SETTINGS_PROMPT} tokens: speed over that of llama.cpp's "
        "default (flash attention, KV cache in F16, ubatches of 512), and what they change.\n\n"
        + performance.table(["setting", *header], settings)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure where the time of long prompts goes.")
    parser.add_argument("--json", type=Path, default=performance.OUTPUT / "attention.json", help="where the figures go")
    parser.add_argument("--from", dest="source", type=Path, help="do not measure, take the figures of this file")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--check", action="store_true", help="fail if logits differ from stock's")
    parser.add_argument("--only", default="ops,settings", help="parts to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", type=Path, default=performance.OUTPUT / "models", help="keeps the random models")
    arguments = parser.parse_args()
    begin = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {line}", file=sys.stderr, flush=True)

    def measured() -> dict[str, Any]:
        performance.require_stock()
        return measure(arguments.only.split(","), arguments.rounds, arguments.models, log)

    performance.deliver(arguments, measured, render, log, (START, END))


if __name__ == "__main__":
    main()
