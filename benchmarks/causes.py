"""Measures whether effects of interventions choose better than RD: the section "Cause" of docs/results.md.

    python benchmarks/causes.py [--write-docs] [-m MODEL] [--folder FOLDER] [--behaviour NAME ...] [--items N]

For each behaviour of `tiny`: the map of detect, the effects of attribute over all experts, the truth by suppressing
each expert alone on other items, and every rule at its best strength within one cost. Strengths are chosen on the items
that estimated the effects and on one half of the neutral text; what is reported was measured on the other items, the
other half, and the held-out prompts. Finished steps are kept in the folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from performance import machine, table, write_docs
from results import IMAGES, OUTPUT, ROOT, steermoe
from rules import Measured, both_ways, compare, methods, randoms, span

from steermoe_local import __version__
from steermoe_local.attribution.items import pair_items, split
from steermoe_local.evaluation.measuring.evaluator import EvaluatorSettings
from steermoe_local.evaluation.measuring.opening import open_evaluator, open_guards
from steermoe_local.llama.rendering import Renderer
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.maps.effects import SUPPRESS
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.significance import pearson, spearman
from steermoe_local.models.embedded import Behaviour, behaviours
from steermoe_local.models.local_models import resolve_model
from steermoe_local.pairs.pairs import load_pairs
from steermoe_local.steering.bias_file import BiasFile

FloatArray = npt.NDArray[np.float64]

DOCS = ROOT / "docs" / "results.md"
START, END = "<!-- causes:start -->", "<!-- causes:end -->"
CAUSAL = 0.05  # nats per token: an expert whose suppression alone moves the margin by less is called idle
DRAWS = 768  # of each action, on 120 candidates
PICTURE = "rd-effect.png"
SHOWN = "document-memory"  # whose picture is in the docs


def made(behaviour: Behaviour, model: str, folder: Path, n_items: int | None) -> ExpertMap:
    """The map with effects: `detect`, then `attribute` with every expert as a candidate."""
    detected, attributed = folder / f"{behaviour.name}.json", folder / f"{behaviour.name}.effects.json"
    if not detected.exists():
        sides = ("--positive", behaviour.positive, "--negative", behaviour.negative)
        steermoe("detect", "-m", model, "--pairs", str(behaviour.pairs), "-o", str(detected), *sides, "-t", "1")
    if not attributed.exists():
        half = ExpertMap.load(detected).rd.size // 2
        some = () if n_items is None else ("--items", str(n_items))
        words = ("--candidates", str(half), "--draws", str(DRAWS), "-t", "1", "-o", str(attributed), *some)
        again = ["--resume"] if Path(f"{attributed}.partial").exists() else []
        pairs = ("--pairs", str(behaviour.pairs))
        steermoe("attribute", "-m", model, "--map", str(detected), *pairs, *words, *again)
    return ExpertMap.load(attributed)


def alone(expert_map: ExpertMap) -> tuple[list[tuple[int, int]], list[BiasFile | None]]:
    """Every expert, and the bias that suppresses it alone."""
    experts = [(layer, expert) for layer in range(expert_map.rd.shape[0]) for expert in range(expert_map.rd.shape[1])]
    biases: list[BiasFile | None] = []
    for place in experts:
        signs = np.zeros(expert_map.rd.shape, dtype=np.int8)
        signs[place] = -1
        biases.append(BiasFile.from_signs(signs, expert_map.identity))
    return experts, biases


def truth(measured: Measured, expert_map: ExpertMap) -> dict[str, Any]:
    """Which experts are causal, and how well RD and effects say so."""
    experts, biases = alone(expert_map)
    margins = measured.margins([None, *biases], measured.held)
    change = margins[1:] - margins[:1]
    real, error = change.mean(axis=1), change.std(axis=1, ddof=1) / np.sqrt(change.shape[1])
    effects = expert_map.effects
    assert effects is not None
    estimated = effects.table(SUPPRESS, "effect", expert_map.identity.shape)
    sure = effects.table(SUPPRESS, "significant", expert_map.identity.shape) == 1
    rd = expert_map.rd
    flat = [layer * rd.shape[1] + expert for layer, expert in experts]
    causal = (np.abs(real) >= CAUSAL) & (np.abs(real) >= 2 * error)
    n = int(causal.sum())
    size = np.round(np.abs(rd.ravel()[flat]), 9)
    least = np.sort(size)[::-1][n - 1] if n else np.inf
    tied = size == least
    # of those that share the last place each is taken with the same probability: the order of ties means nothing
    by_rd = (size > least) + tied * (n - int((size > least).sum())) / max(1, int(tied.sum()))
    said = sure.ravel()[flat] & (np.abs(estimated.ravel()[flat]) >= CAUSAL)
    strong = np.abs(rd.ravel()[flat]) >= 0.9
    return {
        "n": n,
        "n_experts": len(experts),
        "effect": _found(said.astype(float), causal),
        "rd": _found(by_rd, causal),
        "idle": int((strong & ~causal).sum()),
        "strong": int(strong.sum()),
        "pearson_effect": pearson(estimated.ravel()[flat], real),
        "pearson_rd": pearson(rd.ravel()[flat], -real),
        "spearman_effect": spearman(np.abs(estimated.ravel()[flat]), np.abs(real)),
        "spearman_rd": spearman(np.abs(rd.ravel()[flat]), np.abs(real)),
        "real": dict(zip(map(str, experts), real.tolist(), strict=True)),
        "causal": [experts[i] for i in np.flatnonzero(causal)],
    }


def _found(said: FloatArray, causal: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Precision and recall; `said` is the probability with which each expert is named."""
    both = float(said[causal].sum())
    return {"n": float(said.sum()), "precision": both / max(1.0, said.sum()), "recall": both / max(1, causal.sum())}


