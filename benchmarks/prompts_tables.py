"""Tables of what prompts.py measured: against stock, against transformers and llama-imatrix, and the aims."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import performance
from ratios import Ratio, speed_ratios, verdict

START, END = "<!-- prompts:start -->", "<!-- prompts:end -->"
LOAD_TOLERANCE, LOAD_SECONDS = 0.05, 0.01  # what two loads of one file differ by: either
MEMORY_TOLERANCE = 0.01  # of the peak
N_MISSES = 6  # told one by one
KINDS = ("cpu", "seconds")


@dataclass(frozen=True)
class Column:
    """A ratio of speeds: the times of `reference` over those of `measured`, each a task and who did it."""

    name: str
    reference: tuple[str, str]
    measured: tuple[str, str]


PROMPTS = ("prompt 64", "prompt 512", "prompt 2048")
RECORDER, DECODE, DETECTION, IMATRIX = "recorder 512", "decode", "detection 512", "detection, over llama-imatrix"
OVER_STOCK = (
    *(Column(name, (name, "stock"), (name, "ours")) for name in PROMPTS),
    Column(RECORDER, ("prompt 512", "stock"), ("prompt 512", "recorder")),
    Column(DECODE, (DECODE, "stock"), (DECODE, "ours")),
)
OVER_TRANSFORMERS = (
    *(Column(name, (name, "transformers"), (name, "ours")) for name in PROMPTS),
    Column(DETECTION, (DETECTION, "transformers"), (DETECTION, "recorder")),
)
NO_REPACK = Column("prompt 512", ("prompt 512", "ours"), ("prompt 512", "not repacked"))


def ratios(one: dict[str, Any], column: Column) -> dict[str, list[float]]:
    """Ratios round by round, of CPU times and of wall times; empty where they were not measured."""

    def times(task: str, side: str) -> list[dict[str, float]]:
        found: list[dict[str, float]] = one.get("times", {}).get(task, {}).get(side, [])
        return found

    reference, measured = times(*column.reference), times(*column.measured)
    if not reference or not measured:
        return {}
    return {kind: speed_ratios([time[kind] for time in measured], [time[kind] for time in reference]) for kind in KINDS}


def imatrix_ratios(one: dict[str, Any]) -> dict[str, list[float]]:
    """The same over llama-imatrix: of the tokens, without start and loading."""
    found = one.get("imatrix", {})
    if "cpu_seconds" not in found:
        return {}
    return {
        kind: speed_ratios(found[name]["detect"], found[name]["imatrix"])
        for kind, name in zip(KINDS, ("cpu_seconds", "wall_seconds"), strict=True)
    }


def cell(found: dict[str, list[float]]) -> str:
    if not found:
        return "-"
    return "{:.2f} ({:.2f})".format(*(statistics.median(found[kind]) for kind in KINDS))


def load_ratio(one: dict[str, Any]) -> float | None:
    """Stock's CPU time of loading over ours."""
    load = one.get("load", {})
    return load["stock"]["cpu"] / load["ours"]["cpu"] if "stock" in load else None


def peaks(one: dict[str, Any]) -> tuple[float, float] | None:
    """Peak memory of stock and of ours in MB."""
    found = one.get("peak_mb", {})
    both = found.get("stock"), found.get("ours")
    return None if None in both else both  # type: ignore[return-value]


#
# aims
#


@dataclass(frozen=True)
class Aim:
    """What is aimed at, and the figures that it is about: (what, verdict, value) of one model and number of threads."""

    text: str
    judge: Callable[[str, dict[str, Any]], list[tuple[str, str, str]]]


def at_least(aim: float, names: tuple[str, ...], columns: tuple[Column, ...], quants: str = "") -> Any:
    """Judges ratios of CPU times: "yes", "within noise", "no" (ratios.py)."""

    def judge(quant: str, one: dict[str, Any]) -> list[tuple[str, str, str]]:
        found = []
        for column in columns:
            values = ratios(one, column)
            if column.name in names and values and (not quants or quant in quants.split()):
                ratio = Ratio.of(values["cpu"])
                found.append((column.name, verdict(ratio, aim, 0.0), f"{ratio.median:.2f}"))
        return found

    return judge


def over_imatrix(aim: float) -> Any:
    def judge(quant: str, one: dict[str, Any]) -> list[tuple[str, str, str]]:
        values = imatrix_ratios(one)
        if not values:
            return []
        ratio = Ratio.of(values["cpu"])
        return [("detection", verdict(ratio, aim, 0.0), f"{ratio.median:.2f}")]

    return judge


def judge_load(quant: str, one: dict[str, Any]) -> list[tuple[str, str, str]]:
    if "stock" not in one.get("load", {}):
        return []
    stock, ours = (one["load"][name]["cpu"] for name in ("stock", "ours"))
    noise = max(LOAD_TOLERANCE * stock, LOAD_SECONDS)
    holds = "yes" if ours <= stock else "within noise" if ours <= stock + noise else "no"
    return [("load", holds, f"{stock / ours:.2f}")]


def judge_memory(quant: str, one: dict[str, Any]) -> list[tuple[str, str, str]]:
    both = peaks(one)
    if both is None:
        return []
    more = both[1] - both[0]
    holds = "yes" if more <= 0 else "within noise" if more <= MEMORY_TOLERANCE * both[0] else "no"
    return [("peak memory", holds, f"{more:+.0f} MB")]


def judge_bits(quant: str, one: dict[str, Any]) -> list[tuple[str, str, str]]:
    if "stock" not in one.get("load", {}):
        return []
    n = one["rounds_with_other_logits"]
    return [("logits", "no" if n else "yes", f"other bits {n} times")]


AIMS = (
    Aim("prompts, Q4_0: at least 2 times stock", at_least(2.0, PROMPTS, OVER_STOCK, "Q4_0")),
    Aim("prompts, Q4_K_M and MXFP4: at least 1.5 times stock", at_least(1.5, PROMPTS, OVER_STOCK, "Q4_K_M MXFP4")),
    Aim("recorder, Q4_0: at least 2 times stock", at_least(2.0, (RECORDER,), OVER_STOCK, "Q4_0")),
    Aim("recorder, Q4_K_M and MXFP4: at least 1.5 times stock", at_least(1.5, (RECORDER,), OVER_STOCK, "Q4_K_M MXFP4")),
    Aim("decode, Q4_0: at least 1.1 times stock", at_least(1.1, (DECODE,), OVER_STOCK, "Q4_0")),
    Aim("decode, all types: not slower than stock", at_least(1.0, (DECODE,), OVER_STOCK)),
    Aim("detection: at least 1.2 times transformers' best", at_least(1.2, (DETECTION,), OVER_TRANSFORMERS)),
    Aim("detection: at least 2 times llama-imatrix, on the same text", over_imatrix(2.0)),
    Aim("load: not slower than stock", judge_load),
    Aim("peak memory: not above stock's", judge_memory),
    Aim("the logits of all tokens have stock's bits", judge_bits),
)


def aims_table(layers: dict[str, dict[str, Any]]) -> str:
    """A line for each aim: in how many figures it holds, and where it does not."""
    rows = []
    for aim in AIMS:
        found: dict[str, list[tuple[str, str, str]]] = {}
        for key, one in layers.items():
            found[key] = aim.judge(key.split(", ")[1], one)
        held = [holds for figures in found.values() for _, holds, _ in figures]
        misses = {key: [f"{what} {value}" for what, holds, value in found[key] if holds == "no"] for key in found}
        where = [f"{key} {threads(key)}: {', '.join(figures)}" for key, figures in misses.items() if figures]
        more = [f"{len(where) - N_MISSES} more"] if len(where) > N_MISSES else []
        n_misses = held.count("no")
        holds = "not measured" if not held else "yes" if not n_misses else "no" if n_misses == len(held) else "in part"
        counts = [f"{held.count('yes')} of {len(held)}", str(held.count("within noise"))] if held else ["", ""]
        rows.append([aim.text, holds, *counts, "; ".join(where[:N_MISSES] + more)])
    return performance.table(["aim", "holds", "figures that hold", "within noise", "where not"], rows)