def opened(llama: SteeredLlama, behaviour: Behaviour, expert_map: ExpertMap, n_items: int | None) -> Measured:
    """What measures this behaviour: every second document of the neutral text is to choose on."""
    renderer = Renderer(llama._model)
    facts = expert_map.effects
    assert facts is not None
    items = pair_items(renderer, load_pairs(behaviour.pairs))
    neutral = open_guards(resolve_model("tiny"), None, "default")[1]
    assert neutral is not None
    documents = neutral.documents(renderer, neutral.longest(renderer))
    return Measured(llama, split(items, n_items, facts.facts.seed), (documents[::2], documents[1::2]))


def compared(
    measured: Measured,
    expert_map: ExpertMap,
    behaviour: Behaviour,
    fitted: Mapping[str, Path],
    causal: frozenset[tuple[int, int]],
) -> list[dict[str, Any]]:
    """Every rule at its best within the cost of RD's hard choice, and how many idle planted experts it promotes."""
    numbers = planted(behaviour)
    rules = methods(expert_map, numbers, fitted)
    budget = float(measured.costs(rules[0].choices[0][1:], measured.texts[0]).mean())
    rows, pairs = compare(
        measured, rules, budget, randoms(expert_map, numbers), lambda biases: rates_of(biases, behaviour)
    )
    idle = (behaviour.planted_positive | behaviour.planted_negative) - causal
    for row, pair in zip_longest(rows, pairs, fillvalue=None):
        promoted = {(layer, e) for bias in pair or () for layer in bias.layers for e in bias.experts(layer)[0]}
        row["promoted_idle"] = len(promoted & idle) if pair else None
    return rows


def planted(behaviour: Behaviour) -> tuple[int, int]:
    """How many experts training planted for each side."""
    return len(behaviour.planted_positive), len(behaviour.planted_negative)


def rates_of(biases: Sequence[BiasFile], behaviour: Behaviour) -> list[FloatArray]:
    """Values of the held-out prompts under each bias."""
    settings = EvaluatorSettings(context={"n_threads": 1})
    with open_evaluator(
        "tiny", f"builtin:{behaviour.name}", benign=None, neutral=None, settings=settings, n_threads=1
    ) as evaluator:
        return [measurement.values for measurement in evaluator.measure(list(biases), text=False, benign=False)]


def fits(behaviour: Behaviour, model: str, folder: Path, budget: float) -> dict[str, Path]:
    """The biases of `steermoe fit`, towards both sides, within a budget of KL."""
    found = {}
    for side, words in (("towards", ()), ("away", ("--reverse",))):
        path = folder / f"{behaviour.name}.{side}.gguf"
        if not path.exists():
            again = ["--resume"] if Path(f"{path}.partial").exists() else []
            effects = str(folder / f"{behaviour.name}.effects.json")
            common = ("-m", model, "--map", effects, "--pairs", str(behaviour.pairs), "-o", str(path), "-t", "1")
            steermoe("fit", *common, "--budget", f"{budget:.6f}", *words, *again)
        found[side] = path
    return found