def threads(key: str) -> str:
    return "thread" if key.endswith(", 1") else "threads"


#
# tables
#


def stock_row(key: str, one: dict[str, Any]) -> list[str]:
    times = one.get("times", {}).get("prompt 512", {}).get("ours", [])
    speed = f"{512 / statistics.median(time['seconds'] for time in times):.0f}" if times else "-"
    load, both = load_ratio(one), peaks(one)
    bits = [text if holds == "no" else "same bits" for _, holds, text in judge_bits(key, one)]
    return [
        *key.split(", "),
        *(cell(ratios(one, column)) for column in OVER_STOCK),
        "-" if load is None else f"{load:.2f}",
        "-" if both is None else f"{both[1] - both[0]:+.0f} MB",
        *(bits or ["-"]),
        speed,
    ]


def others_row(key: str, one: dict[str, Any]) -> list[str]:
    how = one.get("transformers", {}).get("how", {})
    return [
        *key.split(", "),
        *(cell(ratios(one, column)) for column in OVER_TRANSFORMERS),
        how.get("prompt 512", "-"),
        cell(imatrix_ratios(one)),
    ]


def repack_row(key: str, one: dict[str, Any]) -> list[str]:
    load, peak = one.get("load", {}), one.get("peak_mb", {})
    return [
        *key.split(", "),
        cell(ratios(one, NO_REPACK)),
        f"{load['ours']['cpu'] / load['not repacked']['cpu']:.2f}" if "not repacked" in load else "-",
        *(f"{peak[name]:.0f} MB" if peak.get(name) else "-" for name in ("ours", "not repacked")),
    ]


def not_measured(layers: dict[str, dict[str, Any]]) -> list[str]:
    """What a part could not measure, and why, each reason once."""
    lines: dict[str, list[str]] = {}
    for key, one in layers.items():
        for part, name in (("transformers", "transformers"), ("imatrix", "llama-imatrix")):
            if reason := one.get(part, {}).get("skipped"):
                lines.setdefault(f"{name} was not measured: {reason}", []).append(key)
    return [f"{line}." if len(keys) == len(layers) else f"{line} ({'; '.join(keys)})." for line, keys in lines.items()]


def render(report: dict[str, Any]) -> str:
    """The measured part at the top of docs/performance.md."""
    layers = report["layers"]
    lead = ["layers", "type", "threads"]
    stock = [*lead, *(column.name for column in OVER_STOCK), "load", "peak memory", "logits", "tokens/s, prompt 512"]
    others = [*lead, *(column.name for column in OVER_TRANSFORMERS), "transformers' best", IMATRIX]
    repack = [*lead, NO_REPACK.name, "load", "peak, repacked", "peak, not repacked"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    sections = [
        performance.head(report, "python benchmarks/prompts.py"),
        f"Medians of {report['rounds']} round(s), in CPU time and in brackets in wall time: above 1 is faster.",
        "### Ours over stock",
        performance.table(stock, [stock_row(key, one) for key, one in layers.items()]),
        f"### Ours over transformers and llama-imatrix{f' ({versions})' if versions else ''}",
        *not_measured(layers),
        performance.table(others, [others_row(key, one) for key, one in layers.items()]),
        "### The aims",
        aims_table(layers),
        "### `--no-repack` over repacked weights, both ours",
        performance.table(repack, [repack_row(key, one) for key, one in layers.items()]),
    ]
    return "\n\n".join(sections) + "\n"