def measure(behaviour: Behaviour, model: str, folder: Path, n_items: int | None) -> dict[str, Any]:
    done = folder / f"{behaviour.name}.causes.json"
    if done.exists():
        data: dict[str, Any] = json.loads(done.read_text("utf-8"))
        return data
    expert_map = made(behaviour, model, folder, n_items)
    llama = SteeredLlama(resolve_model(model), n_ctx=64, n_threads=1)
    measured = opened(llama, behaviour, expert_map, n_items)
    effects = expert_map.effects
    assert effects is not None
    by_rd = both_ways(expert_map, planted(behaviour))
    assert by_rd is not None
    fitted = fits(behaviour, model, folder, float(measured.costs(by_rd, measured.texts[0]).mean()))
    real = truth(measured, expert_map)
    causal = frozenset((layer, expert) for layer, expert in real["causal"])
    data = {
        "attribution": effects.facts.to_dict(),
        "truth": real,
        "rules": compared(measured, expert_map, behaviour, fitted, causal),
        "sides": [behaviour.positive, behaviour.negative],
    }
    done.write_text(json.dumps(data), encoding="utf-8")
    return data


def render(report: Mapping[str, Any]) -> str:
    """The tables."""
    about = report["about"]
    parts = [
        f"{about['tool']}, {about['date']}, {about['machine']['cpu']}, one thread. All 120 experts are candidates; "
        f"an expert is causal if suppressing it alone moves the margin by {CAUSAL} nats per token or more, and by two "
        "standard errors, on items that estimated nothing."
    ]
    rows = []
    for name, found in report["behaviours"].items():
        facts, real = found["attribution"], found["truth"]
        rows.append(
            [
                name,
                f"{facts['n_draws']['suppress']} / {facts['n_draws']['promote']}",
                f"{facts['r2']['suppress']:.2f} / {facts['r2']['promote']:.2f}",
                str(real["n"]),
                f"{real['effect']['precision']:.2f} / {real['effect']['recall']:.2f}",
                f"{real['rd']['precision']:.2f} / {real['rd']['recall']:.2f}",
                f"{real['pearson_effect']:.2f} / {real['pearson_rd']:.2f}",
                f"{real['idle']} of {real['strong']}",
            ]
        )
    header = [
        "behaviour",
        "draws, suppress / promote",
        "held-out R2",
        "causal experts",
        "effects: precision / recall",
        "as many by RD, ties at random: precision / recall",
        "correlation with the truth, effects / RD",
        "idle of those with RD of at least 0.9",
    ]
    parts.append(table(header, rows))
    for name, found in report["behaviours"].items():
        rows = [
            [
                row["name"],
                row["strength"],
                f"{row['n'][0]} / {row['n'][1]}",
                span(row["swing"]),
                "" if row["more_than_rd"] is None else span(row["more_than_rd"], "+"),
                f"{row['cost']:.4f}",
                span({key: 100 * value for key, value in row["rate"].items()}, digits=0),
                "" if row["promoted_idle"] is None else str(row["promoted_idle"]),
            ]
            for row in found["rules"]
        ]
        header = [
            "rule",
            "strength",
            "promoted / suppressed",
            "swing of the margin",
            "more than RD, hard",
            "KL",
            "swing of the rate, points",
            "idle planted experts promoted, either way",
        ]
        parts.append(f"**{name}** ({' / '.join(found['sides'])})\n\n" + table(header, rows))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="tiny")
    parser.add_argument("--folder", type=Path, default=OUTPUT.parent / "causes")
    parser.add_argument("--behaviour", action="append", choices=[b.name for b in behaviours()])
    parser.add_argument("--items", type=int)
    parser.add_argument("--write-docs", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "about": {
            "tool": f"steermoe-local {__version__}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
        },
        "behaviours": {},
    }
    for behaviour in behaviours():
        if not arguments.behaviour or behaviour.name in arguments.behaviour:
            print(behaviour.name, file=sys.stderr)
            found = measure(behaviour, arguments.model, arguments.folder, arguments.items)
            report["behaviours"][behaviour.name] = found
    text = render(report)
    print(text)
    if arguments.write_docs:
        write_docs(DOCS, text, START, END)
        picture = str(IMAGES / PICTURE)
        steermoe("map", "plot", "--effects", str(arguments.folder / f"{SHOWN}.effects.json"), "-o", picture)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from None
